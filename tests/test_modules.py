"""Converted modules as code meets them: reading, changing, registering, pickling."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import vardrop as vd
from vardrop.weights import modules

A = vd.VariationalDropout()
B = vd.VariationalDropout(type="B", sharing="weight")
POSTERIORS = pytest.mark.parametrize(
    "config",
    [A, B, vd.GaussianPosterior(), vd.SparseVariationalDropout(), vd.GaussianDropout(type="B")],
    ids=lambda c: f"{type(c).__name__}-{getattr(c, 'type', '')}",
)


def converted(config: vd.VariationalDropout = B, size: int = 4) -> nn.Linear:
    layer = nn.Linear(size, size)
    vd.convert_(layer, config)
    return layer


def parameter(layer: nn.Module) -> Tensor:
    return dict(layer.named_parameters())["weight"]


# --- reading ----------------------------------------------------------------------------------------------------


@POSTERIORS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_weight_describes_itself(config: vd.VariationalDropout, dtype: torch.dtype) -> None:
    layer = converted(config).to(dtype)
    weight, mean = layer.weight, parameter(layer)
    assert isinstance(weight, vd.RandomWeight)
    assert not isinstance(mean, vd.RandomWeight)
    for name in "shape dtype device ndim requires_grad layout is_cuda is_leaf".split():
        assert getattr(weight, name) == getattr(mean, name), name
    assert weight.size() == mean.size()
    assert weight.size(0) == len(weight) == 4
    assert weight.dim() == 2
    assert weight.numel() == 16
    assert weight.is_floating_point()
    assert "shape=(4, 4)" in repr(weight)
    assert layer.eval().weight is mean


def test_frozen_weights_say_so() -> None:
    layer = converted()
    parameter(layer).requires_grad_(False)
    assert layer.weight.requires_grad is False


@pytest.mark.parametrize("name", ["data", "grad", "grad_fn", "no_such_thing"])
@POSTERIORS
def test_what_only_a_parameter_has_says_where_that_is(config: vd.VariationalDropout, name: str) -> None:
    words = rf"a random weight has no '{name}'; while its layer is in training.*dict\(layer\.named_parameters\(\)\)"
    with pytest.raises(AttributeError, match=words):
        getattr(converted(config).weight, name)


# --- changing ---------------------------------------------------------------------------------------------------

INITIALISERS = {
    "uniform_": (), "normal_": (), "trunc_normal_": (), "constant_": (1.0,), "ones_": (), "zeros_": (), "eye_": (),
    "xavier_uniform_": (), "xavier_normal_": (), "kaiming_uniform_": (), "kaiming_normal_": (), "orthogonal_": (),
    "sparse_": (0.5,),
}  # fmt: skip
IN_PLACE = {
    "zero_": lambda w: w.zero_(),
    "copy_": lambda w: w.copy_(torch.ones(4, 4)),
    "mul_": lambda w: w.mul_(2),
    "clamp_": lambda w: w.clamp_(0, 1),
    "data of a view": lambda w: w[1:].zero_(),
    "torch function": lambda w: torch.relu_(w),
    "torch.nn.functional": lambda w: nn.functional.relu_(w),
    "requires_grad_": lambda w: w.requires_grad_(False),
}


@POSTERIORS
@pytest.mark.parametrize("name", INITIALISERS)
def test_initialisers_are_refused_and_change_nothing(config: vd.VariationalDropout, name: str) -> None:
    layer = converted(config)
    before = parameter(layer).detach().clone()
    with pytest.raises(TypeError, match=r"would change a random weight in place.*named_parameters.*layer\.eval\(\)"):
        getattr(nn.init, name)(layer.weight, *INITIALISERS[name])
    assert torch.equal(parameter(layer), before)
    getattr(nn.init, name)(layer.eval().weight, *INITIALISERS[name])  # there it is the parameter
    assert not torch.equal(parameter(layer), before)


@POSTERIORS
@pytest.mark.parametrize("name", IN_PLACE)
def test_functions_in_place_are_refused_and_change_nothing(config: vd.VariationalDropout, name: str) -> None:
    layer = converted(config)
    before = parameter(layer).detach().clone()
    with torch.no_grad(), pytest.raises(TypeError, match="would change a random weight in place"):
        IN_PLACE[name](layer.weight)
    assert torch.equal(parameter(layer), before)
    assert parameter(layer).requires_grad


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: setattr(layer.weight, "data", torch.zeros(4, 4)),
        lambda layer: setattr(layer.weight, "grad", None),
        lambda layer: setattr(layer.weight, "requires_grad", False),
        lambda layer: layer.weight.detach().zero_(),
        lambda layer: torch._foreach_mul_([layer.weight], 2.0),
    ],
    ids=["data", "grad", "requires_grad", "detach", "foreach"],
)
def test_nothing_done_to_a_weight_is_lost_in_silence(change: object) -> None:
    with torch.no_grad(), pytest.raises((AttributeError, TypeError)):
        change(converted())  # type: ignore[operator]


def test_assignment_is_refused_but_for_a_parameter() -> None:
    layer = converted()
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight = torch.ones(4, 4)  # type: ignore[assignment]
    with pytest.raises(TypeError, match="cannot assign"):
        layer.weight += 1
    with pytest.raises((AttributeError, TypeError)):
        layer.weight[0] = 1.0  # type: ignore[index]
    new = nn.Parameter(torch.ones(4, 4))
    layer.weight = new
    assert parameter(layer) is new


def test_reset_parameters_in_training_is_refused() -> None:
    with pytest.raises(TypeError, match="would change a random weight in place"):
        converted().reset_parameters()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
        parametrizations.weight_norm,
        parametrizations.spectral_norm,
        pytest.param(nn.utils.weight_norm, marks=pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")),
        nn.utils.spectral_norm,
    ],
    ids=["prune", "parametrised weight_norm", "parametrised spectral_norm", "weight_norm", "spectral_norm"],
)
def test_reparametrising_a_converted_layer_fails(change: object, training: bool) -> None:
    """It cannot work, and is never taken for a layer without noise."""
    layer = converted().train(training)

    def use() -> None:
        change(layer)  # type: ignore[operator]
        layer.train()
        vd.kl_divergence(layer)

    with pytest.raises((TypeError, ValueError, AttributeError, RuntimeError, AssertionError)):
        use()


def test_a_lost_parameter_says_what_to_do() -> None:
    layer = converted()
    del layer._parameters["weight"]
    with pytest.raises(RuntimeError, match=r"must keep its parameter 'weight', got a VariationalLinear without it"):
        layer(torch.ones(1, 4))
    with pytest.raises(RuntimeError, match=r"undo that, or vd\.restore_ the layer before it"):
        vd.kl_divergence(layer)


@pytest.mark.parametrize("make", [nn.Linear, lambda i, o: nn.Conv1d(i, o, 1)])
def test_lost_noise_is_an_error_and_not_silence(make: object) -> None:
    layer = make(4, 4)  # type: ignore[operator]
    vd.convert_(layer, B)
    del layer.weight_log_alpha
    with pytest.raises(RuntimeError, match=r"'weight' must be random in training, but: .*weight_log_alpha"):
        layer(torch.ones(4, 4))


# --- classes ----------------------------------------------------------------------------------------------------


def test_converted_classes_are_subclasses_and_the_same_ones() -> None:
    one, other = converted(), converted(A)
    assert type(one) is type(other)
    assert type(one).__name__ == "VariationalLinear"
    assert isinstance(one, nn.Linear)
    assert type(one).__doc__ == "Linear with random weights."
    assert "in_features=4" in repr(one)
    assert "VariationalDropout(type='B', sharing='weight')" in repr(one)


def test_a_converted_class_makes_plain_modules() -> None:
    """Code that builds another layer like this one has no posterior to give it, and gets a layer without."""
    layer = nn.Embedding(5, 4)
    vd.convert_(layer, A)
    assert type(layer.from_pretrained(torch.ones(2, 4))) is nn.Embedding
    assert type(type(layer)(3, 2)) is nn.Embedding
    assert type(type(layer)(num_embeddings=3, embedding_dim=2)) is nn.Embedding


class Gated(nn.Linear):
    """A layer with a forward of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(x @ self.weight.t()) * super().forward(x)


