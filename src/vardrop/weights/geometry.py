"""Which axes of a weight run over the units of its layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


def spread(values: Tensor, shape: Sequence[int], axis: int, groups: int = 1) -> Tensor:
    """One value for every unit, ``[units]``, shaped to broadcast with a weight whose ``axis`` runs over the units.

    With groups (of a convolution) axis 1 counts anew in each block of axis 0, and has ``groups * shape[1]`` units.
    """
    if groups == 1 or axis != 1:
        return values.view([-1 if i == axis else 1 for i in range(len(shape))])
    rows = values.view(groups, -1).repeat_interleave(shape[0] // groups, 0)  # [shape[0], shape[1]]
    return rows.view(*rows.shape, *[1] * (len(shape) - 2))


@dataclass(frozen=True)
class Geometry:
    """Which axes of a weight run over input units and over output units.

    Args:
        shape: of the weight.
        input_axis: the axis of input units.
        output_axis: the axis of output units.
        groups: of a convolution; axis 1 of its weight then counts the units of one group only.
        padding: the row of an embedding that is a constant and no weight, if it has one.
    """

    shape: tuple[int, ...]
    input_axis: int = 1
    output_axis: int = 0
    groups: int = 1
    padding: int | None = None

    def axis(self, unit: str) -> int:
        """The axis of ``"input"`` or ``"output"`` units."""
        return self.input_axis if unit == "input" else self.output_axis

    def units(self, unit: str) -> int:
        """How many input or output units the layer has."""
        axis = self.axis(unit)
        return self.shape[axis] * (self.groups if axis == 1 else 1)

    def spread(self, values: Tensor, unit: str) -> Tensor:
        """Values for the layer ``[1]``, every unit ``[units]`` or every weight, shaped to broadcast with the weight."""
        if values.shape == torch.Size(self.shape):
            return values
        if values.numel() == 1:
            return values.view([1] * len(self.shape))
        return spread(values, self.shape, self.axis(unit), self.groups)

    def mean(self, values: Tensor, unit: str, count: int) -> Tensor:
        """Means of the weight's entries over the layer (``count`` is 1) or over each of its ``count`` units.

        A row of padding is in no mean but its own.
        """
        axis = self.axis(unit)
        if self.padding is not None and (count == 1 or axis != 0):
            values = _without_row(values, self.padding % self.shape[0])
        if count == 1:
            return values.mean().view(1)
        blocks = self.groups if axis == 1 else 1
        by_unit = values.movedim(axis, 0).flatten(1) if blocks == 1 else self._blocks(values, blocks)
        return by_unit.mean(1)

    def _blocks(self, values: Tensor, blocks: int) -> Tensor:
        """[groups * inputs of a group, the rest] of a grouped convolution's weight, [out, inputs of a group, ...]."""
        return values.unflatten(0, (blocks, -1)).movedim(2, 1).flatten(0, 1).flatten(1)

    def without_padding(self, mean: Tensor, noise: Tensor, unit: str) -> tuple[Tensor, Tensor, Geometry]:
        """The mean and the noise of a weight without the row that is a constant, and their geometry."""
        if self.padding is None:
            return mean, noise, self
        row = self.padding % self.shape[0]
        has_rows = noise.shape == mean.shape or (noise.numel() > 1 and unit == "input")
        smaller = replace(self, shape=(self.shape[0] - 1, *self.shape[1:]), padding=None)
        return _without_row(mean, row), _without_row(noise, row) if has_rows else noise, smaller


def _without_row(x: Tensor, row: int) -> Tensor:
    return x[1:] if row == 0 else torch.cat([x[:row], x[row + 1 :]])
