"""A network together with its likelihood: what is trained, wrapped for devices, and evaluated."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NETWORK = "network."  # the prefix of the network's parameters; a model file has them without


def wide(x: Tensor) -> Tensor:
    """Outputs of mixed precision in single precision, for their likelihood."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Categorical(nn.Module):
    """Classes, by softmax."""

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        """-log p(y | outputs) for every example; outputs ``[N, classes]``, y ``[N]``."""
        return F.cross_entropy(wide(outputs), y, reduction="none")

    def predict(self, outputs: Tensor) -> Tensor:
        """The most probable class, ``[N]``."""
        return outputs.argmax(-1)

    def mistake(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The share of wrong classes."""
        return (self.predict(outputs) != y).double().mean()


class Gaussian(nn.Module):
    r"""Real numbers, with Gaussian noise of learned precision τ.

    .. math:: -\log p(y | f) = \tfrac12 (\tau (t - f)^2 - \log\tau + \log 2\pi) + \log s, \qquad t = (y - m) / s

    The network sees targets standardised by the mean m and standard deviation s of the training rows; predictions and
    likelihoods are in the units of the data.

    Args:
        y: the training targets, ``[N]``.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, y: Tensor) -> None:
        super().__init__()
        std = y.float().std(correction=0)
        self.register_buffer("mean", y.float().mean())
        self.register_buffer("std", torch.where(std > 0, std, torch.ones_like(std)))
        self.log_precision = nn.Parameter(torch.zeros(1))  # FSDP shards no scalars

    def forward(self, outputs: Tensor, y: Tensor) -> Tensor:
        """-log p(y | outputs) for every example; outputs ``[N, 1]``, y ``[N]``."""
        error = (y - self.mean) / self.std - wide(outputs.squeeze(-1))
        halved = self.log_precision.exp() * error * error - self.log_precision + math.log(2 * math.pi)
        return 0.5 * halved + self.std.log()

    def predict(self, outputs: Tensor) -> Tensor:
        """The expected y, ``[N]``."""
        return wide(outputs.squeeze(-1)) * self.std + self.mean

    def mistake(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The root of the mean squared error."""
        return (self.predict(outputs) - y).double().square().mean().sqrt()


class Task(nn.Module):
    """Both in one module, so that whatever wraps it sees every parameter and every forward pass.

    Args:
        network: gives ``[N, classes]``, or ``[N, 1]`` for a number.
        likelihood: :class:`Categorical` or :class:`Gaussian`.
    """

    def __init__(self, network: nn.Module, likelihood: Categorical | Gaussian) -> None:
        super().__init__()
        self.network = network
        self.likelihood = likelihood

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        """The network's outputs, and the negative log-likelihood of every example."""
        outputs = self.network(x)
        return outputs, self.likelihood(outputs, y)


def measure(kind: str) -> str:
    """What a task of this kind is judged by: ``"error"`` or ``"rmse"``."""
    return "rmse" if kind == "regression" else "error"
