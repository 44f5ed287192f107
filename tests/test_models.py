import pytest
import torch
from torch import nn

from vardrop.models import build

IMAGE = (1, 28, 28)


def weights(model: nn.Module) -> list[tuple[int, ...]]:
    return [tuple(p.shape) for name, p in model.named_parameters() if name.endswith("weight")]


def kinds(model: nn.Module) -> list[str]:
    return [type(child).__name__ for child in model]


@pytest.mark.parametrize(
    ("spec", "shape", "expected"),
    [
        ("mlp:3x400", IMAGE, [(400, 784), (400, 400), (400, 400), (10, 400)]),
        ("mlp:256,128", (13,), [(256, 13), (128, 256), (10, 128)]),
        ("mlp:50", (3, 2), [(50, 6), (10, 50)]),
        ("lenet-300-100", IMAGE, [(300, 784), (100, 300), (10, 100)]),
        ("lenet-5", IMAGE, [(20, 1, 5, 5), (50, 20, 5, 5), (500, 800), (10, 500)]),
        ("lenet-5", (3, 32, 32), [(20, 3, 5, 5), (50, 20, 5, 5), (500, 1250), (10, 500)]),
        ("conv:1", (3, 32, 32), [(32, 3, 5, 5), (64, 32, 5, 5), (128, 4096), (128, 128), (10, 128)]),
        ("conv:0.5", IMAGE, [(16, 1, 5, 5), (32, 16, 5, 5), (64, 1568), (64, 64), (10, 64)]),
        ("conv:2", (1, 9, 6), [(64, 1, 5, 5), (128, 64, 5, 5), (256, 128 * 3 * 2), (256, 256), (10, 256)]),
    ],
)
@pytest.mark.parametrize("dropout", [None, (0.2, 0.5)])
def test_every_spec_builds_the_widths_it_says_and_runs(spec, shape, expected, dropout):
    model = build(spec, shape, 10, dropout)
    assert weights(model) == expected
    assert model(torch.rand(4, *shape)).shape == (4, 10)
    assert type(model) is nn.Sequential
    assert all(not list(child.children()) for child in model)  # flat


def test_sizes_in_the_literature():
    """LeNet-300-100 has 266,200 weights and LeNet-5 of Caffe 430,500 (Han et al. 2015)."""
    assert sum(w.numel() for w in build("lenet-300-100", IMAGE, 10).parameters() if w.ndim > 1) == 266_200
    assert sum(w.numel() for w in build("lenet-5", IMAGE, 10).parameters() if w.ndim > 1) == 430_500


def test_dropout_is_right_in_front_of_linear_layers_and_nowhere_else():
    for spec in ("mlp:2x30", "lenet-300-100", "lenet-5", "conv:1"):
        names = kinds(build(spec, IMAGE, 10, (0.2, 0.5)))
        assert all(names[i + 1] == "Linear" for i, name in enumerate(names) if name == "Dropout")
        assert names.count("Dropout") == names.count("Linear")
        assert "Dropout" not in kinds(build(spec, IMAGE, 10))


def test_the_input_has_its_own_rate():
    rates = [child.p for child in build("mlp:3x40", IMAGE, 10, (0.2, 0.5)) if isinstance(child, nn.Dropout)]
    assert rates == [0.2, 0.5, 0.5, 0.5]
    behind = [child.p for child in build("conv:1", IMAGE, 10, (0.2, 0.5)) if isinstance(child, nn.Dropout)]
    assert behind == [0.5, 0.5, 0.5]  # what the convolutions give is hidden


def test_softplus_in_conv_and_rectified_units_elsewhere():
    assert kinds(build("conv:1", IMAGE, 10)).count("Softplus") == 4
    assert "ReLU" not in kinds(build("conv:1", IMAGE, 10))
    assert kinds(build("mlp:3x40", IMAGE, 10)).count("ReLU") == 3


@pytest.mark.parametrize(
    "spec",
    ["", "mlp", "mlp:", "mlp:0x5", "mlp:3x0", "mlp:3x400x2", "mlp:5,", "mlp:-5", "mlp:3 x 4", "MLP:3x4",
     "conv", "conv:0", "conv:0.01", "conv:-1", "conv:nan", "conv:inf", "conv:1e9", "lenet", "lenet-5 ", "resnet",
     "mlp:9999999"],
)  # fmt: skip
def test_a_wrong_spec_teaches_the_syntax(spec):
    with pytest.raises(ValueError, match=r"vardrop\.models: a model must be mlp:3x400 .*conv:k.*, got "):
        build(spec, IMAGE, 10)


@pytest.mark.parametrize(("spec", "shape"), [("lenet-5", (1, 8, 8)), ("lenet-5", (13,)), ("conv:1", (13,))])
def test_convolutions_refuse_what_is_no_image(spec, shape):
    with pytest.raises(ValueError, match=r"needs images.*got examples of shape .*; an mlp takes any shape"):
        build(spec, shape, 10)


@pytest.mark.parametrize(("shape", "outputs"), [((), 10), ((0,), 10), ((5,), 0)])
def test_shape_and_outputs_are_positive(shape, outputs):
    with pytest.raises(ValueError, match="shape and outputs must be positive, got"):
        build("mlp:5", shape, outputs)


@pytest.mark.parametrize("dropout", [(1.0, 0.5), (0.2, -0.1), (0.2, float("nan"))])
def test_rates_are_in_range(dropout):
    with pytest.raises(ValueError, match=r"both rates of dropout must be in \[0, 1\), got"):
        build("mlp:5", (3,), 2, dropout)
