"""Dropout rates: fixed, scheduled and learned, one type for every layer.

A rate is a number, a function of the step (a schedule), or :func:`learned`. A module keeps it in a 0-dim buffer, so
that a compiled model sees new values without being compiled again, and its ``state_dict`` has it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

__all__ = ["Learned", "Rate", "RateScheduler", "Rated", "cosine", "early", "late", "learned", "linear", "steps"]

Schedule = Callable[[int], float]


@dataclass(frozen=True)
class Learned:
    """A rate that is a parameter, made by :func:`learned`."""

    initial: float = 0.5

    def __repr__(self) -> str:
        return f"learned({self.initial:g})"


Rate = float | Schedule | Learned


def _checked(p: object, owner: str, one: bool = True) -> float:
    """``p`` as a float in [0, 1], or [0, 1) if ``one`` is not allowed."""
    number = isinstance(p, Real) or (isinstance(p, Tensor) and p.ndim == 0)
    if number and not isinstance(p, bool):
        value = float(p)  # type: ignore[arg-type]
        if 0 <= value <= 1 and (one or value < 1):
            return value
    raise ValueError(f"vardrop.{owner}: p must be a dropout rate in [0, 1{']' if one else ')'}, got {p!r}")


# ------------------------------------------------------------------------------------------------------- schedules


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
    return _Ramp(_checked(start, owner), _checked(end, owner), steps, delay, shape)


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
    return _Steps(tuple(_checked(value, "rates.steps") for value in values), tuple(at))


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


def learned(initial: float = 0.5) -> Learned:
    """A rate that is learned: a parameter in its logit, which is the log α of Gaussian noise, α = p / (1 − p).

    Only layers whose noise lets a gradient through to the rate take one, and only an objective with a divergence or a
    regulariser keeps it from falling to 0.

    Args:
        initial: the rate to start from, strictly between 0 and 1.

    Raises:
        ValueError: for any other ``initial``.

    Example:
        >>> from vardrop import rates
        >>> rates.learned(0.1)
        learned(0.1)
    """
    value = _checked(initial, "rates.learned", one=False)
    if value == 0:
        raise ValueError("vardrop.rates.learned: initial must be above 0, where a logit is finite, got 0")
    return Learned(value)


# ---------------------------------------------------------------------------------------------------------- modules


class Rated(nn.Module):
    """A module with a dropout rate p: a number, a schedule, or learned.

    A number or the value of a schedule is the buffer ``rate_value``, float32 whatever type the module is cast to; a
    learned rate is the parameter ``rate_logit``, ``[1]``, as FSDP wants no fewer dimensions. A checkpoint without
    either loads too, and leaves the rate alone, so that the layer can take the place of one from ``torch.nn``.

    Subclasses say what they can do: ``learnable``, whether a gradient reaches the rate, and ``one``, whether p = 1 has
    a meaning.

    Args:
        p: the rate; see :data:`vardrop.rates.Rate`.

    Attributes:
        schedule: the function of the step, or None.

    Raises:
        ValueError: if p, or the first value of a schedule, is no rate in [0, 1].
        TypeError: for a learned rate where it could not learn.

    Example:
        >>> from vardrop import rates
        >>> module = rates.Rated(rates.linear(0.0, 0.1, steps=10))
        >>> scheduler = rates.RateScheduler(module)
        >>> for _ in range(5): scheduler.step()
        >>> module.rate
        tensor(0.0500)
    """

    learnable: ClassVar[bool] = False
    one: ClassVar[bool] = True
    schedule: Schedule | None

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__()
        self.schedule = p if callable(p) else None
        if isinstance(p, Learned):
            if not self.learnable:
                raise TypeError(
                    f"vardrop.{type(self).__name__}: p must be a number or a schedule, got {p!r}; no gradient reaches "
                    "the rate of this noise: use GaussianDropout or ConcreteDropout to learn one"
                )
            self.rate_logit = nn.Parameter(torch.tensor([math.log(p.initial) - math.log1p(-p.initial)]))
        else:
            self.register_buffer("rate_value", torch.tensor(self._check(p(0) if callable(p) else p)))

    def _check(self, p: object) -> float:
        return _checked(p, type(self).__name__, self.one)

    @property
    def is_learned(self) -> bool:
        """Whether the rate is a parameter."""
        return "rate_logit" in self._parameters

    @property
    def rate(self) -> Tensor:
        """The rate now, 0-dim; gradients flow to it if it is learned."""
        return torch.sigmoid(self.logit()) if self.is_learned else self.rate_value  # type: ignore[return-value]

    def logit(self) -> Tensor:
        """The logit of the rate, which is the log α of Gaussian noise, 0-dim."""
        return self.rate_logit.squeeze(0) if self.is_learned else torch.logit(self.rate_value)  # type: ignore[arg-type]

    def kl(self) -> Tensor | None:
        """The divergence of the noise from its prior, a scalar in nats; None for noise that has none."""
        return None

    @property
    def p(self) -> float:
        """The rate now as a number. Setting it sets the rate in place; a schedule goes on from its next step."""
        return float(self.rate.detach())

    @p.setter
    def p(self, value: float) -> None:
        self.set_rate_(value)

    def set_rate_(self, p: float) -> None:
        """Set the rate in place: buffers and parameters stay the same tensors."""
        value = self._check(p)
        with torch.no_grad():
            if self.is_learned:
                self.rate_logit.fill_(torch.logit(torch.tensor(learned(value).initial, dtype=torch.float64)).item())
            else:
                self.rate_value.fill_(value)  # type: ignore[operator]

    def extra_repr(self) -> str:
        if self.schedule is not None:
            return f"p={self.p:g}, schedule={getattr(self.schedule, '__name__', repr(self.schedule))}"
        return f"p={self.p:g}, learned" if self.is_learned else f"p={self.p:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Casts move a fixed rate and leave its digits alone: bfloat16 has no 0.1."""
        value = self._buffers.get("rate_value")
        super()._apply(fn, recurse)
        if value is not None:
            moved = self._buffers["rate_value"]
            if moved is not None and moved.dtype != value.dtype:
                self._buffers["rate_value"] = value.to(moved.device)
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        keys = {f"{prefix}rate_value", f"{prefix}rate_logit"}
        missing = args[2]
        if keys.isdisjoint(state_dict):
            missing[:] = [key for key in missing if key not in keys]


