"""Which modules of a model have noise that hangs on their ``training`` flag, and on nothing else does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vardrop.prediction.noise_code import Use, uses_of_training
from vardrop.rates import Rated
from vardrop.roles import rate_attribute
from vardrop.weights import estimators
from vardrop.weights.modules import RandomWeights

_SHORTENS = re.compile(r"patch_?drop|token_?drop", re.IGNORECASE)
_FUSED = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)
_NOISY = (*_FUSED, _DropoutNd, nn.RReLU, nn.RNNBase, RandomWeights, Rated)


@dataclass(frozen=True)
class Source:
    """One source of noise in a model.

    Attributes:
        name: of the module, dotted; the class of a model that is one itself.
        kind: what it is: a class of dropout, "functional dropout", "random weight", ...
        rate: of dropping now; None where there is no one number.
    """

    name: str
    kind: str
    rate: float | None

    def __str__(self) -> str:
        return f"{self.name}: {self.what}"

    @property
    def what(self) -> str:
        """Kind and rate, in words."""
        return self.kind if self.rate is None else f"{self.kind}, p = {self.rate:g}"


class Survey(NamedTuple):
    """What is to be done with a model: its modules, which to switch on, the noise, what stays off and why."""

    names: dict[nn.Module, str]
    on: dict[nn.Module, str]
    sources: list[Source]
    left_off: dict[str, str]


class _Verdict(NamedTuple):
    """Whether a flag goes on, the kinds and rates of the noise there is, and why it stays off."""

    on: bool = False
    noise: tuple[tuple[str, float | None], ...] = ()
    why_off: str | None = None


def survey(model: nn.Module) -> Survey:
    """Look at every module of a model, a shared one once.

    Args:
        model: any module.
    """
    names = {module: name or _class_name(module) for name, module in model.named_modules()}
    found = Survey(names, {}, [], {})
    fused = {}
    for module, shown in names.items():
        if _is_silent(type(module)):
            continue
        if isinstance(module, _FUSED):
            fused[module] = shown
        verdict = _judge(module)
        if verdict.on:
            found.on[module] = shown
        found.sources.extend(Source(shown, kind, rate) for kind, rate in verdict.noise)
        if verdict.why_off is not None:
            found.left_off[shown] = verdict.why_off
    for module, shown in fused.items():  # their kernels know no noise, and look at their own flag only
        if not _other_use(module) and any(m in found.on for m in module.modules()):
            found.on.setdefault(module, shown)
    if isinstance(model, torch.jit.ScriptModule):
        found.left_off[_class_name(model)] = "it is TorchScript, where only dropouts that are modules can be switched"
    if estimators.current().name == "none":
        at_mean = {source.name: source for source in found.sources if source.kind == _RANDOM_WEIGHT}
        found.left_off.update(dict.fromkeys(at_mean, "its weights are at their means: the estimator is 'none'"))
        found.sources[:] = [source for source in found.sources if source not in at_mean.values()]
    return found


_SILENT: set[type] = set()


def _is_silent(kind: type) -> bool:
    """Whether this is a class of torch's that never has noise: found out once for each, as they are most modules."""
    if kind in _SILENT:
        return True
    if not kind.__module__.startswith("torch.nn.modules.") or issubclass(kind, _NOISY):
        return False
    _SILENT.add(kind)
    return True


_RANDOM_WEIGHT = "random weight"
_MORE_THAN_NOISE = "its code also does something else in training: "


def _judge(module: nn.Module) -> _Verdict:
    kind = _class_name(module)
    if isinstance(module, RandomWeights):
        return _Verdict(True, ((_RANDOM_WEIGHT, None), *_of_torch(module).noise))
    if isinstance(module, Rated):
        return _Verdict(True, ((kind, module.p),) if module.p > 0 else ())
    verdict = _of_torch(module)
    if type(module).__module__.startswith("torch.nn."):
        return verdict
    if _SHORTENS.search(kind):
        return _Verdict(why_off=None if _rate(module) == 0 else "it drops tokens, and shapes would change")
    if not verdict.on:
        return _of_code(module, kind)
    other = _other_use(module)  # a subclass may do something else
    return _Verdict(why_off=_MORE_THAN_NOISE + other) if other else verdict


def _of_torch(module: nn.Module) -> _Verdict:
    """Modules of torch, and those of a class that is derived from one."""
    if isinstance(module, _DropoutNd):
        return _Verdict(True, ((_class_name(module), module.p),) if module.p > 0 else ())
    if isinstance(module, nn.RReLU):
        return _Verdict(True, (("RReLU", None),) if module.lower < module.upper else ())
    if isinstance(module, nn.MultiheadAttention) and module.dropout > 0:
        return _Verdict(True, (("attention dropout", module.dropout),))
    if isinstance(module, nn.RNNBase) and module.dropout > 0 and module.num_layers > 1:
        return _Verdict(True, (("recurrent dropout", module.dropout),))
    return _Verdict()


def _of_code(module: nn.Module, kind: str) -> _Verdict:
    """Modules of other people: by what their code says, and by their name where it cannot be read."""
    uses = None if isinstance(module, torch.jit.ScriptModule) else uses_of_training(type(module))
    if uses is None:
        return _unreadable(module, kind)
    active = [use for use in uses if use.is_active(module) and use.rate(module) != 0]
    noise = [use for use in active if use.kind != "else"]
    other = [use for use in active if use.kind == "else"]
    if rate_attribute(module) is not None:
        rate = _rate(module)
        told = {(kind, rate)} if noise and rate != 0 else set()
    else:
        told = {(_kind_of(use), use.rate(module)) for use in noise}
    if not told:
        could_be = not _has_state(module) and not any(module.children())  # nothing but noise, perhaps
        unknown = next((use.text for use in other if could_be or use.mixed or use.rate(module) is not None), None)
        return _Verdict(why_off=unknown and f"it is not known as noise what its code does in training: {unknown}")
    if other and any(use.kind == "noise" or use.mixed for use in active):
        return _Verdict(why_off=_MORE_THAN_NOISE + other[0].text)
    return _Verdict(not other, tuple(sorted(told, key=str)))


def _kind_of(use: Use) -> str:
    """What a report calls the noise of some code: by the name of its rate."""
    if use.kind == "functional":
        return "functional dropout"
    name = next((name for chain in use.rates for name in chain if "drop" in name.lower()), "noise")
    return f"{name} in its forward"


def _other_use(module: nn.Module) -> str | None:
    """What else than noise hangs on the flag, in the words of the code."""
    uses = uses_of_training(type(module)) or ()
    return next((use.text for use in uses if use.kind == "else" and use.is_active(module)), None)


def _unreadable(module: nn.Module, kind: str) -> _Verdict:
    """A module whose code cannot be read."""
    rate = _rate(module)
    if re.search("drop|stochasticdepth", kind, re.IGNORECASE) and not any(module.children()) and not _has_state(module):
        return _Verdict(True, ((kind, rate),) if rate != 0 else ())
    looks_noisy = rate is not None and rate > 0
    return _Verdict(
        why_off="its code cannot be read, so that it is not known what hangs on its flag" if looks_noisy else None
    )


def _rate(module: nn.Module) -> float | None:
    """A rate by its name among the attributes of a module."""
    attribute = rate_attribute(module)
    named = (
        [attribute] if attribute else [name for name in vars(module) if "drop" in name.lower() or name in ("p", "prob")]
    )
    values = [getattr(module, name) for name in named]
    return max((float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)), default=None)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _class_name(module: nn.Module) -> str:
    return str(module.original_name) if isinstance(module, torch.jit.ScriptModule) else type(module).__name__
