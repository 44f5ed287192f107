"""Dropout right before layers of a network, which random weights replace: found, switched off, switched on again."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn
from torch.nn.modules import activation
from torch.nn.modules.dropout import _DropoutNd

from vardrop.layers.base import Drop, is_sequence
from vardrop.layers.concrete import ConcreteDropout
from vardrop.layers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from vardrop.layers.fast import FastDropout
from vardrop.layers.gaussian import GaussianDropout
from vardrop.layers.structured import DropConnect
from vardrop.weights.modules import RandomWeights

_ELEMENTWISE = (nn.Identity, nn.Flatten, *(getattr(activation, name) for name in activation.__all__))
_PLAIN_RATE = "vardrop_replaced_rate"  # on a dropout that is switched off: the p that restore_ gives back
_OURS = (Dropout, Dropout1d, Dropout2d, Dropout3d, GaussianDropout)
_WRAPPERS = (ConcreteDropout, FastDropout, DropConnect)


def is_off(dropout: nn.Module) -> bool:
    """Whether noise on weights has taken the place of this dropout."""
    return hasattr(dropout, _PLAIN_RATE)


def rate_of(dropout: nn.Module) -> float:
    """The rate, or that which a dropout had that is off."""
    rate = float(getattr(dropout, _PLAIN_RATE) if is_off(dropout) else dropout.p)  # type: ignore[arg-type]
    return round(rate, 7) if isinstance(dropout, Drop) else rate  # one in a float32 buffer has odd digits


def switch_off(dropout: nn.Module) -> None:
    """No more noise, until :func:`switch_on`. A rate in a buffer stays: checkpoints have it, schedulers set it."""
    setattr(dropout, _PLAIN_RATE, dropout.p)
    if isinstance(dropout, Drop):
        dropout.off = True
    else:
        dropout.p = 0.0  # type: ignore[assignment]


def switch_on(dropout: nn.Module) -> None:
    """Undo :func:`switch_off`."""
    if isinstance(dropout, Drop):
        dropout.off = False
    else:
        dropout.p = getattr(dropout, _PLAIN_RATE)
    delattr(dropout, _PLAIN_RATE)


def in_wrappers(model: nn.Module) -> dict[int, str]:
    """By the id of a module: the layer of vardrop that puts noise on its inputs or weights."""
    found: dict[int, str] = {}
    for wrapper in model.modules():
        if isinstance(wrapper, _WRAPPERS):
            name = next(kind.__name__ for kind in _WRAPPERS if isinstance(wrapper, kind))
            found |= {id(module): name for module in wrapper.layer.modules()}
    return found


def why_kept(dropout: nn.Module) -> str | None:
    """Why a dropout in front of a converted module stays on; None if it is one to replace."""
    if not isinstance(dropout, Drop):
        return None
    if dropout.is_learned:
        return "has a learned rate, and stays in front of random weights: noise upon noise"
    if dropout.schedule is not None:
        return "follows a schedule, and stays in front of random weights: noise upon noise"
    return None


def _leaves(module: nn.Sequential) -> Iterator[nn.Module]:
    """The modules of nested nn.Sequential containers in the order they run."""
    for child in module:  # not children(), which leaves out repetitions
        if is_sequence(child):
            yield from _leaves(child)
        else:
            yield child


def dropouts_before(model: nn.Module, chosen: set[int]) -> dict[int, nn.Module]:
    """By the id of a chosen module: the dropout that an nn.Sequential runs right before it, and before nothing else."""
    found: dict[int, nn.Module] = {}
    needed: set[int] = set()
    for container in model.modules():
        if not is_sequence(container):
            continue
        dropout: nn.Module | None = None
        for child in _leaves(container):
            if isinstance(child, _DropoutNd) or type(child) in _OURS:
                dropout = child
            elif not isinstance(child, _ELEMENTWISE):
                if dropout is not None and id(child) in chosen:
                    found[id(child)] = dropout
                elif dropout is not None and not isinstance(child, RandomWeights):
                    needed.add(id(dropout))
                dropout = None
    return {module: dropout for module, dropout in found.items() if id(dropout) not in needed}
