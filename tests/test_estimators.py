"""Estimators by what tells them apart: covariance between examples, gradient variance, memory, threads, replay."""

from __future__ import annotations

import subprocess
import sys
import threading
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.utils.checkpoint import checkpoint

import vardrop as vd
from contract import assert_mean
from vardrop.weights import estimators
from vardrop.weights.random_kinds import IndependentWeight

NOISY = ("local", "per_example", "per_minibatch", "flipout")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def layer_b(inputs: int = 3, outputs: int = 2, log_alpha: float = -0.5) -> nn.Linear:
    layer = nn.Linear(inputs, outputs).double()
    vd.convert_(layer, vd.VariationalDropout(type="B", sharing="weight"))
    nn.init.constant_(layer.weight_log_alpha, log_alpha)
    return layer


# ---------------------------------------------------------------------------------- equations 7 and 8 in closed form


def test_equation_8_local() -> None:
    """dL/d log alpha_ij = sum_m g_mj zeta_mj / (2 sqrt(delta_mj)) x_mi^2 alpha_ij theta_ij^2, and eq. 6 itself."""
    layer, x = layer_b(), torch.randn(5, 3, dtype=torch.float64)
    theta, alpha = layer._parameters["weight"].detach(), layer.weight_log_alpha.exp().detach()
    with vd.estimator("local", generator=torch.Generator().manual_seed(7)):
        y = layer(x)
    zeta = torch.randn(5, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    delta = x.square() @ (alpha * theta.square()).T
    torch.testing.assert_close(y, x @ theta.T + layer.bias + delta.sqrt() * zeta)
    g = torch.randn(5, 2, dtype=torch.float64)
    (g * y).sum().backward()
    by_variance = (g * zeta / (2 * delta.sqrt())).T @ x.square()
    torch.testing.assert_close(layer.weight_log_alpha.grad, by_variance * alpha * theta.square())
    torch.testing.assert_close(layer._parameters["weight"].grad, g.T @ x + by_variance * 2 * alpha * theta)


def test_equation_7_one_weight_sample() -> None:
    """dL/d log alpha_ij = sum_m g_mj x_mi epsilon_ij sqrt(alpha_ij) |theta_ij| / 2, with one epsilon for all m."""
    layer, x = layer_b(), torch.randn(5, 3, dtype=torch.float64)
    theta, alpha = layer._parameters["weight"].detach(), layer.weight_log_alpha.exp().detach()
    with vd.estimator("per_minibatch", generator=torch.Generator().manual_seed(7)):
        y = layer(x)
    epsilon = torch.randn(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    std = alpha.sqrt() * theta.abs()
    torch.testing.assert_close(y, x @ (theta + std * epsilon).T + layer.bias)
    g = torch.randn(5, 2, dtype=torch.float64)
    (g * y).sum().backward()
    torch.testing.assert_close(layer.weight_log_alpha.grad, g.T @ x * epsilon * std / 2)
    torch.testing.assert_close(layer._parameters["weight"].grad, g.T @ x * (1 + epsilon * alpha.sqrt() * theta.sign()))


def test_equation_11_correlated() -> None:
    layer, x = nn.Linear(3, 2).double(), torch.randn(5, 3, dtype=torch.float64)
    vd.convert_(layer, vd.VariationalDropout(type="A", alpha=0.5))
    theta = layer._parameters["weight"].detach()
    for estimator, shape in (("local", (5, 3)), ("per_example", (5, 3)), ("per_minibatch", (1, 3))):
        with vd.estimator(estimator, generator=torch.Generator().manual_seed(7)):
            y = layer(x)
        xi = 1 + 0.5**0.5 * torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
        torch.testing.assert_close(y, (x * xi) @ theta.T + layer.bias)


def test_gradient_variance_is_ordered() -> None:
    """Same mean, and less variance the less noise the examples share: section 2.2 and Table 1 of the paper.

    One layer of 20 inputs, a batch of 16 examples that agree about the gradient, as those of a real batch do in part:
    local < per_example < per_minibatch, each by more than chance allows.
    """
    layer = nn.Linear(20, 4).double()
    vd.convert_(layer, vd.GaussianPosterior(std=0.5))
    x, t = torch.rand(16, 20, dtype=torch.float64) + 0.5, torch.full((16, 4), 5.0, dtype=torch.float64)
    parameters = {name: p.detach() for name, p in layer.named_parameters()}

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        return (functional_call(layer, parameters, (x,)) - t).square().mean()

    samples = {}
    for estimator in NOISY:
        with vd.estimator(estimator):
            drawn = vmap(lambda _: grad(loss)(parameters), randomness="different")(torch.arange(1500))
        samples[estimator] = drawn["weight_log_variance"].flatten(1)
    for estimator in NOISY[1:]:
        difference = samples["local"] - samples[estimator]
        assert_mean(difference, torch.zeros_like(difference[0]), f"local and {estimator} in expectation")
    spread = {name: drawn.var(0).mean().item() for name, drawn in samples.items()}
    assert spread["local"] < 0.8 * spread["per_example"]
    assert spread["per_example"] < 0.8 * spread["per_minibatch"]
    assert spread["flipout"] < 0.8 * spread["per_minibatch"]


# ------------------------------------------------------------------------------------------- per-example weights


def test_every_example_has_a_weight_of_its_own() -> None:
    """As many inputs as it takes to solve for the weight: x of an example is a whole basis, y shows all of w."""
    layer = layer_b(4, 3)
    basis = torch.eye(4, dtype=torch.float64).expand(6, 4, 4)  # [examples, inputs, features]
    for chunk in (None, 1, 4):
        with vd.estimator("per_example", chunk=chunk), torch.no_grad():
            weights = (layer(basis) - layer.bias).mT
            again = torch.linalg.lstsq(basis, layer(basis) - layer.bias).solution.mT
        std = (0.5 * layer.weight_log_alpha.detach()).exp() * layer._parameters["weight"].detach().abs()
        standard = (weights - layer._parameters["weight"].detach()) / std
        assert standard.abs().max() < 5
        assert (weights.unsqueeze(0) - weights.unsqueeze(1)).abs().sum((2, 3)).count_nonzero() == 30
        assert not torch.equal(weights, again)
    with vd.estimator("per_minibatch"), torch.no_grad():
        weights = (layer(basis) - layer.bias).mT
    assert torch.equal(weights, weights[:1].expand(6, 3, 4))


@pytest.mark.parametrize("seeded", [True, False])
def test_recomputed_noise_is_the_same_noise(seeded: bool) -> None:
    """Between chunks nothing is kept: the backward pass draws again, and its gradient is that of what was seen."""
    layer, x = layer_b(4, 3), torch.randn(7, 4, dtype=torch.float64, requires_grad=True)
    generator = torch.Generator().manual_seed(3) if seeded else None
    with vd.estimator("per_example", chunk=2, generator=generator):
        y = layer(x)
    g = torch.randn(7, 3, dtype=torch.float64)
    torch.randn(100)  # move the default generator on, as a network would
    (g * y).sum().backward()
    # with x = e_i the output shows w: dL/dx = g w for each example, so w is known from the outputs of y(x) = w x + b
    theta, alpha = layer._parameters["weight"].detach(), layer.weight_log_alpha.detach().exp()
    torch.testing.assert_close((x.grad * x.detach()).sum(1), (g * (y - layer.bias).detach()).sum(1))
    # and y is linear in theta, with dy/dtheta * theta = y - b (type B: w = theta (1 + sqrt(alpha) eps))
    by_theta = (layer._parameters["weight"].grad * theta).sum()
    torch.testing.assert_close(by_theta, (g * (y - layer.bias).detach()).sum())
    assert layer.weight_log_alpha.grad.shape == alpha.shape


def test_memory_does_not_grow_with_the_examples() -> None:
    """1000 examples of a 1000 x 1000 layer would be 4 GB of weights, and as much of noise. Measured in a fresh process.

    300 examples of a 500 x 500 layer, 300 MB of weights (and five times that in its graph), stay below 100 MB.
    """
    code = """
import resource, torch, vardrop as vd
layer = torch.nn.Linear(500, 500)
vd.convert_(layer, vd.VariationalDropout(type="B", sharing="weight"))
def step(count):
    with vd.estimator("per_example"):
        layer(torch.randn(count, 500)).square().mean().backward()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
first = step(8)
print(step(300) - first)
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(run.stdout) < 100


# ---------------------------------------------------------------------------------------------- the switch itself


def test_threads_do_not_disturb_each_other() -> None:
    """Two threads with estimators of their own, inside each other's blocks, also with one switch object for both."""
    layer, x = layer_b(), torch.ones(50, 3, dtype=torch.float64)
    shared = vd.estimator("per_minibatch")
    barrier, rows = threading.Barrier(2), {}

    def work(name: str) -> None:
        seen = []
        with vd.estimator(name):
            barrier.wait()
            seen.append(len(layer(x).unique(dim=0)))
            with shared:
                barrier.wait()
                seen.append(len(layer(x).unique(dim=0)))
                barrier.wait()
            seen.append(len(layer(x).unique(dim=0)))
            barrier.wait()
        seen.append(len(layer(x).unique(dim=0)))
        rows[name] = seen

    threads = [threading.Thread(target=work, args=(name,)) for name in ("none", "local")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert rows == {"none": [1, 1, 1, 50], "local": [50, 1, 50, 50]}
    assert len(layer(x).unique(dim=0)) == 50


def test_blocks_nest_and_end_with_an_error() -> None:
    twice = vd.estimator("none")
    with pytest.raises(ZeroDivisionError), vd.estimator("flipout"), twice, vd.estimator("per_example"), twice:
        1 / (estimators._active.setting.name != "none")  # which is 1 / 0
    assert estimators._active.setting.name == "local"
    assert not estimators._active.outer


def test_checkpoint_with_backward_in_another_thread() -> None:
    """On a GPU backward always runs in another thread. The context function takes the estimator there."""
    layer, x = layer_b(), torch.randn(4, 3, dtype=torch.float64)
    grads = []
    for again in (False, True):
        layer.zero_grad()
        torch.manual_seed(1)
        with vd.estimator("per_minibatch"):
            if again:
                contexts = lambda: (nullcontext(), vd.estimator("per_minibatch"))  # noqa: E731
                y = checkpoint(layer, x, use_reentrant=False, context_fn=contexts)
            else:
                y = layer(x)
        thread = threading.Thread(target=y.square().sum().backward)
        thread.start()
        thread.join()
        grads.append([p.grad.clone() for p in layer.parameters()])
    for plain, replayed in zip(*grads, strict=True):
        torch.testing.assert_close(plain, replayed)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:torch.*")
@pytest.mark.parametrize("name", ["local", "per_minibatch"])
def test_inductor_draws_independent_noise(name: str) -> None:
    """Compiled code with its own random numbers: independent between entries of a call and between calls."""
    layer, x = layer_b(3, 4), torch.randn(8, 3, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True)
    with vd.estimator(name), torch.no_grad():
        samples = torch.stack([compiled(x).flatten() for _ in range(400)])
    truth = IndependentWeight(layer.weight.loc.detach(), layer.weight.variance.detach())
    jacobian = torch.kron(x, torch.eye(4, dtype=torch.float64))  # d y[m, j] / d w[j, i], rows by (m, j)
    covariance = jacobian * truth.variance.T.flatten() @ jacobian.T
    covariance = torch.diag(covariance.diagonal()) if name == "local" else covariance
    centred = samples - (x @ truth.loc.T + layer.bias).detach().flatten()
    assert_mean(centred, torch.zeros_like(centred[0]), "mean")
    assert_mean(centred.unsqueeze(1) * centred.unsqueeze(2), covariance, "covariance")
    assert_mean(centred[1:] * centred[:-1], torch.zeros_like(centred[0]), "covariance of successive calls")
