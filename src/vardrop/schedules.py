"""Schedules: rates as functions of the step, from 0 to 1."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real

from torch import Tensor

__all__ = ["Schedule", "cosine", "early", "late", "linear", "steps"]

Schedule = Callable[[int], float]


def checked_rate(p: object, owner: str, one: bool = True) -> float:
    """``p`` as a float in [0, 1], or [0, 1) if ``one`` is not allowed."""
    number = isinstance(p, Real) or (isinstance(p, Tensor) and p.ndim == 0)
    if number and not isinstance(p, bool):
        value = float(p)  # type: ignore[arg-type]
        if 0 <= value <= 1 and (one or value < 1):
            return value
    raise ValueError(f"vardrop.{owner}: p must be a dropout rate in [0, 1{']' if one else ')'}, got {p!r}")


@dataclass(frozen=True)
class _Ramp:
    start: float
    end: float
    steps: int
    delay: int
    shape: str

    def __call__(self, step: int) -> float:
        if step <= self.delay:
            return self.start
        done = min(1.0, (step - self.delay) / self.steps)
        if done == 1.0:
            return self.end
        if self.shape == "cosine":
            done = (1 - math.cos(math.pi * done)) / 2
        return self.start + (self.end - self.start) * done

    def __repr__(self) -> str:
        delay = f", delay={self.delay}" if self.delay else ""
        return f"{self.shape}({self.start:g}, {self.end:g}, steps={self.steps}{delay})"


@dataclass(frozen=True)
class _Steps:
    values: tuple[float, ...]
    milestones: tuple[int, ...]

    def __call__(self, step: int) -> float:
        return self.values[sum(step >= milestone for milestone in self.milestones)]

    def __repr__(self) -> str:
        return f"steps({list(self.values)}, at={list(self.milestones)})"


def _ramp(shape: str, start: float, end: float, steps: int, delay: int) -> Schedule:
    owner = f"rates.{shape}"
    if steps < 1 or delay < 0:
        raise ValueError(
            f"vardrop.{owner}: a ramp must take 1 step or more after a delay of 0 or more, got {steps=}, {delay=}"
        )
    return _Ramp(checked_rate(start, owner), checked_rate(end, owner), steps, delay, shape)


def linear(start: float, end: float, steps: int, delay: int = 0) -> Schedule:
    r"""A rate that changes linearly, then stays: the schedule of DropBlock (Ghiasi et al. 2018) with start 0.

    .. math:: p(t) = start + (end - start) \min(1, \max(0, t - delay) / steps)

    Args:
        start: rate at first.
        end: rate from step ``delay + steps`` on.
        steps: length of the ramp.
        delay: steps before it begins.

    Returns:
        A function of the step that can be pickled.

    Raises:
        ValueError: for rates outside [0, 1], fewer than 1 step, or a negative delay.

    Example:
        >>> from vardrop import rates
        >>> schedule = rates.linear(0.0, 0.1, steps=10)
        >>> [round(schedule(t), 3) for t in (0, 5, 10, 20)]
        [0.0, 0.05, 0.1, 0.1]
    """
    return _ramp("linear", start, end, steps, delay)


def cosine(start: float, end: float, steps: int, delay: int = 0) -> Schedule:
    r"""A rate that changes along half a cosine, then stays.

    .. math:: p(t) = start + (end - start) (1 - \cos(\pi s)) / 2, \quad s = \min(1, \max(0, t - delay) / steps)

    Args:
        start: rate at first.
        end: rate from step ``delay + steps`` on.
        steps: length of the ramp.
        delay: steps before it begins.

    Returns:
        A function of the step that can be pickled.

    Raises:
        ValueError: for rates outside [0, 1], fewer than 1 step, or a negative delay.

    Example:
        >>> from vardrop import rates
        >>> schedule = rates.cosine(0.2, 0.0, steps=4)
        >>> [round(schedule(t), 3) for t in range(5)]
        [0.2, 0.171, 0.1, 0.029, 0.0]
    """
    return _ramp("cosine", start, end, steps, delay)


def steps(values: Sequence[float], at: Sequence[int]) -> Schedule:
    """A rate that jumps: ``values[0]`` before step ``at[0]``, ``values[1]`` from there on, and so forth.

    Args:
        values: the rates.
        at: the steps at which the next one begins, growing; one fewer than ``values``.

    Returns:
        A function of the step that can be pickled.

    Raises:
        ValueError: for rates outside [0, 1], or steps that do not fit them.

    Example:
        >>> from vardrop import rates
        >>> schedule = rates.steps([0.3, 0.2, 0.1], at=[10, 20])
        >>> [schedule(t) for t in (0, 9, 10, 20, 99)]
        [0.3, 0.3, 0.2, 0.1, 0.1]
    """
    if len(values) != len(at) + 1 or list(at) != sorted(set(at)):
        raise ValueError(
            f"vardrop.rates.steps: at must grow and have one entry fewer than values, got at={list(at)} with "
            f"{len(values)} values"
        )
    return _Steps(tuple(checked_rate(value, "rates.steps") for value in values), tuple(at))


def early(p: float, until: int) -> Schedule:
    """Dropout in the beginning only: ``p`` before step ``until``, 0 from there on (early dropout, Liu et al. 2023).

    Args:
        p: the rate.
        until: the first step without dropout.

    Returns:
        A function of the step that can be pickled.

    Raises:
        ValueError: for a rate outside [0, 1].

    Example:
        >>> from vardrop import rates
        >>> [rates.early(0.1, until=5)(t) for t in (0, 4, 5)]
        [0.1, 0.1, 0.0]
    """
    return steps([p, 0.0], at=[until])


def late(p: float, after: int) -> Schedule:
    """Dropout at the end only: 0 before step ``after``, ``p`` from there on (late dropout, Liu et al. 2023).

    Args:
        p: the rate.
        after: the first step with dropout.

    Returns:
        A function of the step that can be pickled.

    Raises:
        ValueError: for a rate outside [0, 1].

    Example:
        >>> from vardrop import rates
        >>> [rates.late(0.1, after=5)(t) for t in (0, 4, 5)]
        [0.0, 0.0, 0.1]
    """
    return steps([0.0, p], at=[after])
