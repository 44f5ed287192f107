"""The divergences against quadrature and torch.distributions, far beyond where anybody goes."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import integrate, special
from torch import Tensor
from torch.func import vmap

import vardrop as vd

EULER = 0.5772156649015329

# MATH.md, section 2, from another program: log alpha -> KL, dKL / d log alpha
TABLE = {
    -10: (5.635158721, -0.5000227031),
    -5: (3.131777606, -0.5034394830),
    -2: (1.544154645, -0.6112342778),
    -1: (0.9145313097, -0.5997037495),
    0: (0.4266856043, -0.3623892295),
    1: (0.1731938592, -0.1629596408),
    3: (0.02468833544, -0.02448449338),
    5: (0.003365193569, -0.003361417032),
    8: (0.0001677219364, -0.0001677125593),
}
LIMITS = {torch.float64: 1e-6, torch.float32: 1e-4}


def slope(log_alpha: float) -> float:
    x = math.sqrt(0.5 * math.exp(-log_alpha))
    return -x * float(special.dawsn(x))


def value(log_alpha: float) -> float:
    """2 times the integral of Dawson's function from 0 to x, in the variable t = exp(s) that spreads it evenly."""
    top = 0.5 * (-math.log(2) - log_alpha)
    integral, _ = integrate.quad(
        lambda s: 2 * math.exp(s) * float(special.dawsn(math.exp(s))),
        top - 40,
        top,
        epsabs=0,
        epsrel=1e-11,
        limit=400,
        points=[p for p in (-3, -1, 0, 1, 2, 4) if top - 40 < p < top],
    )
    return integral


def with_gradient(log_alpha: Tensor, **options: object) -> tuple[Tensor, Tensor]:
    log_alpha = log_alpha.clone().requires_grad_()
    divergence = vd.kl.log_uniform(log_alpha, **options)  # type: ignore[arg-type]
    divergence.sum().backward()
    return divergence.detach(), log_alpha.grad


