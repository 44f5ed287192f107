"""Make the weights of a network random, in place, and back."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.utils import parametrize

from vardrop.dropouts_before import dropouts_before, in_wrappers, is_off, rate_of, switch_off, switch_on, why_kept
from vardrop.given import check_module
from vardrop.half import HALVES, lost_step
from vardrop.memory import keep_freed
from vardrop.weights.modules import (
    Noise,
    RandomWeights,
    attach,
    axes_of,
    detach,
    geometries,
    noisy_weights,
    weight_axes,
)
from vardrop.weights.posteriors import Posterior

Where = str | Iterable[str] | Callable[[nn.Module, str], bool] | None

_NOT_SELECTED = "is not selected by where"


@dataclass
class Report:
    """What :func:`convert_` did.

    Attributes:
        converted: names of the modules whose weights are random now.
        skipped: name -> reason, in a sentence, for every other module that has parameters of its own, and for dropout
            in front of converted modules that is scheduled or learned, and stays.
        new_parameters: the noise parameters. An optimiser that exists already has not got them:
            ``optimizer.add_param_group({"params": report.new_parameters})``.
        replaced: name -> p of the dropout modules in front of converted ones, now switched off.
        notes: what else there is to know, in sentences.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    new_parameters: list[nn.Parameter] = field(default_factory=list)
    replaced: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        count = sum(p.numel() for p in self.new_parameters)
        lines = [f"converted: {len(self.converted)} ({count:,} new parameters)"]
        lines += [f"  {name}" for name in self.converted]
        lines += [f"  {name}: dropout of rate {p:g} replaced, now 0" for name, p in self.replaced.items()]
        if self.skipped:
            lines += [f"left alone: {len(self.skipped)}"]
            lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines + self.notes)


