"""Layers of activation noise one by one: what is particular to each, and those that wrap another layer."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.func import jacrev

import vardrop as vd
from contract import assert_mean, assert_moments
from vardrop import functional as F
from vardrop import layers, rates


def realised(p: float) -> float:
    """The rate of sixteen random bits that is nearest."""
    return round(p * 2**16) / 2**16


# ------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize("shape", [(3, 4), (2, 3, 4, 5, 6)])
def test_channels_and_how_many_dimensions(shape: tuple[int, ...]) -> None:
    with pytest.raises(
        ValueError, match="Dropout2d: x must have channels and 2 spatial dimensions, with or without a ba"
    ):
        layers.Dropout2d(0.5)(torch.ones(shape))


def test_a_rate_that_cannot_learn_is_not_learned() -> None:
    with pytest.raises(TypeError, match=r"vardrop.Dropout: p must be a number or a schedule, got learned\(0.1\)"):
        layers.Dropout(rates.learned(0.1))


def test_words_where_they_are_needed_and_only_there() -> None:
    x, words = torch.ones(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="words are dropped by type, got tokens missing with num_types=5"):
        layers.TokenDropout(0.5, num_types=5)(x)
    with pytest.raises(
        ValueError, match=r"tokens must be given where, and only where, .* got tokens given with num_types=N"
    ):
        layers.TokenDropout(0.5)(x, words)
    assert torch.equal(layers.TokenDropout(0.5, num_types=5).eval()(x, words), x)


def test_what_they_show() -> None:
    shown = [
        (layers.Dropout(0.1), "Dropout(p=0.1)"),
        (layers.LockedDropout(0.1, dim=0), "LockedDropout(p=0.1, dim=0)"),
        (layers.HeadDropout(0.1), "HeadDropout(p=0.1, dim=1)"),
        (layers.TokenDropout(0.1, num_types=7), "TokenDropout(p=0.1, num_types=7)"),
        (layers.GaussianDropout(rates.learned(0.1), features=3), "GaussianDropout(p=0.1, learned)"),
    ]
    for module, text in shown:
        assert repr(module) == text


def test_residual_dropout_drops_the_branch_alone() -> None:
    x, residual = torch.ones(1000), torch.full((1000,), 5.0)
    layer = layers.ResidualDropout(0.5)
    assert set(layer(x, residual).tolist()) == {5.0, 7.0}
    assert set(layer.eval()(x, residual).tolist()) == {6.0}


# ------------------------------------------------------------------------------------------------- learned Gaussian


def test_the_divergence_counts_random_scalars() -> None:
    layer = layers.GaussianDropout(rates.learned(0.2), features=30)
    truth = 30 * vd.kl.log_uniform(torch.tensor(math.log(0.2 / 0.8)))
    torch.testing.assert_close(vd.kl_divergence(layer), truth)
    torch.testing.assert_close(vd.dropout_rates(nn.Sequential(layer))["0"], torch.tensor(0.2))
    net = nn.Sequential(layer, nn.Linear(30, 2))
    vd.convert_(net[1], vd.VariationalDropout(type="A", sharing="layer", rate=0.2))
    torch.testing.assert_close(vd.kl_divergence(net), 2 * truth)  # the same method twice, as layer and as weight
    assert set(vd.dropout_rates(net)) == {"0", "1.weight"}


def test_only_noise_that_learns_has_a_divergence() -> None:
    net = nn.Sequential(layers.GaussianDropout(0.2), layers.Dropout(0.5))
    with pytest.raises(ValueError, match="no weight of this Sequential is random"):
        vd.kl_divergence(net)
    assert vd.dropout_rates(net) == {}
    nll = torch.tensor(1.5)
    assert vd.ELBO(net, num_data=10)(nll) == nll


def test_elbo_has_the_divergence_of_layers() -> None:
    net = nn.Sequential(layers.GaussianDropout(rates.learned(0.2), features=4), nn.Linear(4, 1))
    elbo = vd.ELBO(net, num_data=50)
    loss = elbo(net(torch.ones(3, 4)).square().mean())
    loss.backward()
    assert elbo.last.kl == pytest.approx(vd.kl_divergence(net).item())
    assert loss.item() == pytest.approx(elbo.last.nll + elbo.last.kl / 50)
    assert net[0].rate_logit.grad.isfinite()


def test_the_rate_is_learned_under_its_bound_and_comes_back() -> None:
    layer = layers.GaussianDropout(rates.learned(0.5), features=1)
    assert layer.rate == 0.5
    layer.kl().backward()
    assert layer.rate_logit.grad == 0  # descent would lead out
    layer.zero_grad()
    y = layer(torch.ones(100_000))
    (y - 1).square().mean().backward()  # E = α: descent leads in
    assert layer.rate_logit.grad > 0
    free = layers.GaussianDropout(rates.learned(0.9), features=1, max_alpha=math.inf)
    assert free.p == pytest.approx(0.9)


def test_learned_gaussian_noise_has_its_moments() -> None:
    layer = layers.GaussianDropout(rates.learned(0.3), features=4)
    y = layer(torch.full((300_000,), 2.0)).detach().double()
    assert_mean(y, torch.tensor(2.0), "mean")
    assert_mean((y - 2).square(), torch.tensor(4 * 0.3 / 0.7), "variance")
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.kl(), layer.kl())


def test_what_gaussian_dropout_refuses() -> None:
    with pytest.raises(ValueError, match=r"features must be how many units have noise of this rate, .* got None"):
        layers.GaussianDropout(rates.learned(0.2))
    with pytest.raises(
        ValueError, match=r"must start at alpha = p / \(1 - p\) up to max_alpha=1.0, got learned\(0.6\)"
    ):
        layers.GaussianDropout(rates.learned(0.6), features=3)
    with pytest.raises(ValueError, match=r"max_alpha must be above 0 \(math.inf: no bound\), got 0"):
        layers.GaussianDropout(0.2, max_alpha=0)


# -------------------------------------------------------------------------------------------------------- concrete


def test_concrete_dropout_draws_units_or_channels() -> None:
    class Seen(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.x = x
            return x

    for plain, x, axes in (
        (nn.Linear(4, 2), torch.ones(5, 3, 4), 0),
        (nn.Conv1d(4, 2, 2), torch.ones(5, 4, 6), 1),
        (nn.Conv2d(4, 2, 2, stride=2), torch.ones(5, 4, 6, 6), 2),
        (nn.Conv3d(4, 2, 2), torch.ones(5, 4, 3, 3, 3), 3),
    ):
        layer = layers.ConcreteDropout(rates.learned(0.5), plain)
        expected = plain(x).shape
        layer.layer = Seen()
        layer(x)
        seen = layer.layer.x
        flat = seen.flatten(seen.ndim - axes) if axes else seen.unsqueeze(-1)
        assert torch.equal(flat, flat[..., :1].expand_as(flat))  # one draw for a channel
        assert len(flat[..., 0].unique()) > 5  # and one each for the rest
        layer.layer = plain
        assert layer(x).shape == expected
        assert torch.equal(layer.eval()(x), plain(x))


@pytest.mark.parametrize("p", [0.0, 0.1, 0.5])
def test_concrete_regularizer(p: float) -> None:
    """The paper's eq. 4 written out, for weights that dropout scales by 1 / (1 − p)."""
    linear = nn.Linear(6, 3)
    layer = layers.ConcreteDropout(rates.learned(p) if p else 0.0, linear, length_scale=0.3)
    scaled = (linear.weight / (1 - p)).square().sum()  # M of the paper: what a kept unit meets
    entropy = -sum(q * math.log(q) for q in (p, 1 - p) if q)
    truth = 0.3**2 * (1 - p) / 2 * scaled - 6 * entropy
    torch.testing.assert_close(layer.kl(), truth)
    torch.testing.assert_close(layer.regularizer(num_data=200), truth / 200)
    torch.testing.assert_close(vd.kl_divergence(layer), truth)


