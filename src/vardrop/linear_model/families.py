"""Generalised linear models by their log-partition function A, with the derivatives that dropout's penalty needs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Family:
    r"""A model :math:`\log p(y | x) = y\,\eta - A(\eta) + c(y)` with :math:`\eta = x \cdot \beta + b`.

    Attributes:
        name: what it is called in messages.
        log_partition: A, elementwise.
        derivatives: A'', A''' and A'''', elementwise.
    """

    name: str
    log_partition: Function
    derivatives: tuple[Function, Function, Function]


def _logistic2(eta: Tensor) -> Tensor:
    s = eta.sigmoid()
    return s * (1 - s)


def _logistic3(eta: Tensor) -> Tensor:
    return _logistic2(eta) * (1 - 2 * eta.sigmoid())


def _logistic4(eta: Tensor) -> Tensor:
    second = _logistic2(eta)
    return second * (1 - 6 * second)


LINEAR = Family("linear", lambda eta: 0.5 * eta * eta, (torch.ones_like, torch.zeros_like, torch.zeros_like))
LOGISTIC = Family("logistic", F.softplus, (_logistic2, _logistic3, _logistic4))
POISSON = Family("Poisson", torch.exp, (torch.exp, torch.exp, torch.exp))
