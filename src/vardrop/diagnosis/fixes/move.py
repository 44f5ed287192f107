"""Dropout behind the last BatchNorm that its noise reaches, where there is none left to shift."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from vardrop.diagnosis.fixes.plan import Changes, Offender, dropout_of
from vardrop.layers.dropout import Dropout


class _ThenDropout:
    """A BatchNorm whose output is dropped. Its parameters and buffers keep their names."""

    moved_dropout: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.moved_dropout(super().forward(x))  # type: ignore[misc]


class BatchNorm1dThenDropout(_ThenDropout, nn.BatchNorm1d):
    """``nn.BatchNorm1d``, and dropout of its output."""


class BatchNorm2dThenDropout(_ThenDropout, nn.BatchNorm2d):
    """``nn.BatchNorm2d``, and dropout of its output."""


class BatchNorm3dThenDropout(_ThenDropout, nn.BatchNorm3d):
    """``nn.BatchNorm3d``, and dropout of its output."""


class SyncBatchNormThenDropout(_ThenDropout, nn.SyncBatchNorm):
    """``nn.SyncBatchNorm``, and dropout of its output."""


_WITH: dict[type[nn.Module], Any] = {
    nn.BatchNorm1d: BatchNorm1dThenDropout,
    nn.BatchNorm2d: BatchNorm2dThenDropout,
    nn.BatchNorm3d: BatchNorm3dThenDropout,
    nn.SyncBatchNorm: SyncBatchNormThenDropout,
}
_CHANNELS: dict[type[nn.Module], type[nn.Module]] = {
    nn.BatchNorm1d: nn.Dropout1d,
    nn.BatchNorm2d: nn.Dropout2d,
    nn.BatchNorm3d: nn.Dropout3d,
}


def move(model: nn.Module, found: Sequence[Offender]) -> Changes:
    """Take dropout out where it shifts a BatchNorm, and put it behind the last one that it reaches.

    The BatchNorm stays the same module, with the same keys in a checkpoint, and gets a ``moved_dropout``. Several
    dropouts that end up at one place become the one with the highest rate.

    Args:
        model: is changed.
        found: what shifts it.
    """
    changes = Changes()
    arriving: dict[str, nn.Module] = {}
    for offender in found:
        site = dropout_of(model, offender.name)
        norm = model.get_submodule(offender.last)
        if isinstance(site, str):
            changes.left[offender.name] = site
            continue
        if type(norm) not in _WITH:
            changes.left[offender.name] = f"{offender.last} is a {type(norm).__name__}, which is left as it is"
            continue
        rate = site.rate
        there = arriving.get(offender.last)
        if there is None or float(there.p) < rate:  # type: ignore[arg-type]
            arriving[offender.last] = _fitting(site.owner, norm, rate)
        setattr(site.owner, site.attribute, 0.0)
        changes.changed[offender.name] = f"p = 0, was {rate:g}, and is behind {offender.last} now"
    for name, dropout in arriving.items():
        norm = model.get_submodule(name)
        norm.__class__ = _WITH[type(norm)]
        norm.moved_dropout = dropout.train(norm.training)
    return changes


def _fitting(dropout: nn.Module | None, norm: nn.Module, rate: float) -> nn.Module:
    """A dropout of the same kind where the new place has the shape for it, else of single units."""
    if isinstance(dropout, nn.Dropout | Dropout) or type(dropout) is _CHANNELS.get(type(norm)):
        return copy.deepcopy(dropout) if dropout is not None else nn.Dropout(rate)
    return nn.Dropout(rate)