def test_concrete_dropout_learns_a_rate_from_data() -> None:
    """The noise costs α ‖W‖² / 2 an example, and the entropy pays K log((1 − p) / p) / N for more of it."""
    torch.manual_seed(0)
    linear = nn.Linear(20, 1, bias=False)
    nn.init.constant_(linear.weight, 0.1)
    linear.requires_grad_(False)
    found = {}
    for name, num_data in (("few", 20), ("many", 20_000)):
        layer = layers.ConcreteDropout(rates.learned(0.2), linear)
        optimiser = torch.optim.Adam(layer.parameters(), lr=0.05)
        for _ in range(150):
            optimiser.zero_grad()
            x = torch.randn(200, 20)
            nll = (layer(x) - linear(x)).square().mean() / 2
            (nll + layer.regularizer(num_data)).backward()
            optimiser.step()
        found[name] = layer.p
    assert found["few"] == pytest.approx(0.42, abs=0.05)  # where 0.1 / (1 − p)² = log((1 − p) / p)
    assert found["many"] < 0.05  # the rate falls as the data grows


def test_what_concrete_dropout_refuses() -> None:
    with pytest.raises(TypeError, match=r"layer must be nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, got ReLU"):
        layers.ConcreteDropout(rates.learned(0.1), nn.ReLU())
    with pytest.raises(ValueError, match="length_scale must be at least 0, got -1"):
        layers.ConcreteDropout(0.1, nn.Linear(2, 2), length_scale=-1)
    with pytest.raises(ValueError, match="its temperature must be above 0, got 0"):
        layers.ConcreteDropout(0.1, nn.Linear(2, 2), temperature=0)
    with pytest.raises(ValueError, match="num_data must be the number of training examples, above 0, got 0"):
        layers.ConcreteDropout(0.1, nn.Linear(2, 2)).regularizer(0)