class RateScheduler:
    """Sets the scheduled rates of a model step by step, with the habits of ``torch.optim.lr_scheduler``.

    Making one sets the rates of step 0; call :meth:`step` after every step of the optimiser, or after every epoch if
    the schedules count epochs.

    Args:
        model: a module that has layers with rates.
        schedule: a function of the step for all chosen layers; None for the schedule that every layer was made with.
        where: a glob of module names (``"encoder.*"``); None for all.
        last_epoch: the step to go on from, -1 for the beginning.

    Attributes:
        last_epoch: the step whose rates are set.

    Raises:
        ValueError: if no layer has a rate to schedule, or a schedule gives a value outside [0, 1].

    Example:
        >>> from vardrop import rates
        >>> net = rates.Rated(rates.linear(0.0, 0.2, steps=4))
        >>> scheduler = rates.RateScheduler(net)
        >>> for _ in range(3):
        ...     scheduler.step()
        >>> scheduler.last_epoch, {name: round(p, 3) for name, p in scheduler.get_last_rate().items()}
        (3, {'': 0.15})
    """

    def __init__(
        self, model: nn.Module, schedule: Schedule | None = None, where: str | None = None, last_epoch: int = -1
    ) -> None:
        rated = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, Rated) and (where is None or fnmatch.fnmatchcase(name, where))
        }
        self.schedules: dict[str, tuple[Rated, Schedule]] = {}
        for name, module in rated.items():
            chosen = schedule or module.schedule
            if chosen is not None and not module.is_learned:
                self.schedules[name] = module, chosen
        if not self.schedules:
            found = ", ".join(f"{name or 'the model'}: {module.extra_repr()}" for name, module in rated.items())
            raise ValueError(
                "vardrop.RateScheduler: some layer must have a scheduled rate, got "
                f"{found or 'a model without vardrop layers' if where is None else f'none that matches {where!r}'}; "
                "give layers p=rates.linear(...), or pass schedule="
            )
        self.last_epoch = last_epoch
        self.step()

    def step(self) -> None:
        """Set the rates of the next step."""
        self._go_to(self.last_epoch + 1)

    def _go_to(self, step: int) -> None:
        values = [(module, module._check(schedule(step))) for module, schedule in self.schedules.values()]
        for module, value in values:  # all or none
            module.set_rate_(value)
        self.last_epoch = step

    def get_last_rate(self) -> dict[str, float]:
        """Name of the layer -> the rate that the last step set."""
        return {name: module.p for name, (module, _) in self.schedules.items()}

    def state_dict(self) -> dict[str, Any]:
        """The step; schedules are code, and belong to the model that is built again."""
        return {"last_epoch": self.last_epoch}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state_dict` left off, and set the rates of that step."""
        step = state.get("last_epoch")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(
                f"vardrop.RateScheduler: state must have 'last_epoch', a whole number of 0 or more, got {state!r}"
            )
        self._go_to(step)
