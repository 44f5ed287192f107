"""The inputs of a BatchNorm with the noise on and off: means and variances, with the errors of what follows from them.

Sums are kept for groups of examples. A statistic that is a smooth function of means has as its standard error the
spread of its linearised value over the groups (delta method), so that values of one example, however many positions
it has, count as one.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

_GROUPS = 32  # of the examples of one batch
_ALIVE = 1e-4  # a channel's variance, relative to the median channel's, below which it says nothing
OFF, ON, EXCESS = 0, 2, 4  # columns: mean and mean square without noise, the same with noise, variance of the noise


class Estimate(NamedTuple):
    """A statistic of every channel, and how each group of examples pulls at it.

    Attributes:
        value: ``[channels]``.
        pull: ``[groups, channels]``, with sum 0 and the square root of the sum of squares as standard error.
    """

    value: Tensor
    pull: Tensor

    @property
    def error(self) -> Tensor:
        """Standard errors, ``[channels]``."""
        groups = len(self.pull)
        if groups < 2:
            return torch.full_like(self.value, math.nan)
        return (self.pull.square().sum(0) * groups / (groups - 1)).sqrt()

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.value - other.value, self.pull - other.pull)

    def only(self, channels: Tensor) -> Estimate:
        """Some of the channels."""
        return Estimate(self.value[channels], self.pull[:, channels])

    def mean(self) -> tuple[float, float]:
        """The mean over the channels and its standard error, which knows that channels depend on each other."""
        one = Estimate(self.value.mean(0, keepdim=True), self.pull.mean(1, keepdim=True))
        return float(one.value), float(one.error)


class Sums(NamedTuple):
    """What is kept of the input of a BatchNorm in one call.

    Attributes:
        table: sums of values and of their squares, ``[N, 2, channels]``, less a shift.
        positions: how many values of a channel an example has.
        shape: of the input.
    """

    table: Tensor
    positions: int
    shape: tuple[int, ...]


class Inputs:
    """Sums of the inputs of one BatchNorm over groups of examples.

    Example:
        >>> import torch
        >>> from vardrop.diagnosis.statistics import Inputs
        >>> x = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        >>> inputs = Inputs()
        >>> inputs.add(x, 2 * x)
        >>> (inputs.log_variance(noise=True) - inputs.log_variance()).value.exp().round(decimals=4).tolist()
        [4.0, 4.0, 4.0]
    """

    def __init__(self) -> None:
        self.sums: list[Tensor] = []  # [groups, columns, channels]
        self.weights: list[Tensor] = []  # [groups], numbers of values of a channel
        self.shift: Tensor | None = None  # [channels]; sums are of values less this, which keeps their digits
        self.examples = 0

    def add(self, off: Tensor, on: Tensor, excess: Tensor | None = None) -> None:
        """Add what one batch gave.

        Args:
            off: the input without noise, ``[N, channels, ...]``.
            on: the same with noise.
            excess: the variance that noise has by theory, of the shape of ``off``; zeros if None.
        """
        self.add_sums(self.sums_of(off), self.sums_of(on), None if excess is None else over_positions(excess))

    def sums_of(self, x: Tensor) -> Sums:
        """What is kept of one input, ``[N, channels, ...]``; the first one must be without noise."""
        flat = _flat(x)
        if self.shift is None:
            self.shift = flat.mean((0, 2))
        flat = flat - self.shift[:, None].to(flat)
        table = torch.stack([flat.sum(2), flat.square().sum(2)], 1).cpu().double()
        return Sums(table, flat.shape[2], tuple(x.shape))

    def add_sums(self, off: Sums, on: Sums, excess: Tensor | None = None) -> None:
        """Add the sums of one batch.

        Args:
            off: without noise.
            on: with noise.
            excess: sums over the positions of the variance that noise has by theory, ``[N, channels]``.
        """
        theory = torch.zeros_like(off.table[:, 0]) if excess is None else excess
        table = torch.cat([off.table, on.table, theory[:, None]], 1)  # [N, columns, channels]
        for part in table.tensor_split(min(_GROUPS, len(table))):
            self.sums.append(part.sum(0))
            self.weights.append(torch.tensor(float(len(part) * off.positions), dtype=torch.float64))
        self.examples += len(table)

    @property
    def count(self) -> float:
        """How many values of a channel there are."""
        return float(sum(self.weights))

    def _means(self) -> tuple[Tensor, Tensor]:
        """The means of the columns, ``[columns, channels]``, and how each group pulls at them."""
        sums, weights = torch.stack(self.sums), torch.stack(self.weights)
        means = sums.sum(0) / weights.sum()
        return means, (sums - weights[:, None, None] * means) / weights.sum()

    def mean(self, noise: bool = False) -> Tensor:
        """The means of the channels."""
        means, _ = self._means()
        center = means[ON if noise else OFF]
        return center if self.shift is None else center + self.shift.cpu().double()

    def variance(self, noise: bool = False) -> Tensor:
        """The variances of the channels."""
        return self._variance(ON if noise else OFF).value

    def log_variance(self, noise: bool = False) -> Estimate:
        """The logarithms of the variances of the channels."""
        return _log(self._variance(ON if noise else OFF))

    def log_theory(self, alpha: float, direct: bool) -> Estimate:
        r"""The logarithm of the variance that the noise should give: :math:`\sigma^2 + \alpha E[\ldots]`.

        Args:
            alpha: variance of the noise, relative; p / (1 - p).
            direct: whether the noise multiplies the input itself, so that its variance is :math:`\alpha E[a^2]`; else
                it is :math:`\alpha` times what was added as ``excess``.
        """
        clean = self._variance(OFF)
        means, pulls = self._means()
        if not direct:
            return _log(Estimate(clean.value + alpha * means[EXCESS], clean.pull + alpha * pulls[:, EXCESS]))
        center = self.mean()
        value = clean.value + alpha * (clean.value + center.square())
        return _log(Estimate(value, (1 + alpha) * clean.pull + 2 * alpha * center * pulls[:, OFF]))

    def alive(self) -> Tensor:
        """Which channels vary at all without noise, ``[channels]``."""
        variance = self.variance()
        least = _ALIVE * variance.median()
        noise = self.variance(noise=True)
        return (variance > least) & (variance > 1e-10 * self.mean().square()) & (noise > 0) & noise.isfinite()

    def _variance(self, column: int) -> Estimate:
        means, pulls = self._means()
        first, second = means[column], means[column + 1]
        value = (second - first.square()).clamp_min(0.0)
        return Estimate(value, pulls[:, column + 1] - 2 * first * pulls[:, column])


def _log(estimate: Estimate) -> Estimate:
    return Estimate(estimate.value.log(), estimate.pull / estimate.value)


def _flat(x: Tensor) -> Tensor:
    """``[N, channels, positions]`` in at least single precision."""
    x = x.detach()
    return x.to(torch.promote_types(x.dtype, torch.float32)).reshape(x.shape[0], x.shape[1], -1)


def over_positions(x: Tensor) -> Tensor:
    """Sums over all but the first two axes, ``[N, channels]``."""
    return _flat(x).sum(2).cpu().double()
