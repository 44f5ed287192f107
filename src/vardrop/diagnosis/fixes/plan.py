"""What a cure is to do: which noise shifts which BatchNorm, by name, so that it can be done to a copy first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vardrop.diagnosis.report import Diagnosis
from vardrop.diagnosis.rules import FEW, SHIFT, alone, by_cause, shifts_surely
from vardrop.layers.base import Drop
from vardrop.rates import Rated
from vardrop.roles import Site, sites


@dataclass(frozen=True)
class Offender:
    """A source of noise that shifts a BatchNorm.

    Attributes:
        name: of its module.
        excess: k² − 1 that it gives alone, at the worst BatchNorm.
        share: by how many sources that BatchNorm is shifted.
        last: the last BatchNorm that its noise reaches.
    """

    name: str
    excess: float
    share: int
    last: str


@dataclass(frozen=True)
class Changes:
    """What a cure did.

    Attributes:
        changed: name -> what it is now, in words.
        left: name -> why it was left alone.
    """

    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)


def offenders(diagnosis: Diagnosis) -> list[Offender]:
    """The sources that shift a BatchNorm in training, whether or not its running statistics fit evaluation by now.

    Args:
        diagnosis: of the model.
    """
    shifted = [
        found
        for found in diagnosis.batchnorms
        if shifts_surely(found) or (found.examples < FEW and (found.theory or 1.0) > 1 + SHIFT)
    ]
    result = []
    for name, hit in by_cause(shifted).items():
        reached = [found for found in diagnosis.batchnorms if name in found.sources]
        if not reached:
            continue  # nobody knows whose noise it is
        worst = max(hit, key=lambda found: abs(alone(found, name) - 1))
        excess = max(alone(worst, name), worst.theory or 0.0) - 1
        result.append(Offender(name, excess, max(len(worst.causes), 1), reached[-1].name))
    return result


def site_of(model: nn.Module, name: str) -> Site | str:
    """The rate of a source, or why it cannot be set."""
    found = [site for site in sites(model) if site.owner is model.get_submodule(name)]
    if not found:
        return "has no rate that is known here"
    if len(found) > 1:
        return "has several rates: " + ", ".join(site.attribute for site in found)
    if isinstance(found[0].owner, Rated) and found[0].owner.is_learned:
        return "has a learned rate"
    if isinstance(found[0].owner, Rated) and found[0].owner.schedule is not None:
        return "follows a schedule, which would set its rate again"
    return found[0]


def dropout_of(model: nn.Module, name: str) -> Site | str:
    """The rate of a source that is a module of its own, which can be taken out."""
    site = site_of(model, name)
    if isinstance(site, str):
        return site
    return site if isinstance(site.owner, _DropoutNd | Drop) else "is no dropout module that could be exchanged"


def places(model: nn.Module, module: nn.Module) -> Iterator[tuple[Any, str]]:
    """Everywhere that a module is held: its holder, and by which name."""
    for name, found in model.named_modules(remove_duplicate=False):
        if found is module and name:
            path, _, child = name.rpartition(".")
            yield model.get_submodule(path), child
