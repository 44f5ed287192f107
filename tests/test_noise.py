"""A Gaussian of given mean and variance, its gradient in closed form, and what happens at variance 0."""

from __future__ import annotations

import pytest
import torch
from torch.func import grad, vmap

from contract import assert_mean, assert_moments
from vardrop.weights.noise import add_noise, normal, signs, square


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def replay(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_value_and_gradient_in_closed_form() -> None:
    """y = m + sqrt(v) z; dy/dm = 1, dy/dv = z / (2 sqrt(v)) (eq. 8)."""
    mean = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    variance = torch.rand(3, 4, dtype=torch.float64).requires_grad_()
    y = add_noise(mean, variance, torch.Generator().manual_seed(5))
    zeta = replay((3, 4), 5)
    torch.testing.assert_close(y, mean + variance.sqrt() * zeta)
    weight = torch.randn(3, 4, dtype=torch.float64)
    (weight * y).sum().backward()
    torch.testing.assert_close(mean.grad, weight)
    torch.testing.assert_close(variance.grad, weight * zeta / (2 * variance.detach().sqrt()))


def test_noise_is_in_the_memory_order_of_the_mean() -> None:
    """A mixture of two orders is slow in every pass over it, and so is what reads the sample."""
    mean = torch.zeros(2, 3, 4, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    variance = torch.ones_like(mean, requires_grad=True)
    y = add_noise(mean, variance, torch.Generator().manual_seed(5))
    y.square().sum().backward()
    for of_that_order in (y, mean.grad, variance.grad):
        assert of_that_order.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y, replay((2, 4, 5, 3), 5).movedim(-1, 1))


def test_moments() -> None:
    mean, variance = torch.randn(6, dtype=torch.float64), torch.rand(6, dtype=torch.float64)
    samples = add_noise(mean.expand(20000, 6), variance.expand(20000, 6))
    assert_moments(samples, mean, torch.diag(variance), "add_noise")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_no_variance_no_gradient(dtype: torch.dtype) -> None:
    """The root has an infinite slope at 0; here it is 0, and there is no epsilon under it."""
    mean = torch.ones(4, dtype=dtype, requires_grad=True)
    variance = torch.tensor([0.0, 1e-6, 0.0, 1.0], dtype=dtype, requires_grad=True)
    y = add_noise(mean, variance)
    y.float().square().sum().backward()
    assert y.dtype == dtype
    assert y[0] == 1
    assert y[2] == 1
    assert variance.grad.isfinite().all()
    assert variance.grad[0] == 0
    assert variance.grad[2] == 0
    assert variance.grad[3] != 0


def test_a_variance_wider_than_the_mean() -> None:
    """The smallest standard deviations of float16 have variances that float16 has not got."""
    mean = torch.zeros(1000, dtype=torch.float16, requires_grad=True)
    variance = torch.full((1000,), 1e-10, requires_grad=True)
    y = add_noise(mean, variance)
    assert y.dtype == torch.float16
    assert y.float().std().item() == pytest.approx(1e-5, rel=0.2)
    y.float().sum().backward()
    assert mean.grad.dtype == torch.float16
    assert variance.grad.dtype == torch.float32
    assert variance.grad.isfinite().all()


def test_transforms() -> None:
    mean, variance = torch.randn(5, dtype=torch.float64), torch.rand(5, dtype=torch.float64)
    different = vmap(lambda _: add_noise(mean, variance), randomness="different")(torch.arange(8000))
    assert_moments(different, mean, torch.diag(variance), "vmap")
    slopes = vmap(lambda _: grad(lambda v: add_noise(mean, v).square().sum())(variance), randomness="different")
    assert_mean(slopes(torch.arange(8000)), torch.ones(5, dtype=torch.float64), "d E y^2 / d variance = 1")


def test_square() -> None:
    x = torch.randn(7, dtype=torch.float64, requires_grad=True)
    square(x).sum().backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
    torch.testing.assert_close(vmap(grad(square))(x.detach()), 2 * x.detach())


def test_signs_are_fair_and_independent() -> None:
    drawn = signs((20000, 4), torch.empty(0, dtype=torch.float64), None)
    assert set(drawn.unique().tolist()) == {-1.0, 1.0}
    assert_moments(drawn, torch.zeros(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64), "signs")


def test_generator_and_type() -> None:
    for draw in (normal, signs):
        like = torch.empty(0, dtype=torch.bfloat16)
        one, two = (draw((9,), like, torch.Generator().manual_seed(1)) for _ in range(2))
        assert torch.equal(one, two)
        assert one.dtype == torch.bfloat16
