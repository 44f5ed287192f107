"""The noise of minibatch gradients around the full-batch gradient, for the layers at both ends of a trained network.

A weight sample for every data point takes as long as M minibatches of one, and that is all it is: the examples of a
minibatch are independent, so the variance is Var[g_i] / M with g_i the gradient of one example and one weight sample
(eq. 5 with Cov = 0). Its mean is known from the local trick, whose gradient has the same mean, so only E[g_i²] is left.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.gradient import in_training
from vardrop.training import Averages

Pair = tuple[Tensor, Tensor]  # examples and labels
Key = tuple[str, str]  # layer and "theta" or "log alpha"


class Ends(NamedTuple):
    """The layers at both ends of a network, by the names of their modules."""

    top: str
    bottom: str


def ends(network: nn.Module) -> Ends:
    """The last and the first linear layer."""
    linear = [name for name, module in network.named_modules() if isinstance(module, nn.Linear)]
    return Ends(linear[-1], linear[0])


class Moments:
    """Mean and variance of gradients that arrive one after the other, in double precision."""

    def __init__(self, parameters: list[Tensor]) -> None:
        self.mean = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        self.spread = [torch.zeros_like(mean) for mean in self.mean]
        self.count = 0

    def add(self, gradients: list[Tensor]) -> None:
        self.count += 1
        for mean, spread, gradient in zip(self.mean, self.spread, gradients, strict=True):
            change = gradient.double() - mean
            mean.add_(change, alpha=1 / self.count)
            spread.addcmul_(change, gradient.double() - mean)

    @property
    def variances(self) -> list[float]:
        """Averaged over the entries of a parameter."""
        return [spread.mean().item() / (self.count - 1) for spread in self.spread]


def minibatches(data: Pair, size: int, generator: torch.Generator) -> Iterator[Pair]:
    """Every example once, in minibatches of one size; what is left over at the end is left out."""
    x, y = data
    rows = torch.randperm(len(x), generator=generator).to(x.device)
    for some in rows[: len(x) // size * size].split(size):
        yield x[some], y[some]


def parameters_at(network: nn.Module, where: Ends) -> dict[Key, nn.Parameter]:
    """Layer and ``"theta"`` or ``"log alpha"`` -> the parameter."""
    found = {}
    for layer, module in where._asdict().items():
        for name, parameter in network.get_submodule(module).named_parameters():
            if parameter.requires_grad and name != "bias":
                found[layer, "theta" if name == "weight" else "log alpha"] = parameter
    return found


def moments(
    network: nn.Module, data: Pair, estimator: str, size: int, repeats: int, generator: torch.Generator
) -> dict[Key, tuple[float, Tensor]]:
    """Mean over entries of the variance of the minibatch gradient, and the gradients' mean, for both ends.

    The gradient is that of the mean negative log-likelihood: the divergence has the same gradient on every minibatch.

    Args:
        network: trained, with random weights.
        data: the training set.
        estimator: for :class:`vardrop.estimator`.
        size: M.
        repeats: passes over the data.
        generator: of the minibatches; the noise comes from torch's default one.
    """
    named = parameters_at(network, ends(network))
    found = Moments(list(named.values()))
    with in_training(network), vd.estimator(estimator):
        for _ in range(repeats):
            for x, y in minibatches(data, size, generator):
                loss = F.cross_entropy(network(x), y)
                gradients = torch.autograd.grad(loss, list(named.values()), materialize_grads=True, allow_unused=True)
                found.add(list(gradients))
    return {key: (v, mean) for key, v, mean in zip(named, found.variances, found.mean, strict=True)}


def single_moments(network: nn.Module, data: Pair, examples: int, generator: torch.Generator) -> dict[Key, float]:
    """E[g_i²] for the gradient of one example's loss under one weight sample, averaged over entries, for both ends.

    Examples with large gradients are few in a trained network and make most of it. They are drawn more often: three in
    four draws with a probability proportional to the squared gradient at the outputs, one in four uniformly. Each
    counts in inverse proportion to its probability, so the mean is that over the data.

    Args:
        network: trained, with random weights.
        data: the training set.
        examples: how many to draw.
        generator: of the examples; the noise comes from torch's default one.
    """
    x, y = data
    named = parameters_at(network, ends(network))
    total = dict.fromkeys(named, 0.0)
    with in_training(network):
        chances = 0.25 / len(x) + 0.75 * _output_gradients(network, data)
        for row in torch.multinomial(chances.cpu(), examples, replacement=True, generator=generator).tolist():
            with vd.estimator("per_example"):
                loss = F.cross_entropy(network(x[row : row + 1]), y[row : row + 1])
            weight = 1 / (len(x) * chances[row].item() * examples)
            for key, gradient in zip(named, torch.autograd.grad(loss, list(named.values())), strict=True):
                total[key] += weight * gradient.square().mean().item()
    return total


@torch.no_grad()
def _output_gradients(network: nn.Module, data: Pair) -> Tensor:
    """For every example the squared gradient of the loss at the outputs, from one local draw; together they are 1."""
    x, y = data
    parts = []
    for inputs, labels in zip(x.split(1000), y.split(1000), strict=True):
        outputs = network(inputs)
        parts.append((outputs.softmax(1) - F.one_hot(labels, outputs.shape[1])).square().sum(1))
    squares = torch.cat(parts).double()
    return squares / squares.sum()


def test_error(network: nn.Module, data: Pair) -> float:
    """Per cent, of the mean weights."""
    network.eval()
    with torch.no_grad():
        wrong = (network(data[0]).argmax(1) != data[1]).double().mean().item()
    network.train()
    return 100 * wrong


def train(
    network: nn.Module, kl_scale: float, data: Pair, marks: list[int], batch: int, average: float, seed: int
) -> Iterator[tuple[int, str, nn.Module]]:
    """Train with Adam on the evidence lower bound, and stop at every mark.

    There it hands out the network twice: ``(epoch, "last", network)``, and ``(epoch, "averaged", copy)`` with the
    average of the weights of all steps so far.
    """
    x, y = data
    elbo = vd.ELBO(network, num_data=len(x), kl_scale=kl_scale)
    optimizer = torch.optim.Adam(network.parameters(), fused=True)
    averages = Averages(network.parameters(), average)
    order = torch.Generator().manual_seed(seed)
    network.train()
    for epoch in range(1, max(marks) + 1):
        for rows in torch.randperm(len(x), generator=order).to(x.device).split(batch):
            loss = elbo(F.cross_entropy(network(x[rows]), y[rows]))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            averages.update()
        if epoch in marks:
            yield epoch, "last", network
            smooth = copy.deepcopy(network)
            with torch.no_grad():
                for parameter, value in zip(smooth.parameters(), averages.values, strict=True):
                    parameter.copy_(value)
            yield epoch, "averaged", smooth
