"""Posteriors: where rates start, how they are shared, where they are bounded; what is refused, and with which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.projection import bounded
from vardrop.weights.geometry import Geometry, spread
from vardrop.weights.posteriors import Posterior


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


# ------------------------------------------------------------------------------------------------------ the projection


def test_projection_lets_inward_gradients_pass_and_stops_outward_ones() -> None:
    x = torch.tensor([-1.0, 1.0, 1.0, 3.0, 3.0], requires_grad=True)
    bounded(x, 1.0).backward(torch.tensor([-1.0, -1.0, 1.0, -1.0, 1.0]))
    assert torch.equal(bounded(x, 1.0), torch.tensor([-1.0, 1.0, 1.0, 1.0, 1.0]))
    assert x.grad.tolist() == [-1.0, 0.0, 1.0, 0.0, 1.0]
    assert bounded(x, math.inf) is x


@pytest.mark.parametrize(
    "config", [{"type": "A"}, {"type": "B", "sharing": "weight"}, {"type": "B", "sharing": "layer"}]
)
def test_a_rate_at_the_bound_can_come_back(config: dict[str, str]) -> None:
    """The divergence pushes every rate to the bound and no further; then data that hates noise bring it back."""
    layer = nn.Linear(3, 2)
    nn.init.constant_(layer.weight, 0.5)
    vd.convert_(layer, vd.VariationalDropout(alpha=1.0, **config))
    optimizer = torch.optim.SGD([layer.weight_log_alpha], lr=0.1)
    for _ in range(30):
        optimizer.zero_grad()
        vd.kl_divergence(layer).backward()
        optimizer.step()
    assert (layer.weight_log_alpha == 0).all()  # alpha = 1: dKL/d log alpha is outward, and stopped
    x = torch.ones(64, 3)
    for _ in range(60):
        optimizer.zero_grad()
        (layer(x) - x @ layer.weight.loc.T - layer.bias).square().sum().backward()
        optimizer.step()
    assert (layer.weight_log_alpha < -0.05).all()


def test_alpha_never_exceeds_its_bound() -> None:
    for config in ({"type": "A"}, {"type": "B", "sharing": "weight"}):
        layer = nn.Linear(3, 2)
        vd.convert_(layer, vd.VariationalDropout(alpha=0.4, max_alpha=0.5, **config))
        nn.init.constant_(layer.weight_log_alpha, 3.0)
        assert vd.dropout_rates(layer, as_="alpha")["weight"].max().item() == pytest.approx(0.5)
        weight = layer.weight
        if config["type"] == "A":
            torch.testing.assert_close(weight.std.square(), torch.full((3,), 0.5))
        else:
            torch.testing.assert_close(weight.variance, 0.5 * weight.loc.square())
        layer.weight_log_alpha.data.fill_(math.log(0.5))
        at_bound = vd.kl_divergence(layer).item()
        layer.weight_log_alpha.data.fill_(3.0)
        assert vd.kl_divergence(layer).item() == pytest.approx(at_bound)


# ------------------------------------------------------------------------------------------------ sharing and geometry

LAYERS = {
    # plain module, input units, output units
    "linear": (lambda: nn.Linear(4, 6), 4, 6),
    "conv2d": (lambda: nn.Conv2d(4, 6, 2), 4, 6),
    "conv2d grouped": (lambda: nn.Conv2d(4, 6, 2, groups=2), 4, 6),
    "depthwise": (lambda: nn.Conv1d(4, 8, 2, groups=4), 4, 8),
    "transposed": (lambda: nn.ConvTranspose2d(4, 6, 2), 4, 6),
    "transposed grouped": (lambda: nn.ConvTranspose2d(4, 6, 2, groups=2), 4, 6),
    "embedding": (lambda: nn.Embedding(7, 3), 7, 3),
    "bilinear": (lambda: nn.Bilinear(4, 5, 6), 4, 6),
}


@pytest.mark.parametrize("name", LAYERS)
def test_a_rate_for_every_unit(name: str) -> None:
    make, inputs, outputs = LAYERS[name]
    for sharing, unit, count in (("layer", "input", 1), ("neuron", "input", inputs), ("neuron", "output", outputs)):
        layer = make()
        vd.convert_(layer, vd.VariationalDropout(type="B", sharing=sharing, unit=unit))
        assert layer.weight_log_alpha.shape == (count,)
        assert layer.weight.variance.shape == layer.weight.shape
    layer = make()
    vd.convert_(layer, vd.VariationalDropout(type="A"))
    assert layer.weight.std.shape == (inputs,)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scaling_the_units_of_the_weight_is_scaling_the_channels(groups: int) -> None:
    """What an input or output unit of a grouped convolution is, told by the convolution itself."""
    x, scale_in, scale_out = torch.randn(2, 4, 5, 5), torch.rand(4), torch.rand(8)
    conv = nn.Conv2d(4, 8, 3, groups=groups, bias=False)
    geometry = Geometry(tuple(conv.weight.shape), 1, 0, groups)
    plain = conv(x)
    for which, scale in (("input", scale_in), ("output", scale_out)):
        scaled = nn.functional.conv2d(x, conv.weight * geometry.spread(scale, which), groups=groups)
        expected = conv(x * scale.view(-1, 1, 1)) if which == "input" else plain * scale.view(-1, 1, 1)
        torch.testing.assert_close(scaled, expected)
    back = nn.ConvTranspose2d(4, 8, 3, groups=groups, bias=False)
    geometry = Geometry(tuple(back.weight.shape), 0, 1, groups)
    for which, scale in (("input", scale_in), ("output", scale_out)):
        scaled = nn.functional.conv_transpose2d(x, back.weight * geometry.spread(scale, which), groups=groups)
        expected = back(x * scale.view(-1, 1, 1)) if which == "input" else back(x) * scale.view(-1, 1, 1)
        torch.testing.assert_close(scaled, expected)


def test_spread() -> None:
    assert spread(torch.arange(3), (2, 3, 1), 1).shape == (1, 3, 1)
    assert Geometry((2, 3)).spread(torch.ones(1), "input").shape == (1, 1)
    assert Geometry((2, 3)).spread(torch.ones(2, 3), "input").shape == (2, 3)


# --------------------------------------------------------------------------------------------------------- the numbers


def test_where_rates_start() -> None:
    def start(config: Posterior) -> float:
        layer = nn.Linear(3, 2)
        vd.convert_(layer, config)
        return vd.dropout_rates(layer)["weight"].flatten()[0].item()

    assert start(vd.VariationalDropout()) == pytest.approx(0.2)
    assert start(vd.VariationalDropout(rate=0.3)) == pytest.approx(0.3)
    assert start(vd.VariationalDropout(alpha=1.0)) == pytest.approx(0.5)
    assert start(vd.GaussianDropout(rate=0.9)) == pytest.approx(0.9)
    assert start(vd.VariationalDropout(rate=0.9, max_alpha=math.inf)) == pytest.approx(0.9)


def test_fast_dropout_has_the_moments_of_bernoulli_dropout() -> None:
    """Wang and Manning: type B of rate p samples the pre-activation with the mean and variance of dropout itself."""
    p, x = 0.3, torch.randn(6, dtype=torch.float64)
    layer = nn.Linear(6, 4, bias=False).double()
    masks = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 6)  # all 64 of them
    probability = ((1 - p) ** masks.sum(1)) * (p ** (6 - masks.sum(1)))
    y = layer(x * masks / (1 - p)).detach()
    mean = probability @ y
    variance = probability @ (y - mean).square()
    vd.convert_(layer, vd.GaussianDropout(type="B", rate=p))
    weight = layer.weight
    torch.testing.assert_close(weight.loc @ x, mean)
    torch.testing.assert_close(weight.variance @ x.square(), variance)


def test_sparse_variance_is_that_of_the_clipped_log_alpha() -> None:
    layer = nn.Linear(3, 2).double()
    vd.convert_(layer, vd.SparseVariationalDropout(log_variance=-3.0))
    nn.init.zeros_(layer._parameters["weight"][0])
    nn.init.constant_(layer._parameters["weight"][1], 100.0)
    log_alpha = vd.dropout_rates(layer, as_="log_alpha")["weight"]
    assert (log_alpha[0] == 8).all()
    assert (log_alpha[1] == -8).all()
    assert (layer.weight.variance[0] == 0).all()
    torch.testing.assert_close(layer.weight.variance[1], torch.full((3,), math.exp(-8) * 1e4, dtype=torch.float64))
    (layer(torch.ones(4, 3, dtype=torch.float64)).sum() + vd.kl_divergence(layer)).backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("value", [-30.0, -3.0, 30.0], ids=["below the clip", "inside", "above the clip"])
def test_gradients_of_sparse_variance_and_divergence(value: float) -> None:
    """The functions with gradients by hand against plain autograd of the formula, clipped and not."""
    theta = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    noise = torch.full((4, 3), value, dtype=torch.float64, requires_grad=True)
    layer = nn.Linear(3, 4).double()
    vd.convert_(layer, vd.SparseVariationalDropout(log_variance=value))
    with torch.no_grad():
        layer._parameters["weight"].copy_(theta)
    log_alpha = (noise - theta.square().log()).clamp(-8, 8)
    weights = torch.rand(4, 3, dtype=torch.float64)
    naive = (weights * log_alpha.exp() * theta.square()).sum() + vd.kl.log_uniform(log_alpha).sum()
    ours = (weights * layer.weight.variance).sum() + vd.kl_divergence(layer)
    torch.testing.assert_close(ours, naive)
    expected = torch.autograd.grad(naive, [theta, noise])
    found = torch.autograd.grad(ours, [layer._parameters["weight"], layer.weight_log_variance])
    torch.testing.assert_close(found, expected)


def test_variance_of_a_zero_weight() -> None:
    """Relative noise on nothing is nothing, and no gradient is lost to a logarithm."""
    for config in (vd.VariationalDropout(type="B", sharing="weight"), vd.GaussianPosterior(prior="log_uniform")):
        layer = nn.Linear(3, 2)
        nn.init.zeros_(layer.weight)
        vd.convert_(layer, config)
        (layer(torch.ones(4, 3)).square().sum() + vd.kl_divergence(layer)).backward()
        assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("prior", ["log_uniform", "cubic", "sigmoid", "ard", "gaussian"])
def test_priors(prior: str) -> None:
    log_alpha = torch.tensor(-1.0, dtype=torch.float64)
    layer = nn.Linear(3, 2).double()
    vd.convert_(layer, vd.VariationalDropout(type="B", alpha=math.exp(-1), prior=prior, prior_std=0.7))
    theta = layer.weight.loc.detach()
    expected = {
        "log_uniform": lambda: 6 * vd.kl.log_uniform(log_alpha),
        "cubic": lambda: 6 * vd.kl.log_uniform(log_alpha, form="cubic"),
        "sigmoid": lambda: 6 * vd.kl.log_uniform(log_alpha, form="sigmoid"),
        "ard": lambda: 3 * torch.log1p((-log_alpha).exp()),
        "gaussian": lambda: torch.distributions.kl_divergence(
            torch.distributions.Normal(theta, (0.5 * log_alpha).exp() * theta.abs()),
            torch.distributions.Normal(0.0, 0.7),
        ).sum(),
    }[prior]()
    torch.testing.assert_close(vd.kl_divergence(layer).double(), expected, rtol=1e-6, atol=0)


# ------------------------------------------------------------------------------------------------------ refusals

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (vd.VariationalDropout, {"type": "C"}, r"type must be 'A' \(correlated\) or 'B' \(independent noise\), got 'C'"),
    (vd.VariationalDropout, {"sharing": "row"}, "sharing must be one of layer, neuron, weight, got 'row'"),
    (vd.VariationalDropout, {"type": "B", "unit": "row"}, "unit must be 'input' or 'output', got 'row'"),
    (
        vd.VariationalDropout,
        {"sharing": "weight"},
        "type 'A' has one random factor for every input unit.*sharing='weight'",
    ),
    (vd.VariationalDropout, {"unit": "output"}, "type 'A' has one random factor for every input unit.*unit='output'"),
    (
        vd.VariationalDropout,
        {"alpha": 0.5, "rate": 0.5},
        r"give alpha or rate, not both \(alpha = rate / \(1 - rate\)\)",
    ),
    (vd.VariationalDropout, {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
    (vd.VariationalDropout, {"alpha": math.nan}, "alpha must be positive and finite, got nan"),
    (vd.VariationalDropout, {"alpha": math.inf}, "alpha must be positive and finite, got inf"),
    (vd.VariationalDropout, {"rate": 0.0}, "rate must be above 0 and below 1, got 0.0"),
    (vd.VariationalDropout, {"rate": 1.0}, "rate must be above 0 and below 1, got 1.0"),
    (
        vd.VariationalDropout,
        {"rate": 0.6},
        r"alpha must start at or below max_alpha=1\.0, got alpha=1\.5; raise max_alpha",
    ),
    (vd.VariationalDropout, {"alpha": 3.0}, r"alpha must start at or below max_alpha=1\.0, got alpha=3"),
    (vd.VariationalDropout, {"max_alpha": 0.0}, r"max_alpha must be positive \(math\.inf for no bound\), got 0\.0"),
    (
        vd.VariationalDropout,
        {"prior": "cubic", "max_alpha": 2.0},
        "prior='cubic' holds for alpha <= 1 and needs max_alpha <= 1",
    ),
    (
        vd.VariationalDropout,
        {"prior": "flat"},
        "prior must be one of log_uniform, cubic, sigmoid, ard, gaussian, got 'flat'",
    ),
    (vd.VariationalDropout, {"prior": "gaussian", "prior_std": 0.0}, "prior_std must be positive, got 0.0"),
    (vd.GaussianDropout, {"rate": 1.0}, "rate must be above 0 and below 1, got 1.0"),
    (vd.GaussianDropout, {"rate": -0.1}, "rate must be above 0 and below 1, got -0.1"),
    (vd.GaussianPosterior, {"std": 0.0}, "std must be positive and finite, got 0.0"),
    (vd.GaussianPosterior, {"std": math.inf}, "std must be positive and finite, got inf"),
    (vd.GaussianPosterior, {"prior": "cubic"}, "prior must be another than 'cubic', for alpha has no bound here"),
    (vd.GaussianPosterior, {"prior_std": -1.0}, "prior_std must be positive, got -1.0"),
    (vd.SparseVariationalDropout, {"log_variance": math.nan}, "log_variance must be finite, got nan"),
    (vd.SparseVariationalDropout, {"clip": 0.0}, "clip must be above 0 and at most 40, got 0.0"),
    (vd.SparseVariationalDropout, {"clip": 41.0}, "clip must be above 0 and at most 40, got 41.0"),
    (vd.SparseVariationalDropout, {"sharing": "row"}, "sharing must be one of layer, neuron, weight, got 'row'"),
    (vd.SparseVariationalDropout, {"unit": "row"}, "unit must be 'input' or 'output', got 'row'"),
    (
        vd.SparseVariationalDropout,
        {"prior": "gaussian"},
        "prior must be one of log_uniform, sigmoid, ard, got 'gaussian'",
    ),
]


@pytest.mark.parametrize(
    ("config", "options", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_options_out_of_range_are_refused(config: type, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"vardrop\.{config.__name__}: .*{words}"):
        config(**options)


def test_the_base_is_no_posterior() -> None:
    with pytest.raises(TypeError, match="use one of its kinds, for example"):
        Posterior()


def test_configs_are_values() -> None:
    assert vd.VariationalDropout(rate=0.1) == vd.VariationalDropout(rate=0.1)
    assert len({vd.VariationalDropout(), vd.VariationalDropout(), vd.VariationalDropout(type="B")}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        vd.VariationalDropout().type = "B"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["lokal", "", None])
def test_estimators_have_names(name: object) -> None:
    with pytest.raises(ValueError, match="name must be one of local, per_example, per_minibatch, flipout, none, got"):
        vd.estimator(name)  # type: ignore[arg-type]


def test_chunks_have_an_example() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1 example, got 0"):
        vd.estimator("per_example", chunk=0)


def test_an_embedding_that_rewrites_its_weight_cannot_have_a_random_one() -> None:
    layer = nn.Embedding(3, 2)
    vd.convert_(layer, vd.VariationalDropout())
    with pytest.raises(ValueError, match=r"with max_norm=1\.0 rewrites its weight in place and cannot have a random"):
        F.embedding(torch.tensor([0]), layer.weight, max_norm=1.0)
    layer.max_norm = 1.0
    with pytest.raises(ValueError, match="rewrites its weight in place"):
        layer(torch.tensor([0]))


def test_the_divergence_of_a_flat_gaussian_prior() -> None:
    with pytest.raises(ValueError, match=r"prior_std must be positive, got 0\.0"):
        vd.kl.gaussian(torch.zeros(1), torch.zeros(1), prior_std=0.0)


def test_the_cubic_refuses_a_fixed_alpha_above_one() -> None:
    with pytest.raises(ValueError, match=r"prior='cubic' holds for alpha <= 1, got 1.5"):
        vd.GaussianDropout(alpha=1.5, prior="cubic")
    with pytest.raises(ValueError, match=r"prior='cubic' holds for alpha <= 1, got 4.0"):
        vd.GaussianDropout(rate=0.8, prior="cubic")


def test_a_rate_is_taken_as_it_is_given() -> None:
    for rate in (1e-6, 0.99999):
        layer = nn.Linear(2, 2)
        vd.convert_(layer, vd.GaussianDropout(rate=rate))
        torch.testing.assert_close(vd.dropout_rates(layer)["weight"], torch.tensor([rate]))
