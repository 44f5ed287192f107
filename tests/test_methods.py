import math

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.methods import METHODS, prepare
from vardrop.weights.modules import RandomWeights, noisy_weights

SHAPE = (1, 8, 8)
PLAIN = ("none", "binary")
LEARNED = ("vd-a", "vd-a2", "vd-b")


def posteriors(model: nn.Module) -> list:
    return [config for _, _, _, config, _ in noisy_weights(model)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("spec", ["mlp:2x20", "conv:0.25"])
def test_every_method_runs_is_random_in_training_only_and_learns(method, spec):
    torch.manual_seed(0)
    model, kl_scale, report = prepare(method, spec, SHAPE, 10)
    x = torch.rand(8, *SHAPE)
    assert torch.equal(model(x), model(x)) is (method == "none")
    loss = model(x).square().mean()
    if report is not None:
        loss = loss + kl_scale * vd.kl_divergence(model)
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    model.eval()
    assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("method", METHODS)
def test_only_the_plain_methods_have_no_random_weights(method):
    model, kl_scale, report = prepare(method, "mlp:2x20", SHAPE, 10)
    assert (report is None) is (method in PLAIN)
    assert any(isinstance(m, RandomWeights) for m in model.modules()) is (method not in PLAIN)
    assert (kl_scale == 0) is (method in PLAIN)
    left = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]
    assert left == {"binary": [0.2, 0.5, 0.5]}.get(method, [0.0] * len(left))  # never dropout twice


@pytest.mark.parametrize("method", ["gaussian-a", "gaussian-b", *LEARNED])
def test_rates_start_where_dropout_has_them(method):
    """p = 0.2 and 0.5 (Kingma et al. 2015, section 5); p = 0.5 is the bound α = 1 of section 3.4."""
    model, _, report = prepare(method, "mlp:2x20", SHAPE, 10)
    means = [rates.mean().item() for rates in vd.dropout_rates(model).values()]
    assert means == pytest.approx([0.2, 0.5, 0.5])
    assert report.replaced == {"1": 0.2, "4": 0.5, "7": 0.5}


def test_fixed_rates_stay_in_front_of_linear_layers_and_learned_ones_are_everywhere():
    for method in METHODS:
        model, _, report = prepare(method, "conv:0.25", SHAPE, 10)
        if report is not None:
            noisy = {type(m) for m in model.modules() if isinstance(m, RandomWeights)}
            convolutions = any(issubclass(kind, nn.Conv2d) for kind in noisy)
            assert convolutions is (not method.startswith("gaussian")), method
    rates = vd.dropout_rates(prepare("vd-a", "conv:0.25", SHAPE, 10)[0])
    assert [round(r.mean().item(), 4) for r in rates.values()] == [0.2, 0.2, 0.5, 0.5, 0.5]


def test_what_each_name_stands_for():
    kinds = {name: type(posteriors(prepare(name, "mlp:5", (4,), 2)[0])[0]) for name in METHODS if name not in PLAIN}
    assert kinds == {
        "gaussian-a": vd.GaussianDropout,
        "gaussian-b": vd.GaussianDropout,
        "vd-a": vd.VariationalDropout,
        "vd-a2": vd.VariationalDropout,
        "vd-b": vd.VariationalDropout,
        "sparse-vd": vd.SparseVariationalDropout,
        "mean-field": vd.GaussianPosterior,
    }
    types = {name: METHODS[name].config(None).type for name in ("gaussian-a", "gaussian-b", *LEARNED)}
    assert types == {"gaussian-a": "A", "gaussian-b": "B", "vd-a": "A", "vd-a2": "A", "vd-b": "B"}
    assert all(m.config(None).sharing == m.default_sharing for m in METHODS.values() if m.sharings)
    scales = {name: method.kl_scale for name, method in METHODS.items() if method.config is not None}
    assert scales.pop("vd-a2") == pytest.approx(1 / 3)  # section 5: downscaled with a factor of 3
    assert set(scales.values()) == {1.0}


@pytest.mark.parametrize(
    ("method", "sharing", "shapes"),
    [
        ("vd-a", None, [(64,), (20,)]),
        ("vd-b", None, [(64,), (20,)]),
        ("vd-a2", "layer", [(1,), (1,)]),
        ("vd-b", "layer", [(1,), (1,)]),
        ("vd-b", "weight", [(20, 64), (10, 20)]),
        ("sparse-vd", None, [(20, 64), (10, 20)]),
        ("sparse-vd", "neuron", [(20,), (10,)]),
    ],
)
def test_sharing(method, sharing, shapes):
    model = prepare(method, "mlp:20", SHAPE, 10, sharing)[0]
    assert [tuple(rates.shape) for rates in vd.dropout_rates(model).values()] == shapes


def test_gaussian_a_and_binary_dropout_have_the_same_mean_and_variance():
    """α = p / (1 - p): both multiply every input by noise of mean 1 and variance p / (1 - p)."""
    draws = 20_000
    moments = {}
    for method in ("binary", "gaussian-a"):
        torch.manual_seed(1)
        model = prepare(method, "mlp:5", (6,), 1)[0]
        first = nn.Sequential(*list(model)[:2])  # dropout and the first linear layer
        x = torch.linspace(-1, 1, 6).expand(draws, 6)
        with torch.no_grad():
            y = first(x).double()
        moments[method] = y.mean(0), y.var(0)
    (mean, var), (other_mean, other_var) = moments.values()
    torch.testing.assert_close(mean, other_mean, rtol=0, atol=6 * math.sqrt(2 * var.max() / draws))
    torch.testing.assert_close(var, other_var, rtol=6 * math.sqrt(2 * 4 / draws), atol=0)  # s.e. for kurtosis up to 5


@pytest.mark.parametrize("method", [name for name in METHODS if not METHODS[name].sharings])
def test_sharing_belongs_to_the_methods_that_share(method):
    with pytest.raises(
        ValueError,
        match=rf"sharing must be left out .*\(vd-a, vd-a2, vd-b, sparse-vd\), got sharing='layer' with {method}",
    ):
        prepare(method, "mlp:5", (4,), 2, "layer")


@pytest.mark.parametrize(("method", "sharing"), [("vd-a", "weight"), ("vd-a2", "weight"), ("vd-b", "neurons")])
def test_sharings_that_a_method_has_not(method, sharing):
    with pytest.raises(ValueError, match=rf"sharing of {method} must be one of layer, neuron.*, got '{sharing}'"):
        prepare(method, "mlp:5", (4,), 2, sharing)


def test_unknown_method():
    with pytest.raises(ValueError, match=r"method must be one of none, binary, .*, got 'vd-a3'; did you mean vd-a"):
        prepare("vd-a3", "mlp:5", (4,), 2)
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        prepare("zzz", "mlp:5", (4,), 2)
