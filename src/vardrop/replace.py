"""Swap the plain dropouts of a model for Gaussian, variational or concrete ones that start at the same rate."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from vardrop import rates, roles
from vardrop.convert import Where, _selected
from vardrop.dropouts_before import dropouts_before, is_off
from vardrop.given import check_module
from vardrop.layers.base import source
from vardrop.layers.concrete import ConcreteDropout
from vardrop.layers.gaussian import GaussianDropout
from vardrop.weights.modules import RandomWeights

Make = Callable[[float], nn.Module]

_PLAIN = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_OF_CHANNELS: dict[type[nn.Module], type[nn.Module]] = {
    nn.Conv1d: nn.Dropout1d,
    nn.Conv2d: nn.Dropout2d,
    nn.Conv3d: nn.Dropout3d,
}
# What shares a draw. nn.Dropout2d takes three dimensions for a batch of sequences, hence (2, 3): it is refused then.
_SHARED: dict[type[nn.Module], tuple[int, ...]] = {
    nn.Dropout: (),
    nn.Dropout1d: (-1,),
    nn.Dropout2d: (2, 3),
    nn.Dropout3d: (-3, -2, -1),
}


@dataclass
class ReplaceReport:
    """What :func:`replace_dropout_` did.

    Attributes:
        replaced: name -> the rate that the new module starts from.
        skipped: name -> reason, in a sentence, for every other dropout, functional ones among them.
        new_parameters: the learned rates, for an optimiser that exists already.
    """

    replaced: dict[str, float] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    new_parameters: list[nn.Parameter] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"replaced: {len(self.replaced)} ({len(self.new_parameters)} new parameters)"]
        lines += [f"  {name}: p = {p:g}" for name, p in self.replaced.items()]
        return "\n".join(lines + [f"left alone: {name}: {reason}" for name, reason in self.skipped.items()])


class _ConcreteBefore(ConcreteDropout):
    """The noise of :class:`ConcreteDropout`, in front of a layer that stays where it is, under its own name."""

    def __init__(self, p: rates.Rate, layer: nn.Module) -> None:
        super().__init__(p, layer)
        del self.layer  # no submodule of this one,
        self.__dict__["layer"] = layer  # but what the divergence reads

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        return self.noise(x, source(generator)) if self.training else x

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, before={self.layer}"

    def _get_name(self) -> str:
        return ConcreteDropout.__name__


def replace_dropout_(
    model: nn.Module, kind: str | Make = "gaussian", where: Where = None, features: int | None = None
) -> ReplaceReport:
    """Swap the plain dropouts of a model, in place, for others that start at the same rate.

    * ``"gaussian"``: :class:`vardrop.layers.GaussianDropout` at a fixed rate; whole channels share a draw in place of
      ``Dropout1d`` to ``3d``.
    * ``"variational"``: the same with a learned rate. Its divergence counts the units, or channels, that it acts on:
      those of the linear layer, or convolution, behind it in an ``nn.Sequential``, elsewhere ``features``.
    * ``"concrete"``: the noise of :class:`vardrop.layers.ConcreteDropout`, learned. Its divergence reads the weights of
      the layer behind it, so only dropout right before a linear layer, or ``Dropout1d`` to ``3d`` before a convolution,
      in an ``nn.Sequential`` is swapped; the layer keeps its name and its keys.
    * a function ``p -> module``, which swaps relatives of ``nn.Dropout`` too.

    A dropout that several parents hold stays one module. :class:`vardrop.ELBO` counts the divergences.

    Args:
        model: any module that has dropout inside.
        kind: as above.
        where: which dropouts: a glob of names or several, or a predicate ``(module, name) -> bool``; None for all.
        features: for ``"variational"``, the number of units or channels where it cannot be read off the model.

    Returns:
        A report: what was replaced, what was left alone and why, the new parameters.

    Raises:
        TypeError: if ``model`` is no module, or ``kind`` makes none.
        ValueError: for an unknown kind, a glob that matches nothing, or if nothing was replaced; the model is then as
            it was.

    Example:
        >>> import vardrop as vd
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 2))
        >>> vd.replace_dropout_(net, "variational").replaced
        {'2': 0.5}
        >>> net[2]
        GaussianDropout(p=0.5, learned)
    """
    check_module(model, "replace_dropout_")
    if not callable(kind) and kind not in ("gaussian", "variational", "concrete"):
        raise ValueError(
            "vardrop.replace_dropout_: kind must be 'gaussian', 'variational', 'concrete', or a function p -> module, "
            f"got {kind!r}"
        )
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    try:
        selected = _selected(where, names)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("convert_", "replace_dropout_", 1)) from None

    report = ReplaceReport()
    behind = _layers_behind(model)
    made: dict[nn.Module, nn.Module] = {}
    for site in roles.sites(model):
        old = site.owner
        if old is None:
            continue
        reason = _why_not(model, site, old, names[old], old in selected)
        if reason is None:
            new = _make(kind, old, behind.get(id(old), []), features)
            reason = new if isinstance(new, str) else None
            if isinstance(new, nn.Module):
                made[old] = _like(new, old, model)
                report.replaced[site.name] = site.rate
                report.new_parameters += list(new.parameters())
        if reason is not None:
            report.skipped[site.name or type(old).__name__] = reason
    if not made:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:5])
        raise ValueError(
            f"vardrop.replace_dropout_: the model must have a plain dropout to swap. {told or 'It has none'}"
        )
    for holder in names:  # every parent that holds it
        for child, module in holder._modules.items():
            if module in made:
                holder._modules[child] = made[module]
    return report


def _why_not(model: nn.Module, site: roles.Site, old: nn.Module, called: list[str], selected: bool) -> str | None:
    """Why a dropout is not swapped, whatever the kind."""
    if site.is_number:
        holder = type(site.holder).__name__
        return f"is functional: {holder} hands the number {site.rate:g} on, and there is no module to swap"
    if type(old) not in _PLAIN:
        base = "a subclass that may do something else" if isinstance(old, _DropoutNd) else "not a plain dropout"
        return f"its class {type(old).__name__} is {base}"
    if not selected:
        return "is not selected by where"
    if old is model:
        return "is the model itself, which has no parent to put another module into"
    if is_off(old):
        return "is switched off, as vd.convert_ has put its noise on the weights"
    if site.rate == 0:
        return "has p = 0: there is no rate to start from; vd.set_rates_ sets one"
    if site.rate == 1:
        return "has p = 1, which is no noise but zero"
    if old._forward_hooks or old._forward_pre_hooks:
        return "has hooks, which would be lost"
    for name in called:
        path, _, child = name.rpartition(".")
        holder_class = type(model.get_submodule(path))
        if _reads_rate(holder_class, child):
            return f"is functional: {holder_class.__name__} reads its p and drops elsewhere"
    return None


def _reads_rate(holder: type[nn.Module], child: str) -> bool:
    """Whether a forward reads the p of a dropout, as those that use fused attention do, without calling it."""
    try:
        text = inspect.getsource(holder.forward)
    except (OSError, TypeError):  # written at run time: nothing to read
        return False
    return re.search(rf"self\.{re.escape(child)}\.p\b", text) is not None


def _layers_behind(model: nn.Module) -> dict[int, list[nn.Module]]:
    """By the id of a dropout: the layers that an nn.Sequential runs right behind it."""
    layers = {id(module): module for module in model.modules() if isinstance(module, _LAYERS)}
    behind: dict[int, list[nn.Module]] = {}
    for layer, dropout in dropouts_before(model, set(layers)).items():
        behind.setdefault(id(dropout), []).append(layers[layer])
    return behind


def _make(kind: str | Make, old: nn.Module, behind: list[nn.Module], features: int | None) -> nn.Module | str:
    """The new module, or the reason why there is none."""
    p = float(old.p)  # type: ignore[arg-type]
    if callable(kind):
        new = kind(p)
        if not isinstance(new, nn.Module):
            raise TypeError(
                f"vardrop.replace_dropout_: kind must give a torch.nn.Module for p = {p:g}, got {type(new).__name__}"
            )
        return new
    if kind == "concrete":
        layer = behind[0] if len(behind) == 1 else None
        if layer is None or type(old) is not _OF_CHANNELS.get(type(layer), nn.Dropout):
            return (
                "does not stand right before one nn.Linear, or as Dropout1d to 3d before one convolution, in an "
                "nn.Sequential, whose weights its divergence reads"
            )
        if isinstance(layer, RandomWeights):
            return "stands before a layer whose weights are random: noise upon noise; vd.restore_ that first"
        return _ConcreteBefore(rates.learned(p), layer)
    shared = _SHARED.get(type(old))
    if shared is None:
        return f"its class {type(old).__name__} has other noise than independent units; give a function p -> module"
    if kind == "gaussian":
        return GaussianDropout(p, shared=shared)
    if p > 0.5:
        return f"has p = {p:g}, and the alpha of variational dropout goes up to 1, a rate of 1/2"
    units = _units(old, behind[0]) if len(behind) == 1 else None
    if units is None:
        units = features
    if units is None:
        return f"acts on a number of {'channels' if shared else 'units'} that the model does not tell; pass features="
    return GaussianDropout(rates.learned(p), features=units, shared=shared)


def _units(dropout: nn.Module, layer: nn.Module) -> int | None:
    """How many draws an example has, as the layer behind tells."""
    if type(dropout) is nn.Dropout and isinstance(layer, nn.Linear):
        return layer.in_features
    if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) and type(dropout) is _OF_CHANNELS.get(type(layer)):
        return layer.in_channels
    return None


def _like(new: nn.Module, old: nn.Module, model: nn.Module) -> nn.Module:
    """In the mode of the old module, on the device of the model."""
    device = next((p.device for p in model.parameters()), None)
    return new.train(old.training).to(device)