# ----------------------------------------------------------------------------------------------------- DropConnect


PLAIN = {
    "linear": (lambda: nn.Linear(3, 2), (2, 3)),
    "conv2d-strided": (lambda: nn.Conv2d(2, 2, 2, stride=2, padding=1, groups=2), (1, 2, 3, 3)),
    "conv-transpose": (lambda: nn.ConvTranspose1d(2, 2, 3, stride=2), (1, 2, 3)),
}


@pytest.mark.parametrize("p", [0.2, 0.5])
@pytest.mark.parametrize("name", list(PLAIN))
def test_dropconnect_has_the_moments_of_dropped_weights(name: str, p: float) -> None:
    """Mean and covariance by the Jacobian of the plain layer: y is linear in the weight."""
    torch.manual_seed(0)
    make, shape = PLAIN[name]
    plain, x = make().double(), torch.randn(shape, dtype=torch.float64)
    weight = plain.weight.detach()
    jacobian = jacrev(lambda w: torch.func.functional_call(plain, {"weight": w}, (x,)).flatten())(weight).flatten(1)
    alpha = realised(p) / (1 - realised(p))
    covariance = jacobian @ torch.diag(alpha * weight.flatten().square()) @ jacobian.T
    layer = layers.DropConnect(p, copy.deepcopy(plain))
    with torch.no_grad():
        samples = torch.stack([layer(x).flatten() for _ in range(3000)])
    assert_moments(samples, plain(x).detach().flatten(), covariance, name)
    assert torch.equal(layer.eval()(x), plain(x))


def test_dropconnect_drops_recurrent_weights_once_for_all_time() -> None:
    lstm = nn.LSTM(3, 4)
    layer = layers.DropConnect(0.5, lstm, weights="weight_hh_*")
    assert layer.names == ["weight_hh_l0"]
    x = torch.randn(6, 2, 3)
    y, _ = layer(x)
    y.sum().backward()
    grad = lstm.weight_hh_l0.grad
    assert 0.3 < (grad == 0).float().mean() < 0.7  # a dropped weight is not used at any time
    assert all(p.grad is not None for p in lstm.parameters())
    assert torch.equal(layer.eval()(x)[0], lstm(x)[0])
    assert list(dict(layer.named_parameters())) == [f"layer.{name}" for name, _ in lstm.named_parameters()]


def test_dropconnect_with_nothing_to_drop() -> None:
    with pytest.raises(ValueError, match=r"weights must match a parameter of the layer \(weight, bias\), got 'kernel'"):
        layers.DropConnect(0.5, nn.Linear(2, 2), weights="kernel")


# ---------------------------------------------------------------------------------------------------- fast dropout


