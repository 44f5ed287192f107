"""The pure functions: moments against the truth, what shares a draw, every kind of tensor, and refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.func import vmap

from contract import assert_mean
from vardrop import functional as F
from vardrop.functional import drop
from vardrop.masks import _at_least

RATES = [0.001, 0.1, 1 / 3, 0.5, 0.9]
NOISES = ["bernoulli", "gaussian"]
every_rate = pytest.mark.parametrize("p", RATES)
every_noise = pytest.mark.parametrize("noise", NOISES)
every_form = pytest.mark.parametrize("form", [float, torch.tensor], ids=["number", "tensor"])


def factors(p: float | Tensor, noise: str = "bernoulli", count: int = 1_000_000) -> Tensor:
    return drop(torch.ones(count, dtype=torch.float64), p, noise=noise, generator=torch.Generator().manual_seed(0))


@every_form
@every_noise
@every_rate
def test_moments(p: float, noise: str, form: type) -> None:
    epsilon = factors(form(p), noise)
    alpha = p / (1 - p)
    assert_mean(epsilon, torch.ones(()), "mean")
    assert_mean((epsilon - 1).square(), torch.tensor(alpha), "variance")
    third = (1 - 1 / (1 - p)) ** 2 * (1 / (1 - p) - 1) * (1 - p) - p if noise == "bernoulli" else 0.0
    assert_mean((epsilon - 1) ** 3, torch.tensor(third), "third moment")


@every_rate
def test_the_realised_rate(p: float) -> None:
    """With sixteen bits at most 2^-17 from the one asked for, and the scale is that of the realised one."""
    for seed in range(8):
        y = drop(torch.ones(500_000, dtype=torch.float64), p, generator=torch.Generator().manual_seed(seed))
        kept = y.max()
        realised = 1 - 1 / kept.item()
        assert abs(realised - p) <= 2**-17
        assert realised * 2**16 == pytest.approx(round(p * 2**16), abs=1e-6)
        assert_mean((y == 0).double(), torch.tensor(realised), "rate")
        assert ((y == 0) | (y == kept)).all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int8], ids=str)
def test_every_level_of_the_bits(dtype: torch.dtype) -> None:
    """The comparison by clamping is >=: all values of a draw, at the ends of the rates and between."""
    half = 1 << (8 * dtype.itemsize - 1)
    bits = torch.arange(-half, half, dtype=torch.int32).to(dtype)
    for number in (1, 2, 77, half - 1, half, half + 1, 2 * half - 2, 2 * half - 1):
        kept = _at_least(bits, number - half)
        assert torch.equal(kept, (bits >= number - half).to(dtype))
        assert int(kept.sum()) == 2 * half - number


@pytest.mark.parametrize(("p", "units"), [(0.5, 56), (0.25, 8), (255 / 256, 8), (0.2, 4), (1 / 512, 4)])
def test_rates_of_few_bits_take_few_draws(p: float, units: int) -> None:
    """Seen by the generator: as many draws of words leave it in the same state."""
    one, other = torch.Generator().manual_seed(0), torch.Generator().manual_seed(0)
    drop(torch.ones(1001), p, generator=one)
    torch.randint(-(1 << 63), (1 << 63) - 1, (-(-1001 // units),), generator=other)
    assert torch.equal(one.get_state(), other.get_state())


@pytest.mark.parametrize("p", [1e-9, 1e-6, 1 - 1e-9])
def test_rates_beyond_the_bits_are_those_next_to_the_ends(p: float) -> None:
    y = factors(p, count=4_000_000)
    expected = 2**-16 if p < 0.5 else 1 - 2**-16
    assert_mean((y == 0).double(), torch.tensor(expected), "rate")
    assert_mean(y, torch.ones(()), "mean")


@every_form
def test_the_ends(form: type) -> None:
    x = torch.randn(1000, requires_grad=True)
    assert torch.equal(drop(x, form(0.0)), x)
    y = drop(x, form(1.0))
    assert torch.equal(y, torch.zeros(1000))
    y.sum().backward()
    assert torch.equal(x.grad, torch.zeros(1000))


@every_noise
def test_rate_zero_draws_nothing(noise: str) -> None:
    x, before = torch.randn(3), torch.get_rng_state()
    assert drop(x, 0.0, noise=noise) is x
    assert drop(x, torch.tensor(0.0), noise=noise) is x
    assert torch.equal(before, torch.get_rng_state())


def test_draws_are_independent() -> None:
    """Four of them come from one int64: neighbours, and all at distance two and three, have no covariance."""
    d = factors(0.3) - 1
    for lag in (1, 2, 3, 4, 5):
        assert_mean(d[lag:] * d[:-lag], torch.zeros(()), f"covariance at distance {lag}")


@pytest.mark.parametrize("count", [1, 6, 7, 8, 4096, 100_003])
def test_coins_are_fair_and_independent_whichever_bit_they_have(count: int) -> None:
    """Seven units share a byte, a seventh of all apart: at the rate 1/2 each of them has a bit of its own."""
    trials = max(40, 400_000 // count)
    seen = torch.stack([drop(torch.ones(count), 0.5) for _ in range(trials)])
    assert sorted(seen.unique().tolist()) == [0.0, 2.0]
    d = seen - 1
    assert_mean(d.flatten(), torch.zeros(()), "mean")
    each = -(-count // 7)
    for bit in range(-(-count // each)):
        rows = d[:, bit * each : (bit + 1) * each]
        assert_mean(rows.flatten(), torch.zeros(()), f"mean of bit {bit}")
        for other in range(bit):
            both = rows * d[:, other * each : (other + 1) * each][:, : rows.shape[1]]
            assert_mean(both.flatten(), torch.zeros(()), f"covariance of the bits {other} and {bit}")


def test_coins_where_a_constant_of_the_processor_does_not_do() -> None:
    """In a compiled function and for tensors without data: the bits are made to the device there."""
    compiled = torch.compile(lambda x: drop(x, 0.5), backend="aot_eager", fullgraph=True)
    x = torch.randn(50, 3)
    torch.manual_seed(3)
    expected = drop(x, 0.5)
    torch.manual_seed(3)
    assert torch.equal(compiled(x), expected)
    with FakeTensorMode():
        assert drop(torch.ones(5, 4), 0.5).shape == (5, 4)


@every_noise
@pytest.mark.parametrize("shared", [(), 0, -1, (1, 2), (0, 2), (0, 1, 2), range(3)], ids=str)
def test_what_shares_a_draw(noise: str, shared: int | tuple[int, ...]) -> None:
    axes = {axis % 3 for axis in ((shared,) if isinstance(shared, int) else shared)}
    y = drop(torch.ones(40, 41, 42), 0.5, shared=shared, noise=noise)
    for axis in range(3):
        same = bool((y == y.narrow(axis, 0, 1)).all())
        assert same == (axis in axes)


@every_form
@every_noise
def test_the_gradient_is_the_noise(noise: str, form: type) -> None:
    x = torch.randn(50, dtype=torch.float64, requires_grad=True)
    y = drop(x, form(0.4), noise=noise)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch's own, on first use of forward mode
def test_gradients_of_any_order_and_mode() -> None:
    def f(x: Tensor) -> Tensor:
        return drop(x**3, 0.4, generator=torch.Generator().manual_seed(1)) + drop(
            x**2, 0.4, noise="gaussian", generator=torch.Generator().manual_seed(2)
        )

    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(f, x, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(f, x)


@every_form
@every_noise
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64, torch.complex128])
def test_types(dtype: torch.dtype, noise: str, form: type) -> None:
    """Values over two octaves, so that rounding has no one direction: the mean has no bias even in half precision."""
    x = torch.linspace(1, 4, 200_000).to(dtype).requires_grad_()
    y = drop(x, form(0.1), noise=noise)
    assert y.dtype == dtype
    wide = torch.complex128 if dtype.is_complex else torch.float64
    ratio = y.detach().to(wide) / x.detach().to(wide)
    assert_mean(ratio.real, torch.ones(()), "mean")
    y.abs().sum().backward()
    assert x.grad.dtype == dtype


@every_noise
@pytest.mark.parametrize("shape", [(0,), (0, 3, 4), (2, 3, 0, 4), ()], ids=str)
def test_sizes_of_nothing_and_of_one(shape: tuple[int, ...], noise: str) -> None:
    for shared in ((), range(len(shape))):
        x = torch.ones(shape, requires_grad=True)
        y = drop(x, 0.5, shared=shared, noise=noise)
        assert y.shape == shape
        y.sum().backward()
        assert x.grad.shape == shape


@every_noise
@pytest.mark.parametrize("shared", [(), (2, 3), (0,), (1,)], ids=str)
def test_memory_format_is_kept(shared: tuple[int, ...], noise: str) -> None:
    x = torch.ones(3, 4, 5, 6).to(memory_format=torch.channels_last).requires_grad_()
    y = drop(x, 0.5, shared=shared, noise=noise)
    assert y.is_contiguous(memory_format=torch.channels_last)
    y.sum().backward()
    assert torch.equal(x.grad, y)
    strided = torch.ones(4, 10, 6)[:, ::2].transpose(0, 2)
    assert drop(strided, 0.5, noise=noise).shape == (6, 5, 4)
    assert_mean(drop(torch.ones(1).expand(100_000), 0.3, noise=noise), torch.ones(()), "expanded")


@every_noise
def test_generators(noise: str) -> None:
    x, before = torch.ones(100), torch.get_rng_state()

    def run(seed: int) -> Tensor:
        return drop(x, 0.5, noise=noise, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    assert torch.equal(before, torch.get_rng_state())


@every_noise
def test_vmap(noise: str) -> None:
    x = torch.ones(40)
    different = vmap(lambda _: drop(x, 0.5, noise=noise), randomness="different")(torch.arange(2000))
    assert_mean(different, torch.ones(()), "mean")
    assert_mean((different - 1).square(), torch.ones(()), "variance")
    assert_mean((different[1:] - 1) * (different[:-1] - 1), torch.zeros(()), "covariance of samples")
    same = vmap(lambda x: drop(x, 0.5, noise=noise), randomness="same")(torch.ones(5, 40))
    assert torch.equal(same, same[:1].expand(5, 40))
    batched = vmap(lambda x: drop(x, 0.5, noise=noise), randomness="different")(torch.ones(5, 40))
    assert not torch.equal(batched[0], batched[1])


def test_vmap_over_rates() -> None:
    rates = torch.tensor([0.0, 0.25, 0.5, 1.0])
    y = vmap(lambda p: drop(torch.ones(20_000), p), randomness="different")(rates)
    for row, p in zip(y, rates, strict=True):
        assert_mean((row == 0).double(), p.double(), "rate")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@every_noise
def test_one_graph_for_all_rates(noise: str, backend: str) -> None:
    torch._dynamo.reset()
    x, p = torch.ones(50_000), torch.tensor(0.0)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(lambda: drop(x, p, noise=noise), fullgraph=True, backend=backend)
        for value in (0.0, 0.1, 0.25, 0.5, 0.75):
            p.fill_(value)
            y = compiled().double()
            assert_mean(y, torch.ones(()), "mean")
            assert_mean((y - 1).square(), (p / (1 - p)).double(), "variance")
            assert value == 0 or not torch.equal(compiled(), compiled())


@every_noise
def test_one_graph_for_all_sizes(noise: str) -> None:
    torch._dynamo.reset()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(lambda x: drop(x, 0.5, noise=noise), dynamic=True, fullgraph=True, backend="aot_eager")
        for size in (5, 6, 7, 16):
            y = compiled(torch.ones(2, 3, size, size + 1).to(memory_format=torch.channels_last))
            assert y.is_contiguous(memory_format=torch.channels_last)


def test_any_order_in_memory() -> None:
    for order in itertools.permutations(range(4)):
        x = torch.ones(2, 3, 4, 5).permute(order)
        assert drop(x, 0.5).stride() == x.stride()


def test_refusals() -> None:
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"functional.drop: rate must be in \[0, 1\], got 1.5"):
        drop(x, 1.5)
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\) for Gaussian noise, got 1"):
        drop(x, 1.0, noise="gaussian")
    with pytest.raises(ValueError, match=r"rate must be in \[0, 1\], got nan"):
        drop(x, math.nan)
    with pytest.raises(ValueError, match=r"rate must be a number or a 0-dim tensor, got shape \(3,\)"):
        drop(x, torch.tensor([0.1, 0.2, 0.3]))
    with pytest.raises(ValueError, match="rate must not ask for a gradient, which Bernoulli noise cannot give"):
        drop(x, torch.tensor(0.5, requires_grad=True))
    with pytest.raises(ValueError, match="noise must be 'bernoulli' or 'gaussian', got 'laplace'"):
        drop(x, 0.5, noise="laplace")
    with pytest.raises(TypeError, match=r"drop: x must be floating point or complex, got torch\.int64"):
        drop(torch.ones(2, dtype=torch.int64), 0.5)
    with pytest.raises(IndexError, match=r"shared must name dimensions of x, got 2 for shape \(2, 3\)"):
        drop(x, 0.5, shared=(0, 2))
    with pytest.raises(ValueError, match="concrete: temperature must be above 0, got 0"):
        F.concrete(x, torch.zeros(()), temperature=0)
    with pytest.raises(ValueError, match=r"tokens must have the shape of x without its last dimension, got \(3,\)"):
        F.drop_types(x, torch.zeros(3, dtype=torch.int64), 0.5, 4)


# ------------------------------------------------------------------------------------------------- learned rates


@pytest.mark.parametrize("log_alpha", [-3.0, 0.0, 1.5])
def test_gaussian_and_its_gradient(log_alpha: float) -> None:
    """E[(y − x)²] = α x², so its gradient in log α is α x² too."""
    x = torch.full((400_000,), 2.0, dtype=torch.float64)
    parameter = torch.full((400_000,), log_alpha, dtype=torch.float64, requires_grad=True)
    y = F.gaussian(x, parameter)
    (gradient,) = torch.autograd.grad((y - x).square().sum(), parameter)
    assert_mean(y.detach() - x, torch.zeros(()), "mean")
    assert_mean((y.detach() - x).square(), torch.tensor(4 * math.exp(log_alpha)), "variance")
    assert_mean(gradient, torch.tensor(4 * math.exp(log_alpha)), "gradient")


def concrete_moments(p: float, t: float) -> tuple[float, float]:
    """Mean and mean square of (1 − z) / (1 − p), by the midpoint rule over u."""
    u = (torch.arange(2_000_000, dtype=torch.float64) + 0.5) / 2_000_000
    kept = 1 - torch.sigmoid((math.log(p / (1 - p)) + torch.logit(u)) / t)
    return kept.mean().item() / (1 - p), kept.square().mean().item() / (1 - p) ** 2


@pytest.mark.parametrize("t", [0.1, 0.5])
@pytest.mark.parametrize("p", [0.02, 0.1, 0.5, 0.9])
def test_concrete_moments(p: float, t: float) -> None:
    logit = torch.tensor(math.log(p / (1 - p)), dtype=torch.float64)
    y = F.concrete(torch.ones(500_000, dtype=torch.float64), logit, t)
    mean, square = concrete_moments(p, t)
    assert_mean(y, torch.tensor(mean), "mean")
    assert_mean(y.square(), torch.tensor(square), "mean square")
    if t == 0.1:  # what the docstring says
        assert mean == pytest.approx(1, abs=0.012 if p > 0.5 else 0.002)
        assert (square - mean**2) / (p / (1 - p)) == pytest.approx(0.91, abs=0.011)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_concrete_is_finite_in_half_precision(dtype: torch.dtype) -> None:
    logit = torch.tensor(-2.0, dtype=dtype, requires_grad=True)
    y = F.concrete(torch.ones(300_000, dtype=dtype), logit)
    assert y.dtype == dtype
    y.float().square().mean().backward()
    assert y.isfinite().all()
    assert logit.grad.isfinite()


def test_a_word_is_dropped_everywhere_or_nowhere() -> None:
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, 30, (400, 25), generator=generator)
    y = F.drop_types(torch.ones(400, 25, 3), tokens, 0.3, 30, generator=generator)
    assert torch.equal(y, y[..., :1].expand_as(y))
    factor = y[..., 0].double()
    table = torch.full((400, 30), -1.0, dtype=torch.float64).scatter(1, tokens, factor)
    assert torch.equal(table.gather(1, tokens), factor)  # one value for every word of a sequence
    seen = table[table >= 0]
    assert_mean(seen, torch.ones(()), "mean")
    assert_mean((seen == 0).double(), torch.tensor(0.3), "rate")
    assert table[:, 0][table[:, 0] >= 0].unique().numel() == 2  # other sequences have other draws


# -------------------------------------------------------------------------------------------------- fast dropout


def test_moments_linear_against_sampling() -> None:
    generator = torch.Generator().manual_seed(0)
    m, v = torch.randn(6, generator=generator).double(), torch.rand(6, generator=generator).double()
    weight, bias = torch.randn(4, 6, generator=generator).double(), torch.randn(4, generator=generator).double()
    inputs = m + v.sqrt() * torch.randn(400_000, 6, generator=generator, dtype=torch.float64)
    y = torch.nn.functional.linear(drop(inputs, 0.3, generator=generator), weight, bias)
    mean, variance = F.moments_linear(m, v, weight, bias, rate=0.3)
    assert_mean(y, mean, "mean")
    realised = round(0.3 * 2**16) / 2**16
    assert variance == pytest.approx(F.moments_linear(m, v, weight, bias, realised)[1], rel=1e-4)
    assert_mean((y - mean).square(), F.moments_linear(m, v, weight, bias, realised)[1], "variance")


def test_moments_relu_against_sampling() -> None:
    m = torch.tensor([-3.0, -1.0, 0.0, 0.5, 2.0], dtype=torch.float64)
    v = torch.tensor([1.0, 0.3, 2.0, 1.0, 0.5], dtype=torch.float64)
    noise = torch.randn(400_000, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    y = (m + v.sqrt() * noise).relu()
    mean, variance = F.moments_relu(m, v)
    assert_mean(y, mean, "mean")
    assert_mean((y - mean).square(), variance, "variance")


def test_moments_relu_where_nothing_varies_and_far_out() -> None:
    m = torch.tensor([-1.0, 0.0, 2.0], requires_grad=True)
    v = torch.zeros(3, requires_grad=True)
    mean, variance = F.moments_relu(m, v)
    assert torch.equal(mean, torch.tensor([0.0, 0.0, 2.0]))
    assert torch.equal(variance, torch.zeros(3))
    (mean.sum() + variance.sum()).backward()
    assert m.grad.isfinite().all()
    assert v.grad.isfinite().all()
    mean, variance = F.moments_relu(torch.tensor([100.0, -100.0]), torch.ones(2))  # no difference of large squares
    torch.testing.assert_close(mean, torch.tensor([100.0, 0.0]))
    torch.testing.assert_close(variance, torch.tensor([1.0, 0.0]), atol=1e-4, rtol=0)