def convert_(model: nn.Module, config: Posterior, where: Where = None, replace_dropout: bool = True) -> Report:
    """Make the weights of a network random variables, in place, in any architecture.

    The class of every chosen module is swapped for one whose weights read as random in training and as the plain
    parameters in evaluation; its forward, hooks, ties and parameters stay what they are. New parameters hold the
    noise. Convert before wrapping a model for distributed training.

    Known are Linear, Conv1-3d, ConvTranspose1-3d, Embedding, Bilinear, MultiheadAttention, RNN, LSTM, GRU and their
    cells (one weight sample per minibatch, shared over time), ``Conv1D`` of transformers, and what
    :func:`register_layer` adds. A weight tied between modules has one noise, and one divergence: that of the first.
    A module that is converted already keeps its posterior, and so does a weight that a converted module shares.

    Args:
        model: any module; may itself be a layer.
        config: the posterior, for example ``vd.VariationalDropout()``.
        where: which modules: a glob of names or several (``"encoder.*"``), or a predicate ``(module, name) -> bool``;
            None for all. A module with several names goes by any of them.
        replace_dropout: whether dropout modules right before a converted module of an ``nn.Sequential`` (activations
            between them do not count) are switched off; their p is where a rate starts that ``config`` leaves open.
            One that also serves a module that is not converted stays on, and so does one of ``vd.layers`` whose rate
            is scheduled or learned, which the report says.

    Returns:
        A report: what was converted, what was left alone and why, the new parameters, the dropout replaced.

    Raises:
        TypeError: if ``model`` is no module, ``config`` no posterior, or ``where`` none of the above.
        ValueError: if a glob matches no module, or nothing was converted. The model is then as it was.

    Example:
        >>> import vardrop as vd
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
        >>> report = vd.convert_(net, vd.VariationalDropout(sharing="layer"))
        >>> report.converted, report.replaced
        (['0', '3'], {'2': 0.5})
        >>> {name: round(float(p), 2) for name, p in vd.dropout_rates(net).items()}
        {'0.weight': 0.2, '3.weight': 0.5}
    """
    if not isinstance(config, Posterior):
        raise TypeError(
            "vardrop.convert_: config must be a posterior, for example vd.VariationalDropout(), got "
            f"{config.__name__ + ' (the class: call it)' if isinstance(config, type) else repr(config)}"
        )
    check_module(model, "convert_")
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    selected = _selected(where, names)
    report = Report()
    chosen: list[nn.Module] = []
    noisy = in_wrappers(model)
    for module, (name, *_) in names.items():
        shown = name or type(module).__name__
        reason = _why_not(module, module in selected)
        if reason is None and id(module) in noisy:
            reason = f"has the noise of {noisy[id(module)]} already; random weights would be noise upon noise"
        if reason is None:
            chosen.append(module)
            report.converted.append(shown)
        elif reason:
            report.skipped[shown] = reason
    if not chosen:
        reasons = sorted(report.skipped.items(), key=lambda item: item[1] == _NOT_SELECTED)[:5]
        told = "; ".join(f"{name}: {reason}" for name, reason in reasons)
        raise ValueError(f"vardrop.convert_: nothing to convert. {told or 'The model has no parameters'}")

    dropouts = dropouts_before(model, {id(module) for module in chosen}) if replace_dropout else {}
    kept = {id(dropout): why for dropout in dropouts.values() if (why := why_kept(dropout))}
    report.skipped |= {names[dropout][0]: kept[id(dropout)] for dropout in dropouts.values() if id(dropout) in kept}
    dropouts = {layer: dropout for layer, dropout in dropouts.items() if id(dropout) not in kept}
    rates = {dropout: rate_of(dropout) or None for dropout in dropouts.values()}  # 0 is none
    made = {  # by the identity of the mean: tied weights share their noise
        id(mean): (Noise(other, geometry, ""), tensor) for _, mean, tensor, other, geometry in noisy_weights(model)
    }
    for module in chosen:
        dropout = dropouts.get(id(module))
        noise, tensors = {}, {}
        for name, geometry in geometries(module).items():
            mean: Tensor = module._parameters[name]  # type: ignore[assignment]
            if id(mean) not in made:
                tensor = config.initial(mean.detach(), geometry, None if dropout is None else rates[dropout])
                made[id(mean)] = Noise(config, geometry, ""), nn.Parameter(tensor) if config.learned else tensor
                if config.learned:
                    report.new_parameters.append(made[id(mean)][1])  # type: ignore[arg-type]
            how, tensor = made[id(mean)]
            noise[name] = how._replace(key=f"{name}_{how.config.noise_name}")
            tensors[noise[name].key] = tensor
        attach(module, noise, tensors)
        if dropout is not None and rate_of(dropout) > 0 and not is_off(dropout):
            p, bound = rate_of(dropout), getattr(config, "bound", math.inf)
            report.replaced[names[dropout][0]] = p
            switch_off(dropout)
            if bound < math.inf and p > (most := 1 / (1 + math.exp(-bound))) + 1e-9 and _starts_there(config):
                report.notes.append(
                    f"{names[module][0]} starts at the rate {most:.3g} and not at the {p:g} of {names[dropout][0]}: "
                    "max_alpha of the posterior bounds it; max_alpha=math.inf does not"
                )
    lost = max((lost_step(p) for p in report.new_parameters if p.dtype in HALVES and p.numel()), default=0.0)
    if lost:
        kind = next(p.dtype for p in report.new_parameters if p.dtype in HALVES)
        report.notes.append(
            f"the noise is of {kind}, which rounds steps below {lost:.2g} away where it starts: smaller ones of an "
            "optimiser teach it nothing; keep the model in float32 and run it under torch.autocast"
        )
    keep_freed()  # it will be trained
    return report


def _starts_there(config: Posterior) -> bool:
    """Whether a posterior leaves it to the dropout that it replaces where its rates start."""
    return getattr(config, "rate", None) is None and getattr(config, "alpha", None) is None