@pytest.mark.parametrize("p", [0.0, 0.2, 0.5])
def test_fast_dropout_has_the_moments_of_dropout_and_independent_outputs(p: float) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(30, 3).double()
    x = torch.randn(2, 30, dtype=torch.float64)
    layer = layers.FastDropout(p, linear)
    with torch.no_grad():
        samples = torch.stack([layer(x).flatten() for _ in range(3000)])
    variance = layer.rate.double() / (1 - layer.rate.double()) * (x.square() @ linear.weight.detach().square().T)
    assert_moments(samples, linear(x).detach().flatten(), torch.diag(variance.flatten()), "fast dropout")
    mean, spread = layer.moments(x)
    torch.testing.assert_close(mean, linear(x))
    torch.testing.assert_close(spread.detach(), variance, rtol=1e-6, atol=0)
    assert torch.equal(layer.eval()(x), linear(x))


def test_moments_through_a_network_against_sampling() -> None:
    """Two hidden layers of dropout: what is left out, that units depend on each other, is small."""
    torch.manual_seed(0)
    linears = [nn.Linear(20, 60), nn.Linear(60, 60), nn.Linear(60, 2)]
    ps = (0.1, 0.3, 0.3)
    x = torch.randn(4, 20)
    with torch.no_grad():
        sampled = x.expand(20_000, 4, 20)
        moments = x, torch.zeros_like(x)
        for i, (linear, p) in enumerate(zip(linears, ps, strict=True)):
            sampled = linear(F.drop(sampled, p))
            moments = layers.FastDropout(p, linear).eval().moments(*moments)
            if i < 2:
                sampled, moments = sampled.relu(), F.moments_relu(*moments)
    torch.testing.assert_close(moments[0], sampled.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(moments[1].sqrt(), sampled.std(0), atol=0, rtol=0.15)


CONVERTED = {
    "A": vd.VariationalDropout(rate=0.3),
    "B": vd.VariationalDropout(type="B", sharing="weight", rate=0.3),
    "mean-field": vd.GaussianPosterior(std=0.05),
}


@pytest.mark.parametrize("name", ["dropout", "gaussian", "torch", "fast", *CONVERTED])
def test_moments_of_one_layer_are_exact(name: str) -> None:
    torch.manual_seed(0)
    linear, x = nn.Linear(12, 3).double(), torch.randn(5, 12, dtype=torch.float64)
    if name in CONVERTED:
        vd.convert_(linear, CONVERTED[name])
        net = nn.Sequential(nn.Identity(), nn.Sequential(linear))
    else:
        made = {"dropout": layers.Dropout, "gaussian": layers.GaussianDropout, "torch": nn.Dropout}
        net = layers.FastDropout(0.3, linear) if name == "fast" else nn.Sequential(made[name](0.3), linear)
    with torch.no_grad():
        mean, variance = layers.propagate_moments(net.eval(), x)
        samples = torch.stack([net.train()(x) for _ in range(4000)])
        assert_mean(samples, mean, "mean")
        assert_mean((samples - mean).square(), variance, "variance")


@pytest.mark.parametrize("drop", [nn.Dropout(1.0), layers.Dropout(1.0)], ids=["torch", "ours"])
def test_moments_of_nothing(drop: nn.Module) -> None:
    mean, variance = layers.propagate_moments(nn.Sequential(drop, nn.Linear(3, 2, bias=False)), torch.ones(1, 3))
    assert not mean.any()
    assert not variance.any()


def test_a_module_that_runs_twice_counts_twice() -> None:
    drop, linear = layers.Dropout(0.5), nn.Linear(2, 2)
    x = torch.randn(3, 2)
    once = layers.propagate_moments(nn.Sequential(drop, linear), x)
    twice = layers.propagate_moments(nn.Sequential(drop, linear, drop, linear), x)
    assert torch.equal(twice[0], linear(linear(x)))
    variance = (once[1] + once[0].square() + once[1]) @ linear.weight.square().T
    torch.testing.assert_close(twice[1], variance)


def test_moments_of_a_network_are_near_those_of_its_samples() -> None:
    torch.manual_seed(0)
    body = [nn.Flatten(), nn.Linear(20, 200), nn.ReLU(), nn.Dropout(0.3), nn.Linear(200, 200), nn.ReLU()]
    net = nn.Sequential(nn.Sequential(*body), layers.Dropout(0.3), nn.Linear(200, 2))
    x = torch.randn(4, 2, 10)
    with torch.no_grad():
        samples = torch.stack([net.train()(x) for _ in range(4000)])
        mean, variance = layers.propagate_moments(net, x)
    torch.testing.assert_close(mean, samples.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(variance.sqrt(), samples.std(0), atol=0, rtol=0.1)
    vd.convert_(net, vd.VariationalDropout(type="B", rate=0.2))  # whose dropouts are off now
    with torch.no_grad():
        samples = torch.stack([net.train()(x) for _ in range(4000)])
        mean, variance = layers.propagate_moments(net, x)
    torch.testing.assert_close(mean, samples.mean(0), atol=0.02, rtol=0)
    torch.testing.assert_close(variance.sqrt(), samples.std(0), atol=0, rtol=0.1)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.Tanh(), r"got Tanh \(1\.0\); sample with vd.mc_predict instead"),
        (layers.GaussianDropout(0.5, shared=1), "got GaussianDropout"),
        (nn.Dropout1d(0.5), "got Dropout1d"),
        (layers.Dropout1d(0.5), "got Dropout1d"),
    ],
)
def test_moments_go_through_what_is_known_only(module: nn.Module, words: str) -> None:
    net = nn.Sequential(nn.Linear(2, 2), nn.Sequential(module))
    with pytest.raises(TypeError, match=words):
        layers.propagate_moments(net, torch.ones(1, 2))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_fast_dropout_in_half_precision(dtype: torch.dtype) -> None:
    layer = layers.FastDropout(0.5, nn.Linear(8, 4).to(dtype))
    x = torch.full((3, 8), 300.0, dtype=dtype)  # its square is no float16
    y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert y.isfinite().all()
    assert layer.layer.weight.grad.isfinite().all()


