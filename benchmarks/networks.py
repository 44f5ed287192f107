"""The two networks that everything is measured on, and one training step of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NUM_DATA = 60_000  # the training examples that a KL divergence would be spread over


def mlp(inputs: int = 784, width: int = 1000, classes: int = 10) -> nn.Sequential:
    """The ReLU network of the paper's experiments: three hidden layers."""
    sizes = [inputs, width, width, width]
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(sizes):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, classes))


def cnn() -> nn.Sequential:
    """A small convolutional network on 3 x 32 x 32: two strided convolutions, three dense layers."""
    return nn.Sequential(
        nn.Conv2d(3, 32, 5, stride=2, padding=2),
        nn.Softplus(),
        nn.Conv2d(32, 64, 5, stride=2, padding=2),
        nn.Softplus(),
        nn.Flatten(),
        nn.Linear(64 * 8 * 8, 128),
        nn.Softplus(),
        nn.Linear(128, 128),
        nn.Softplus(),
        nn.Linear(128, 10),
    )


def rebuilt(net: nn.Sequential, new: Callable[[nn.Module], list[nn.Module]]) -> nn.Sequential:
    """The network with what ``new`` returns in place of every Linear and Conv2d."""
    layers: list[nn.Module] = []
    for layer in net:
        layers += new(layer) if isinstance(layer, nn.Linear | nn.Conv2d) else [layer]
    return nn.Sequential(*layers)


@dataclass(frozen=True)
class Workload:
    """A network and the size of its minibatch."""

    network: Callable[[], nn.Sequential]
    examples: int
    shape: tuple[int, ...]  # of one example

    def data(self, examples: int | None = None) -> tuple[Tensor, Tensor]:
        """Random inputs and labels: the time of a step does not depend on what is in them."""
        generator = torch.Generator().manual_seed(0)
        m = examples or self.examples
        return torch.randn(m, *self.shape, generator=generator), torch.randint(10, (m,), generator=generator)


WORKLOADS = {
    "mlp-128": Workload(mlp, 128, (784,)),
    "mlp-1000": Workload(mlp, 1000, (784,)),
    "cnn-100": Workload(cnn, 100, (3, 32, 32)),
}


def training_step(
    net: nn.Module, x: Tensor, y: Tensor, divergence: Callable[[nn.Module], Tensor] | None = None
) -> Callable[[], None]:
    """A function that clears the gradients, runs forward and backward, and leaves the optimiser out.

    Args:
        net: any classifier, in training mode.
        x: inputs.
        y: labels.
        divergence: the KL divergence of the network, added to the loss; None to leave it out.
    """

    def step() -> None:
        net.zero_grad()
        loss = F.cross_entropy(net(x), y)
        if divergence is not None:
            loss = loss + divergence(net) / NUM_DATA
        loss.backward()

    return step