class LowRank(nn.Module):
    """A module with two weights, and names that a converted class must leave alone."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(2, 6))
        self.up = nn.Parameter(torch.randn(5, 2))
        self.plain, self.mean = torch.ones(5), torch.zeros(5)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(nn.functional.linear(x, self.down), self.up) * self.plain + self.mean


vd.register_layer(Gated, weight=(1, 0))
vd.register_layer(LowRank, down=(1, 0), up=(1, 0))


@pytest.mark.parametrize("config", [A, B], ids=["A", "B"])
@pytest.mark.parametrize("kind", [lambda: Gated(6, 5), LowRank])
def test_registered_layers_convert_pickle_and_come_back(kind: object, config: vd.VariationalDropout) -> None:
    plain = kind().eval()  # type: ignore[operator]
    cls, x = type(plain), torch.randn(3, 6)
    layer = copy.deepcopy(plain)
    report = vd.convert_(layer, config)
    assert torch.equal(layer(x), plain(x))
    for other in (layer, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        other.train()
        assert not torch.equal(other(x), other(x))
    layer(x).square().sum().backward()
    assert all(p.grad.any() for p in report.new_parameters)
    assert vd.restore_(layer) == [cls.__name__]
    assert type(layer) is cls
    assert torch.equal(layer.eval()(x), plain(x))


def test_subclasses_of_registered_layers_are_not_included() -> None:
    class Other(Gated):
        pass

    with pytest.raises(ValueError, match="Other is a subclass of Gated that may compute something else"):
        vd.convert_(Other(2, 2), A)


def test_a_registered_layer_without_its_weight() -> None:
    class Misspelt(nn.Linear):
        pass

    class Flat(nn.Linear):
        pass

    vd.register_layer(Misspelt, wieght=(1, 0))
    with pytest.raises(ValueError, match="has no parameter 'wieght'"):
        vd.convert_(Misspelt(2, 2), A)
    vd.register_layer(Flat, weight=(2, 0))
    model = nn.Sequential(nn.Linear(2, 2), Flat(2, 2))
    report = vd.convert_(model, A)
    assert report.skipped["1"] == "has a weight of shape (2, 2), without the axes (2, 0) that it is registered with"


@pytest.mark.parametrize("plain", [nn.Linear(2, 2), int, "Linear"])
def test_only_module_classes_can_be_registered(plain: object) -> None:
    with pytest.raises(TypeError, match=r"register_layer: needs a subclass of torch\.nn\.Module, got"):
        vd.register_layer(plain, weight=(1, 0))  # type: ignore[arg-type]


def test_registering_again_or_nothing() -> None:
    class Bare(nn.Linear):
        pass

    with pytest.raises(ValueError, match="Linear is registered already"):
        vd.register_layer(nn.Linear, weight=(1, 0))
    with pytest.raises(ValueError, match="name a weight of Bare, for example"):
        vd.register_layer(Bare)


@pytest.mark.parametrize("axes", ["10", (1,), (1, 0, 2), (1, -1), (1, 0.5), 1])
def test_axes_are_a_pair(axes: object) -> None:
    class Odd(nn.Linear):
        pass

    with pytest.raises(ValueError, match=r"register_layer: weight must have two axes"):
        vd.register_layer(Odd, weight=axes)  # type: ignore[arg-type]


def test_loading_a_class_that_is_not_registered_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In another process the class is not known until it is registered there; without that it would have no noise."""
    layer = Gated(2, 2)
    vd.convert_(layer, A)
    file = pickle.dumps(layer)
    monkeypatch.delitem(modules._PLAIN, Gated)
    with pytest.raises(
        ValueError, match=r"a converted Gated can be loaded only where .*vd\.register_layer\(Gated, \.\.\.\)"
    ):
        pickle.loads(file)


def test_a_converted_model_loads_in_a_fresh_process(tmp_path: Path) -> None:
    layer = converted()
    torch.save(layer, tmp_path / "layer.pt")
    code = (
        "import sys, torch; layer = torch.load(sys.argv[1], weights_only=False); x = torch.ones(1, 4);"
        "assert not torch.equal(layer(x), layer(x)); print(type(layer).__name__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "layer.pt"], capture_output=True, text=True, check=True
    )
    assert done.stdout == "VariationalLinear\n"
