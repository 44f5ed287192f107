"""Gradients of gradients, of all functions whose gradient is written by hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck
from torch.func import functional_call, grad, vmap

import vardrop as vd
from vardrop.weights.noise import with_noise

POSTERIORS = {
    "A": vd.VariationalDropout(),
    "B per weight": vd.VariationalDropout(type="B", sharing="weight", alpha=0.3),
    "B per neuron": vd.VariationalDropout(type="B", sharing="neuron", rate=0.3),
    "sparse": vd.SparseVariationalDropout(log_variance=-3.0),
    "sparse per neuron": vd.SparseVariationalDropout(sharing="neuron", log_variance=-3.0),
    "mean-field": vd.GaussianPosterior(std=0.3),
    "fixed": vd.GaussianDropout(type="B", rate=0.4),
}
ESTIMATORS = ("local", "per_example", "per_minibatch", "flipout")
MAKES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(3, 2), (4, 3)),
    "conv1d": (lambda: nn.Conv1d(2, 2, 2), (3, 2, 4)),
}


def function_of(layer: nn.Module, estimator: str) -> Callable[..., Tensor]:
    """The layer's output for inputs and parameters, with the same noise in every call."""
    names = [name for name, _ in layer.named_parameters()]

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        chunk = 2 if estimator == "per_example" else None  # several chunks: noise that is drawn again
        with vd.estimator(estimator, generator=torch.Generator().manual_seed(1), chunk=chunk):
            return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))

    return run


@pytest.mark.parametrize(("name", "estimator", "make"), list(itertools.product(POSTERIORS, ESTIMATORS, MAKES)))
def test_of_layers_with_random_weights(name: str, estimator: str, make: str) -> None:
    torch.manual_seed(0)
    build, shape = MAKES[make]
    layer = build().double()
    vd.convert_(layer, POSTERIORS[name])
    inputs = (
        torch.randn(shape, dtype=torch.float64, requires_grad=True),
        *(p.detach().clone().requires_grad_() for p in layer.parameters()),
    )
    run = function_of(layer, estimator)
    assert gradcheck(run, inputs)
    assert gradgradcheck(run, inputs)


@pytest.mark.parametrize("name", POSTERIORS)
def test_by_nested_transforms(name: str) -> None:
    """torch.func.grad of torch.func.grad against autograd's own, and under vmap."""
    torch.manual_seed(0)
    layer = nn.Linear(3, 2).double()
    vd.convert_(layer, POSTERIORS[name])
    noise = torch.randn(4, 2, dtype=torch.float64)
    xs = torch.randn(5, 4, 3, dtype=torch.float64)

    def loss(x: Tensor) -> Tensor:
        if name == "A":  # whose noise is a product
            return (layer(x) * 0).sum() + x.pow(3).sum()
        weight = layer.weight
        mean, variance = x @ weight.loc.t(), (x * x) @ weight.variance.t()
        return with_noise(mean, variance, noise).pow(2).sum()

    def slope(x: Tensor) -> Tensor:
        return grad(loss)(x).pow(2).sum()

    nested = torch.stack([grad(slope)(x) for x in xs])
    torch.testing.assert_close(vmap(grad(slope), randomness="same")(xs), nested)
    for x, got in zip(xs, nested, strict=True):
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.pow(2).sum(), leaf)
        torch.testing.assert_close(second, got)
        step = 1e-5 * torch.randn_like(x)
        change = (slope(x + step) - slope(x - step)) / 2
        torch.testing.assert_close(change, (got * step).sum(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("bound", [0.0, math.inf])
@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_of_the_divergence(reduction: str, bound: float) -> None:
    x = torch.linspace(-12, min(8.0, bound - 0.1), 15, dtype=torch.float64, requires_grad=True)
    assert gradgradcheck(
        lambda x: vd.kl.log_uniform(x, reduction=reduction, max_log_alpha=bound), (x,), atol=1e-4, rtol=1e-3
    )


def test_the_curvature_of_the_divergence_by_its_closed_form() -> None:
    r"""With t = x D(x) and u = x² = 1 / (2α), :math:`d^2 KL / d(\log\alpha)^2 = (t + u (1 - 2 t)) / 2`."""
    special = pytest.importorskip("scipy.special")
    x = torch.linspace(-4, 10, 50, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(vd.kl.log_uniform(x).sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    u = 0.5 * (-x.detach()).exp()
    root = u.sqrt()
    t = root * torch.from_numpy(special.dawsn(root.numpy()))
    torch.testing.assert_close(first.detach(), -t, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(second, (t + u * (1 - 2 * t)) / 2, rtol=1e-3, atol=1e-6)
    low = torch.tensor([-100.0, -50.0, 60.0], requires_grad=True)
    (first,) = torch.autograd.grad(vd.kl.log_uniform(low).sum(), low, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), low)
    assert second.abs().max() < 1e-6


def test_a_gradient_penalty_sees_the_random_layer() -> None:
    torch.manual_seed(0)
    critic = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    vd.convert_(critic, vd.VariationalDropout(type="B"), where="2")
    z = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = critic[2]._parameters["weight"]

    def penalty() -> Tensor:
        with vd.estimator("local", generator=torch.Generator().manual_seed(0)):
            (slope,) = torch.autograd.grad(critic(z).sum(), z, create_graph=True)
        return slope.pow(2).sum()

    penalty().backward()
    got = weight.grad.clone()
    for i in range(3):
        step = torch.zeros_like(weight)
        step[0, i] = 1e-6
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * step)
            values.append(penalty().item())
            with torch.no_grad():
                weight.sub_(sign * step)
        assert got[0, i].item() == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-4)


def test_no_variance_has_no_second_derivative_either() -> None:
    mean, variance = torch.zeros(3, requires_grad=True), torch.zeros(3, requires_grad=True)
    first = torch.autograd.grad(with_noise(mean, variance, torch.ones(3)).sum(), variance, create_graph=True)[0]
    (second,) = torch.autograd.grad(first.sum(), variance)
    assert not first.any()
    assert not second.any()