def test_fast_dropout_learns_where_inputs_are_zero() -> None:
    layer = layers.FastDropout(0.5, nn.Linear(3, 2))
    x = torch.zeros(2, 3, requires_grad=True)
    layer(x).sum().backward()  # no variance: the gradient of its root is 0
    assert x.grad.isfinite().all()


def test_fast_dropout_is_for_layers_that_compute_no_more_than_they_say() -> None:
    class Negative(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return -super().forward(x)

    words = r"layer must compute x W \+ b with its own parameters, got a {} with another forward or a weight that"
    with pytest.raises(TypeError, match=words.format("Negative")):
        layers.FastDropout(0.5, Negative(2, 2))
    with pytest.raises(TypeError, match=words.format("Linear")):
        layers.FastDropout(0.5, nn.utils.spectral_norm(nn.Linear(2, 2)))
    with pytest.raises(TypeError, match=words.format("ParametrizedLinear")):
        layers.FastDropout(0.5, nn.utils.parametrizations.weight_norm(nn.Linear(2, 2)))


@pytest.mark.parametrize("kind", [layers.ConcreteDropout, layers.DropConnect, layers.FastDropout])
def test_a_layer_without_a_shape_is_not_wrapped(kind: type[nn.Module]) -> None:
    lazy = nn.LazyLinear(2)
    words = f"{kind.__name__}: layer must have its weights, got a LazyLinear that is lazy and has no shape yet; run"
    with pytest.raises(TypeError, match=words):
        kind(0.3, lazy)
    lazy(torch.ones(1, 3))
    wrapped = kind(0.3, lazy)
    assert wrapped(torch.ones(4, 3)).shape == (4, 2)
    assert getattr(wrapped, "units", 3) == 3


def test_fast_dropout_is_for_linear_layers() -> None:
    with pytest.raises(TypeError, match=r"FastDropout: layer must be an nn.Linear, got Conv2d; vd.convert_"):
        layers.FastDropout(0.5, nn.Conv2d(1, 1, 1))
    with pytest.raises(TypeError, match=r"inputs must be real, as the squares of torch.complex64 are no variances"):
        layers.FastDropout(0.5, nn.Linear(2, 2))(torch.ones(1, 2, dtype=torch.complex64))
