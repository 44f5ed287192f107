"""Which modules of a model have noise that hangs on their ``training`` flag, and on nothing else does."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vardrop.prediction.noise_code import uses_of_training
from vardrop.rates import Rated
from vardrop.roles import rate_attribute
from vardrop.weights import estimators
from vardrop.weights.modules import RandomWeights

_SHORTENS = re.compile(r"patch_?drop|token_?drop", re.IGNORECASE)
_FUSED = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer, nn.MultiheadAttention)


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
        return f"{self.name}: {self.kind}" + ("" if self.rate is None else f", p = {self.rate:g}")


class Survey(NamedTuple):
    """What is to be done with a model: the modules to switch on, the sources of noise, what stays off and why."""

    on: dict[nn.Module, str]
    sources: list[Source]
    left_off: dict[str, str]


class _Verdict(NamedTuple):
    on: bool = False
    kind: str | None = None  # None: it is no source of noise
    rate: float | None = None
    why_off: str | None = None


def survey(model: nn.Module) -> Survey:
    """Look at every module of a model, a shared one once.

    Args:
        model: any module.
    """
    found = Survey({}, [], {})
    named = list(model.named_modules())
    for name, module in named:
        shown = name or _class_name(module)
        verdict = _judge(module)
        if verdict.on:
            found.on[module] = shown
        if verdict.kind is not None:
            found.sources.append(Source(shown, verdict.kind, verdict.rate))
        if verdict.why_off is not None:
            found.left_off[shown] = verdict.why_off
    for name, module in named:  # their fused kernels know no noise, and look at their own flag only
        if isinstance(module, _FUSED) and any(inner in found.on for inner in module.modules()):
            found.on.setdefault(module, name or _class_name(module))
    if estimators.current().name == "none":
        for name in [source.name for source in found.sources if source.kind == _RANDOM_WEIGHT]:
            found.left_off[name] = "its weights are at their means, as the estimator in force is 'none'"
        found.sources[:] = [source for source in found.sources if source.name not in found.left_off]
    return found


_RANDOM_WEIGHT = "random weight"


def _judge(module: nn.Module) -> _Verdict:
    kind = _class_name(module)
    if isinstance(module, RandomWeights):
        return _Verdict(True, _RANDOM_WEIGHT)
    if isinstance(module, Rated):
        rate = module.p
        return _Verdict(True, kind if rate > 0 or module.is_learned else None, rate)
    if _SHORTENS.search(kind):
        rate = _rate(module)
        return _Verdict(why_off=None if rate == 0 else "drops tokens, which changes the shape of what follows")
    verdict = _of_torch(module) or _of_code(module, kind)
    if verdict.on and type(module).__module__.split(".")[0] != "torch" and not isinstance(module, torch.jit.ScriptModule):
        other = _other_use(module)
        if other is not None:
            return _Verdict(why_off=f"its code also does something else in training: {other}")
    return verdict


def _of_torch(module: nn.Module) -> _Verdict | None:
    """Modules of torch, and their subclasses."""
    if isinstance(module, _DropoutNd):
        return _Verdict(True, _class_name(module) if module.p > 0 else None, module.p)
    if isinstance(module, nn.RReLU):
        return _Verdict(True, "RReLU" if module.lower < module.upper else None)
    if isinstance(module, nn.MultiheadAttention):
        return _Verdict(module.dropout > 0, "attention dropout" if module.dropout > 0 else None, module.dropout)
    if isinstance(module, nn.RNNBase):
        drops = module.dropout > 0 and module.num_layers > 1
        return _Verdict(drops, "recurrent dropout" if drops else None, module.dropout)
    return None


def _of_code(module: nn.Module, kind: str) -> _Verdict:
    """Modules of other people: by what their code says, and by their name where it cannot be read."""
    if type(module).__module__.startswith("torch.nn."):
        return _Verdict()
    uses = None if isinstance(module, torch.jit.ScriptModule) else uses_of_training(type(module))
    if uses is None:
        return _unreadable(module, kind)
    noise = [use for use in uses if use.kind != "else" and use.is_active(module) and use.rate(module) != 0]
    if not noise:
        return _Verdict()
    rate = max((rate for use in noise if (rate := use.rate(module)) is not None), default=None)
    rate = _rate(module) if rate is None else rate
    if rate == 0:
        return _Verdict()
    if rate_attribute(module) is not None:
        return _Verdict(True, kind, rate)
    return _Verdict(True, "functional dropout" if all(use.kind == "functional" for use in noise) else "noise in its forward", rate)


def _other_use(module: nn.Module) -> str | None:
    """What else hangs on the flag, in the words of the code."""
    uses = uses_of_training(type(module)) or ()
    return next((use.text for use in uses if use.kind == "else" and use.is_active(module)), None)


def _unreadable(module: nn.Module, kind: str) -> _Verdict:
    """A module whose code cannot be read."""
    rate = _rate(module)
    if re.search("drop|stochasticdepth", kind, re.IGNORECASE) and not any(module.children()) and not _has_state(module):
        return _Verdict(True, kind if rate != 0 else None, rate)
    looks_noisy = rate is not None and rate > 0
    return _Verdict(why_off="its code cannot be read, so that it is not known what hangs on its flag" if looks_noisy else None)


def _rate(module: nn.Module) -> float | None:
    """A rate by its name among the attributes of a module."""
    attribute = rate_attribute(module)
    named = [attribute] if attribute else [name for name in vars(module) if "drop" in name.lower() or name in ("p", "prob")]
    values = [getattr(module, name) for name in named]
    return max((float(v) for v in values if isinstance(v, int | float) and not isinstance(v, bool)), default=None)


def _has_state(module: nn.Module) -> bool:
    return any(True for _ in module.parameters()) or any(True for _ in module.buffers())


def _class_name(module: nn.Module) -> str:
    return str(getattr(module, "original_name", type(module).__name__))
