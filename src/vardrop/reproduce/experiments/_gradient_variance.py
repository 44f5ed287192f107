"""The noise of minibatch gradients around the full-batch gradient, for the layers at both ends of a trained network.

A weight sample for every data point is slow, but its variance follows exactly from the local trick's. Given the
pre-activations b, everything above them is the same under both, and the gradient of a layer with weight samples has the
local gradient as its mean (appendix D). So the variances differ by the mean of the conditional variance given b, which
is known: for type B with w = θ(1 + √α ε), ε given b has variance 1 − c² with c² = αθ²a² / δ, and

    Var[g_θ, per example] = Var[g_θ, local] + E[(∂L/∂b)² a² α (1 − c²)] / M.

For type A the local trick is a sample of the factors for every data point, and there is no difference.
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


def added_per_example(
    network: nn.Module, data: Pair, size: int, repeats: int, generator: torch.Generator
) -> dict[Key, float]:
    """What a weight sample for every data point adds to the local trick's variance (type B), for both ends.

    Exact but for the draws that the mean over data and pre-activations is taken from; mean over entries, as in
    :func:`moments`. For log α it is that of a rate of every weight, left out where rates are shared.
    """
    where = ends(network)
    layers = {layer: network.get_submodule(name) for layer, name in where._asdict().items()}
    alphas = {layer: vd.dropout_rates(module, as_="alpha")["weight"] for layer, module in layers.items()}
    weights = {layer: dict(module.named_parameters())["weight"].detach() for layer, module in layers.items()}
    variances = {layer: alphas[layer] * weights[layer].square() for layer in layers}
    sums = {layer: weight.new_zeros(2, *weight.shape, dtype=torch.float64) for layer, weight in weights.items()}
    seen: dict[str, tuple[Tensor, Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, layer=layer: seen.__setitem__(layer, (args[0].detach(), out)))
        for layer, module in layers.items()
    ]
    count = 0
    try:
        with in_training(network), vd.estimator("local"):
            for _ in range(repeats):
                for x, y in minibatches(data, size, generator):
                    loss = F.cross_entropy(network(x), y, reduction="sum")
                    gradients = torch.autograd.grad(loss, [seen[layer][1] for layer in layers])
                    count += len(x)
                    for layer, gradient in zip(layers, gradients, strict=True):
                        a, g = seen[layer][0].square(), gradient.square()
                        delta = a @ variances[layer].t()
                        over_delta = torch.where(delta > 0, g / delta, 0.0)
                        sums[layer][0].add_(g.t() @ a)
                        sums[layer][1].add_(over_delta.t() @ a.square())
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for layer, (first, second) in sums.items():
        left = (first - variances[layer] * second) / count / size  # E[(∂L/∂b)² a² (1 − c²)] / M
        found[layer, "theta"] = (alphas[layer] * left).mean().item()
        if alphas[layer].shape == left.shape:
            found[layer, "log alpha"] = (variances[layer] * left).mean().item() / 4
    return found


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
