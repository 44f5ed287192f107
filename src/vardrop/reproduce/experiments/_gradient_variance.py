"""The noise of minibatch gradients around the full-batch gradient, for the layers at both ends of a trained network.

For weight samples this is eq. 5: with g_i the gradient of one example, the variance is Var[g_i] / M, and (1 - 1/M)
Cov[g_i, g_j] more where all examples of a minibatch share one sample. The mean is known from the local trick, whose
gradient has the same, so E[g_i²] and E[g_i g_j] are left, and all examples tell of both. That matters in a trained
network, where few examples with large gradients make most of either: drawing some of them is far too noisy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
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


class Products(NamedTuple):
    """Mean products of the gradients of two examples, averaged over entries."""

    same: float  # E[g_i²]
    other: float  # E[g_i g_j] of two examples under one weight sample


def products(
    network: nn.Module, data: Pair, together: int, repeats: int, generator: torch.Generator
) -> dict[Key, Products]:
    """Mean products of single examples' gradients with one weight sample for several of them, for both ends.

    With w = θ (1 + √α ε), inputs x and gradients δ at the outputs, an example's gradient is δ x ∂w/∂θ entry by entry,
    so the squares of all examples sum to (Σ δ² x²) (∂w/∂θ)². Their expectation does not depend on how many examples
    share a weight sample.

    Args:
        network: trained, of linear layers with a rate for every weight (type B).
        data: the training set.
        together: examples that share a weight sample.
        repeats: passes over the data.
        generator: of the examples; the noise comes from torch's default one.
    """
    where = ends(network)
    passing: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        network.get_submodule(name).register_forward_hook(
            lambda _, inputs, outputs, layer=layer: passing.update({layer: (inputs[0].detach(), outputs)})
        )
        for layer, name in where._asdict().items()
    ]
    total: dict[Key, Tensor] = {}
    count = repeats * (len(data[0]) // together)
    training = network.training
    network.eval()  # as plain layers, with the samples for weights
    for _ in range(repeats):
        for x, y in minibatches(data, together, generator):
            weights, derivatives = _drawn(network, where)
            loss = F.cross_entropy(functional_call(network, weights, x), y, reduction="sum")
            gradients = torch.autograd.grad(loss, [passing[layer][1] for layer in where._fields])
            for layer, delta in zip(where._fields, gradients, strict=True):
                inputs = passing[layer][0]
                squares, summed = delta.square().T @ inputs.square(), (delta.T @ inputs).square()
                for name, derivative in derivatives[layer].items():
                    found = torch.stack(
                        [(part * derivative.square()).mean(dtype=torch.float64) for part in (squares, summed)]
                    )
                    total[layer, name] = total.get((layer, name), 0) + found
    for hook in hooks:
        hook.remove()
    network.train(training)
    return {
        key: Products(square / (count * together), (summed - square) / (count * together * (together - 1)))
        for key, (square, summed) in ((key, found.tolist()) for key, found in total.items())
    }


@torch.no_grad()
def _drawn(network: nn.Module, where: Ends) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """A sample of all weights, by the names of the parameters; for both ends, its derivatives by θ and by log α."""
    samples = {}
    derivatives = {}
    layers = {name: layer for layer, name in where._asdict().items()}
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear):
            noise = torch.randn_like(module.weight) * module.get_parameter("weight_log_alpha").div(2).exp()
            samples[f"{name}.weight"] = module.weight * (1 + noise)
            if name in layers:
                derivatives[layers[name]] = {"theta": 1 + noise, "log alpha": module.weight * noise / 2}
    return samples, derivatives


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