def restore_(model: nn.Module) -> list[str]:
    """Undo :func:`convert_` in place: the exact plain classes and parameters, which keep the posterior means.

    Args:
        model: a converted module, or one that contains some. Dropout that was switched off is on again where it is
            inside of it.

    Returns:
        The names of the modules that were restored; empty if none was random.

    Raises:
        TypeError: if ``model`` is no module.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = vd.convert_(layer, vd.VariationalDropout())
        >>> vd.restore_(layer), type(layer).__name__, sorted(layer.state_dict())
        (['Linear'], 'Linear', ['bias', 'weight'])
    """
    check_module(model, "restore_")
    restored = []
    for name, module in model.named_modules():
        if isinstance(module, RandomWeights):
            detach(module)
            restored.append(name or type(module).__name__)
        if is_off(module):
            switch_on(module)
    return restored


def _selected(where: Where, names: dict[nn.Module, list[str]]) -> set[nn.Module]:
    """The modules that ``where`` asks for, by any of their names."""
    if where is None:
        return set(names)
    if callable(where):
        return {module for module, called in names.items() if any(where(module, name) for name in called)}
    globs = [where] if isinstance(where, str) else list(where) if isinstance(where, Iterable) else [where]
    chosen: set[nn.Module] = set()
    for glob in globs:
        if not isinstance(glob, str):
            raise TypeError(
                "vardrop.convert_: where must be a glob of module names, several globs, or a predicate "
                f"(module, name) -> bool, got {glob!r}"
            )
        found = {module for module, called in names.items() if any(fnmatch.fnmatchcase(name, glob) for name in called)}
        if not found:
            some = ", ".join(repr(called[0]) for called in list(names.values())[:8])
            raise ValueError(f"vardrop.convert_: where must match the name of a module ({some}, ...), got {glob!r}")
        chosen |= found
    return chosen


def _why_not(module: nn.Module, selected: bool) -> str | None:
    """Why a module is not converted, in a sentence; None if it is, empty if there is nothing in it to convert."""
    kind = type(module)
    if isinstance(module, RandomWeights):
        return "is converted already; vd.restore_ it first to give it another posterior"
    own = [p for p in module._parameters.values() if p is not None]
    known = axes_of(kind) is not None
    base = next((base for base in kind.__mro__[1:] if axes_of(base) is not None), None)
    if not known and base is None and not own:
        return ""
    if not selected:
        return _NOT_SELECTED
    if parametrize.is_parametrized(module):
        return "is parametrised by torch.nn.utils.parametrize; remove the parametrisation first"
    if not known and any(isinstance(p, nn.UninitializedParameter) for p in own):
        return "is lazy and has no shape yet; run a forward pass first"
    if not known and base is not None:
        return (
            f"its class {kind.__name__} is a subclass of {base.__name__} that may compute something else; "
            f"vd.register_layer({kind.__name__}, weight=...) makes it known"
        )
    if not known and all(p.ndim < 2 for p in own):
        return f"its class {kind.__name__} has no weight matrix"
    if not known:
        return f"its class {kind.__name__} is not known; vd.register_layer makes it so"
    axes = weight_axes(module)
    lost = [name for name in axes if name not in module._parameters]
    if lost:
        return f"has no parameter {lost[0]!r} (weight_norm, spectral_norm and prune replace it); undo that first"
    weights = {name: p for name in axes if (p := module._parameters[name]) is not None}
    for name, p in weights.items():
        if not p.is_floating_point():
            return f"has a {name} of type {p.dtype}; only floating-point weights can be random"
        if p.numel() == 0:
            return f"has a {name} of shape {tuple(p.shape)}, which is empty"
        if max(axes[name]) >= p.ndim:
            return f"has a {name} of shape {tuple(p.shape)}, without the axes {axes[name]} that it is registered with"
    if any(type(p).__name__ == "DTensor" for p in weights.values()):
        return "is sharded already (its weight is a DTensor); convert before distributing the model"
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which rewrites the weight in place"
    if getattr(module, "sparse", False):
        return "has sparse gradients, which its noise cannot have; set sparse=False"
    return None