def test_the_truth_is_the_table() -> None:
    for log_alpha, (divergence, derivative) in TABLE.items():
        assert value(log_alpha) == pytest.approx(divergence, rel=2e-9)
        assert slope(log_alpha) == pytest.approx(derivative, rel=2e-9)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_value_and_gradient_against_quadrature(dtype: torch.dtype) -> None:
    log_alpha = torch.linspace(-20, 20, 241, dtype=torch.float64).to(dtype)
    divergence, derivative = with_gradient(log_alpha)
    truths = [value(x) for x in log_alpha.tolist()], [slope(x) for x in log_alpha.tolist()]
    for got, truth in zip((divergence, derivative), truths, strict=True):
        torch.testing.assert_close(got.double(), torch.tensor(truth).double(), rtol=LIMITS[dtype], atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", ["exact", "sigmoid"])
def test_finite_everywhere(dtype: torch.dtype, form: str) -> None:
    log_alpha = torch.linspace(-100, 100, 20001).to(dtype)
    divergence, derivative = with_gradient(log_alpha, form=form)
    assert divergence.dtype == derivative.dtype == dtype
    assert divergence.isfinite().all()
    assert derivative.isfinite().all()
    assert (divergence >= 0).all()
    assert (derivative <= 0).all()


def test_zero_and_infinite_noise_and_nan() -> None:
    divergence, _ = with_gradient(torch.tensor([-math.inf, math.inf, math.nan]))
    assert divergence[0] == math.inf
    assert divergence[1] == 0
    assert divergence[2].isnan()


def test_it_falls_with_alpha_to_zero() -> None:
    divergence, derivative = with_gradient(torch.linspace(-40, 40, 4001, dtype=torch.float64))
    assert (divergence.diff() < 0).all()
    assert (derivative < 0).all()
    assert 0 < divergence[-1] < 1e-17


def test_limits() -> None:
    """KL = -log(alpha)/2 + (gamma + log 2)/2 as alpha -> 0 and 1/(2 alpha) as alpha -> infinity."""
    small, large = torch.tensor([-25.0], dtype=torch.float64), torch.tensor([18.0], dtype=torch.float64)
    divergence, derivative = with_gradient(small)
    torch.testing.assert_close(divergence, -0.5 * small + 0.5 * (EULER + math.log(2)), rtol=1e-7, atol=0)
    torch.testing.assert_close(derivative, torch.full_like(small, -0.5), rtol=1e-7, atol=0)
    divergence, derivative = with_gradient(large)
    torch.testing.assert_close(divergence, 0.5 * (-large).exp(), rtol=2e-7, atol=0)
    torch.testing.assert_close(derivative, -0.5 * (-large).exp(), rtol=2e-7, atol=0)


@pytest.mark.parametrize("size", [0, 1, 7, 8, 9, 15, 16, 17, 65])
@pytest.mark.parametrize("dtype", LIMITS, ids=str)
def test_the_sum_is_the_sum_in_blocks_of_any_size(
    size: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(vd.kl._BLOCK, "cpu", 8)
    log_alpha = torch.randn(size, dtype=dtype, generator=torch.Generator().manual_seed(size)) * 4
    one_by_one = [with_gradient(x) for x in log_alpha.split(1)]
    each, gradient = with_gradient(log_alpha)
    total, total_gradient = with_gradient(log_alpha, reduction="sum")
    if size:
        torch.testing.assert_close(each, torch.cat([d for d, _ in one_by_one]))
        torch.testing.assert_close(gradient, torch.cat([g for _, g in one_by_one]))
    torch.testing.assert_close(total, each.sum())
    assert torch.equal(total_gradient, gradient)


def test_real_block_boundary() -> None:
    block = vd.kl._BLOCK["cpu"]
    log_alpha = torch.linspace(-9, 9, block + 1)
    whole, gradient = with_gradient(log_alpha)
    for part, start in ((slice(None, block), 0), (slice(block, None), block)):
        other, other_gradient = with_gradient(log_alpha[part])
        assert torch.equal(whole[start : start + len(other)], other)
        assert torch.equal(gradient[start : start + len(other)], other_gradient)
    torch.testing.assert_close(vd.kl.log_uniform(log_alpha, reduction="sum"), whole.sum(), rtol=1e-5, atol=0)


def test_any_layout_gives_the_same() -> None:
    log_alpha = torch.randn(6, 5, 4, dtype=torch.float64)
    for view in (
        log_alpha.transpose(0, 2),
        log_alpha[::2, 1:, ::3],
        log_alpha[0, 0, 0],
        log_alpha[0:1].expand(3, 5, 4),
    ):
        divergence, gradient = with_gradient(view)
        flat, flat_gradient = with_gradient(view.contiguous().view(-1))
        assert divergence.shape == view.shape
        torch.testing.assert_close(divergence.reshape(-1), flat)
        torch.testing.assert_close(gradient.reshape(-1), flat_gradient)


def test_sum_of_half_precision_keeps_its_digits() -> None:
    """A sum over 10^5 weights kept in bfloat16 would be off by up to half a per cent."""
    layer = torch.nn.Linear(300, 300)
    vd.convert_(layer, vd.VariationalDropout(type="B", sharing="weight", alpha=math.exp(-2.0)))
    for posterior in (vd.GaussianPosterior(std=math.exp(-2.0)), vd.SparseVariationalDropout(log_variance=-10.0)):
        other = torch.nn.Linear(300, 300)
        torch.nn.init.constant_(other.weight, 0.5)
        vd.convert_(other, posterior)
        full = vd.kl_divergence(other).item()
        assert vd.kl_divergence(other.bfloat16()).item() == pytest.approx(full, rel=1e-4)
    full = vd.kl_divergence(layer).item()
    assert full == pytest.approx(90000 * 1.544154645, rel=1e-4)
    assert vd.kl_divergence(layer.bfloat16()).item() == pytest.approx(full, rel=1e-4)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # by dynamo
def test_function_transforms_and_compile() -> None:
    log_alpha = torch.randn(3, 4, dtype=torch.float64)
    expected, gradient = with_gradient(log_alpha)
    torch.testing.assert_close(vmap(vd.kl.log_uniform)(log_alpha), expected)
    torch.testing.assert_close(vmap(vd.kl.log_uniform, in_dims=1, out_dims=1)(log_alpha), expected)
    total = vmap(lambda x: vd.kl.log_uniform(x, reduction="sum"), in_dims=1)
    torch.testing.assert_close(total(log_alpha), expected.sum(0))
    by_row = vmap(torch.func.grad(lambda x: vd.kl.log_uniform(x, reduction="sum")))
    torch.testing.assert_close(by_row(log_alpha), gradient)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: vd.kl.log_uniform(x, reduction="sum"), fullgraph=True, backend="eager")
    x = log_alpha.clone().requires_grad_()
    compiled(x).backward()
    torch.testing.assert_close(x.grad, gradient)


@pytest.mark.parametrize("form", ["exact", "cubic", "sigmoid"])
def test_the_bound_is_a_projection(form: str) -> None:
    """Beyond the bound the value is that of the bound, and where the divergence is minimised its gradient is 0."""
    log_alpha = torch.tensor([-1.0, 0.0, 2.0], dtype=torch.float64)
    divergence, gradient = with_gradient(log_alpha, form=form, max_log_alpha=0.0)
    inside, inside_gradient = with_gradient(log_alpha.clamp(max=0), form=form)
    torch.testing.assert_close(divergence, inside)
    torch.testing.assert_close(gradient, inside_gradient * torch.tensor([1.0, 0.0, 0.0]))


# ------------------------------------------------------------------------------------------------ other forms, priors


def test_sigmoid_is_close_to_the_exact_form() -> None:
    log_alpha = torch.linspace(-30, 30, 6001, dtype=torch.float64)
    error = (vd.kl.log_uniform(log_alpha, form="sigmoid") - vd.kl.log_uniform(log_alpha)).abs()
    assert error.max() < 0.0094
    assert error.max() > 0.008  # and it is an approximation


def test_cubic_is_close_where_it_holds_and_refuses_where_not() -> None:
    log_alpha = torch.linspace(-12, 0, 1001, dtype=torch.float64)
    error = (vd.kl.log_uniform(log_alpha, form="cubic") - vd.kl.log_uniform(log_alpha)).abs()
    assert error.max() < 0.04
    assert error[-1] < 1e-7  # the constant is matched at alpha = 1
    derivative = with_gradient(log_alpha, form="cubic")[1]
    alpha = log_alpha.exp()  # the paper's coefficients, each with its own power of alpha
    expected = -(0.5 + 1.16145124 * alpha - 2 * 1.50204118 * alpha**2 + 3 * 0.58629921 * alpha**3)
    torch.testing.assert_close(derivative, expected)
    with pytest.raises(ValueError, match=r"holds for alpha <= 1 only, got log_alpha up to 0.5; bound alpha"):
        vd.kl.log_uniform(torch.tensor([-1.0, 0.5]), form="cubic")
    assert vd.kl.log_uniform(torch.empty(0), form="cubic").shape == (0,)


def test_ard_is_the_best_gaussian_prior() -> None:
    """N(theta, alpha theta^2) from N(0, s^2), minimised over s, by search."""
    for log_alpha in (-4.0, 0.0, 3.0):
        alpha, theta = math.exp(log_alpha), torch.tensor(0.7, dtype=torch.float64)
        s = torch.logspace(-2, 2, 200001, dtype=torch.float64)
        best = vd.kl.gaussian(theta, torch.log(alpha * theta**2), s).min()
        torch.testing.assert_close(vd.kl.ard(torch.tensor(log_alpha, dtype=torch.float64)), best, rtol=1e-6, atol=0)


def test_gaussian_against_torch_distributions() -> None:
    normal = torch.distributions.Normal
    mean, log_variance = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64) * 3
    for prior_std in (0.1, 1.0, 7.0):
        truth = torch.distributions.kl_divergence(normal(mean, (0.5 * log_variance).exp()), normal(0.0, prior_std))
        torch.testing.assert_close(vd.kl.gaussian(mean, log_variance, prior_std), truth)
        torch.testing.assert_close(vd.kl.gaussian(mean, log_variance, torch.tensor(prior_std).double()), truth)
    assert vd.kl.gaussian(torch.zeros(1), torch.zeros(1)) == 0  # q = p


