"""Dropout rates: fixed, scheduled and learned, one type for every layer.

A rate is a number, a function of the step (a schedule), or :func:`learned`. A module keeps it in a 0-dim buffer, so
that a compiled model sees new values without being compiled again, and its ``state_dict`` has it.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vardrop.schedules import Schedule, checked_rate, cosine, early, late, linear, steps

__all__ = ["Learned", "Rate", "RateScheduler", "Rated", "cosine", "early", "late", "learned", "linear", "steps"]


@dataclass(frozen=True)
class Learned:
    """A rate that is a parameter, made by :func:`learned`."""

    initial: float = 0.5

    def __repr__(self) -> str:
        return f"learned({self.initial:g})"


Rate = float | Schedule | Learned


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
    value = checked_rate(initial, "rates.learned", one=False)
    if value == 0:
        raise ValueError("vardrop.rates.learned: initial must be above 0, where a logit is finite, got 0")
    return Learned(value)


def _logit(p: float) -> float:
    return math.log(p) - math.log1p(-p)


# ---------------------------------------------------------------------------------------------------------- modules


class Rated(nn.Module):
    """A module with a dropout rate p: a number, a schedule, or learned.

    A number or the value of a schedule is the buffer ``rate_value``, float32 whatever type the module is cast to; a
    learned rate is the parameter ``rate_logit``, ``[1]``, as FSDP wants no fewer dimensions. A checkpoint without
    either loads too, and leaves the rate alone, so that the layer can take the place of one from ``torch.nn``. On the
    meta device, where tensors hold nothing, the number is kept, and comes back with ``to_empty``.

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
    _number = 0.5  # the rate that was last set, for tensors that hold nothing

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__()
        self.schedule = p if callable(p) else None
        if isinstance(p, Learned):
            if not self.learnable:
                raise TypeError(
                    f"vardrop.{type(self).__name__}: p must be a number or a schedule, got {p!r}; no gradient reaches "
                    "the rate of this noise: use GaussianDropout or ConcreteDropout to learn one"
                )
            self._number = p.initial
            self.rate_logit = nn.Parameter(torch.tensor([_logit(p.initial)]))
        else:
            self._number = self._check(p(0) if callable(p) else p)
            self.register_buffer("rate_value", torch.tensor(self._number))

    def _check(self, p: object) -> float:
        return checked_rate(p, type(self).__name__, self.one)

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
        rate = self.rate.detach()
        return self._number if rate.is_meta else float(rate)

    @p.setter
    def p(self, value: float) -> None:
        self.set_rate_(value)

    def set_rate_(self, p: float) -> None:
        """Set the rate in place: buffers and parameters stay the same tensors."""
        value = self._check(p)
        self._number = learned(value).initial if self.is_learned else value
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The rate as it was last set, or was made with: what a layer needs that was made on the meta device."""
        if self.is_learned:
            self.rate_logit.fill_(_logit(self._number))
        else:
            self.rate_value.fill_(self._number)  # type: ignore[operator]

    def extra_repr(self) -> str:
        if self.schedule is not None:
            return f"p={self.p:g}, schedule={getattr(self.schedule, '__name__', repr(self.schedule))}"
        return f"p={self.p:g}, learned" if self.is_learned else f"p={self.p:g}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Casts move a fixed rate and leave its digits alone: bfloat16 has no 0.1."""
        value, before = self._buffers.get("rate_value"), self._held().detach()
        super()._apply(fn, recurse)
        if before.is_meta and not self._held().is_meta:
            self.reset_parameters()
        elif self._held().is_meta and not before.is_meta and before.numel() == 1:  # a shard may hold nothing
            self._number = float(torch.sigmoid(before) if self.is_learned else before)
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
            if self._held().is_meta and args[0].get("assign_to_params_buffers"):  # the others get the checkpoint's
                device = next((x.device for x in state_dict.values() if isinstance(x, Tensor)), "cpu")
                self.to_empty(device=device, recurse=False)

    def _held(self) -> Tensor:
        """The tensor that holds the rate."""
        return self.rate_logit if self.is_learned else self.rate_value  # type: ignore[return-value]


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
        TypeError: if the schedule is no function.

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
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"vardrop.RateScheduler: schedule must be a function of the step, got {schedule!r}; write "
                "rates.linear(...), or lambda step: 0.1 for one rate"
            )
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