def test_refusals() -> None:
    with pytest.raises(TypeError, match=r"log_alpha must be a floating-point tensor, got torch\.int64"):
        vd.kl.log_uniform(torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match="reduction must be 'none' or 'sum', got 'mean'"):
        vd.kl.log_uniform(torch.zeros(2), reduction="mean")
    with pytest.raises(ValueError, match="form must be 'exact', 'cubic' or 'sigmoid', got 'Exact'"):
        vd.kl.log_uniform(torch.zeros(2), form="Exact")
    for bad in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="prior_std must be positive"):
            vd.kl.gaussian(torch.zeros(1), torch.zeros(1), bad)


# ---------------------------------------------------------------------------------------------------- a whole model


@pytest.mark.parametrize(
    "config",
    [
        vd.VariationalDropout(type="A", sharing="layer", alpha=1.0),
        vd.VariationalDropout(type="A", sharing="neuron", alpha=1.0),
        vd.VariationalDropout(type="B", sharing="layer", alpha=1.0),
        vd.VariationalDropout(type="B", sharing="neuron", unit="output", alpha=1.0),
        vd.VariationalDropout(type="B", sharing="weight", alpha=1.0),
        vd.GaussianDropout(type="A", alpha=1.0),
        vd.GaussianDropout(type="B", alpha=1.0),
    ],
    ids=repr,
)
def test_a_sum_over_scalars_however_many_layers(config: vd.VariationalDropout | vd.GaussianDropout) -> None:
    """One layer cut into two along its outputs has the same KL for B, and for A that of its inputs twice."""
    one, two = torch.nn.Linear(4, 6), torch.nn.ModuleList([torch.nn.Linear(4, 2), torch.nn.Linear(4, 4)])
    vd.convert_(one, config)
    vd.convert_(two, config)
    type_a = config.type == "A"
    assert vd.kl_divergence(one).item() == pytest.approx((4 if type_a else 24) * TABLE[0][0], rel=1e-5)
    assert vd.kl_divergence(two).item() == pytest.approx((8 if type_a else 24) * TABLE[0][0], rel=1e-5)


def test_a_tied_weight_counts_once() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(5, 5), torch.nn.Linear(5, 5))
    net[1].weight = net[0].weight
    vd.convert_(net, vd.VariationalDropout(type="B", alpha=1.0, sharing="layer"))
    assert vd.kl_divergence(net).item() == pytest.approx(25 * TABLE[0][0], rel=1e-5)
