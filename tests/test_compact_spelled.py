"""Layers of other libraries, which inherit from torch's and call its functions themselves, get smaller like torch's."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import architectures
import vardrop as vd
from test_compact import assert_same, parameters, zeroed
from vardrop.sparsity.norms import CompactLayerNorm
from vardrop.sparsity.rebuild import Select


class NormAct(nn.BatchNorm2d):
    """A batch norm, dropout and an activation in one, as timm has them."""

    def __init__(self, size: int, activation: nn.Module | None = None) -> None:
        super().__init__(size)
        self.drop, self.act = nn.Dropout(0.5), activation or nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        torch._assert(x.ndim == 4, "four axes")
        use = self.training or (self.running_mean is None and self.running_var is None)
        y = F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, use, 0.1, self.eps)
        return self.act(self.drop(y))


class ImageNorm(nn.LayerNorm):
    """A layer norm over the channels of an image, as torchvision has it."""

    def forward(self, input: Tensor) -> Tensor:
        x = input.permute(0, 2, 3, 1)
        x = F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)
        return x.permute(0, 3, 1, 2)


class PlainNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RootNorm(nn.RMSNorm):
    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight, self.eps)


class Groups(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return F.silu(F.group_norm(input, self.num_groups, self.weight, self.bias, self.eps))


class Dense(nn.Linear):
    """No forward of its own."""


class SameConv(nn.Conv2d):
    """As large an output as the input, whatever the kernel."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(F.pad(input, (1, 1, 1, 1)), self.weight, self.bias, self.stride, (0, 0), self.dilation)


class Standardised(nn.Conv2d):
    """Its weights are computed, so it is no convolution with weights of its own."""

    def forward(self, input: Tensor) -> Tensor:
        return F.conv2d(input, self.weight - self.weight.mean(), self.bias)


class Narrower(nn.LayerNorm):
    """Of a size that it asks its input for."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, (input.shape[-1],), self.weight, self.bias, self.eps)


def images(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 8, 3), *middle, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3))


def rows(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(5, 8), *middle, nn.Linear(8, 3))


IMAGE, ROW = (2, 6, 6), (5,)
# ours, torch's, the shape of an example
CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm": (lambda: images(NormAct(8)), lambda: images(nn.BatchNorm2d(8), nn.ReLU()), IMAGE),
    "with PReLU": (
        lambda: images(NormAct(8, nn.PReLU(8))), lambda: images(nn.BatchNorm2d(8), nn.PReLU(8)), IMAGE,
    ),
    "layer norm": (lambda: rows(PlainNorm(8)), lambda: rows(nn.LayerNorm(8)), ROW),
    "no weights": (
        lambda: rows(PlainNorm(8, elementwise_affine=False)), lambda: rows(nn.LayerNorm(8, elementwise_affine=False)),
        ROW,
    ),
    "RMS norm": (lambda: rows(RootNorm(8)), lambda: rows(nn.RMSNorm(8)), ROW),
    "group norm": (lambda: images(Groups(2, 8)), lambda: images(nn.GroupNorm(2, 8), nn.SiLU()), IMAGE),
    "linear": (
        lambda: rows(nn.Tanh(), Dense(8, 8), nn.Tanh()), lambda: rows(nn.Tanh(), nn.Linear(8, 8), nn.Tanh()), ROW,
    ),
    "convolution": (
        lambda: images(nn.Tanh(), SameConv(8, 8, 3), nn.Tanh()),
        lambda: images(nn.Tanh(), nn.ZeroPad2d(1), nn.Conv2d(8, 8, 3), nn.Tanh()), IMAGE,
    ),
}  # fmt: skip


class FixedEps(nn.LayerNorm):
    """Its code has a number where torch's has a setting."""

    def forward(self, input: Tensor) -> Tensor:
        return F.layer_norm(input, self.normalized_shape, self.weight, self.bias, 1e-3)


CASES["number in its code"] = lambda: rows(FixedEps(8)), lambda: rows(nn.LayerNorm(8, 1e-3)), ROW


@pytest.mark.parametrize("for_inference", [False, True])
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("seed", range(3))
def test_as_small_as_with_the_layers_of_torch(name: str, seed: int, for_inference: bool) -> None:
    ours, of_torch, shape = CASES[name]
    model, reference = (zeroed(make(), 0.7, seed) for make in (ours, of_torch))
    before = parameters(model)
    x = torch.randn(2, *shape, dtype=torch.float64)
    small, other = (vd.compact(each, x, for_inference=for_inference) for each in (model, reference))
    assert_same(model, small, *shape)
    assert parameters(small) == parameters(other)
    assert parameters(model) == before
    assert for_inference or parameters(small) < before  # a plain norm of a stream has weights, if it had none before


@pytest.mark.parametrize("name", ["batch norm", "with PReLU", "linear", "convolution"])
def test_they_keep_their_class_and_their_names(name: str) -> None:
    make, _, shape = CASES[name]
    model = zeroed(make(), 0.5)
    with torch.no_grad():
        model[0].weight[5:] = 0.0
        model[0].bias[5:] = 0.0
    small = vd.compact(model, torch.randn(2, *shape, dtype=torch.float64))
    kinds = (NormAct, Dense, SameConv)
    assert [type(m) for m in small.modules() if isinstance(m, kinds)] == [
        type(m) for m in model.modules() if isinstance(m, kinds)
    ]
    assert not any("of_torch" in each for each in (*small.state_dict(), *small.compaction.changed))
    x = torch.randn(4, *shape, dtype=torch.float64)
    small.train()(x).sum().backward()  # the class's own code runs


def test_sizes_are_told_and_a_smaller_norm_learns_its_statistics() -> None:
    model = zeroed(images(NormAct(8)), 1.0)
    with torch.no_grad():
        model[0].weight[3:] = 0.0
    small: Any = vd.compact(model, torch.randn(2, *IMAGE, dtype=torch.float64))
    left = small[1].num_features
    assert left < 8
    assert small[1].running_mean.shape == small[1].weight.shape == (left,)
    told = [text.partition(",")[0] for text in small.compaction.changed["1"]]
    assert told == ["BatchNorm2d(8", f"BatchNorm2d({left}"]
    before = small[1].running_mean.clone()
    small.train()(torch.randn(4, *IMAGE, dtype=torch.float64))
    assert not torch.equal(small[1].running_mean, before)


def test_a_norm_of_an_image_counts_the_constants_that_went() -> None:
    model = images(ImageNorm(8)).double().eval()
    with torch.no_grad():
        model[0].weight[3:] = 0.0
        model[0].bias[3:] = torch.arange(5.0)
    x = torch.randn(2, *IMAGE, dtype=torch.float64)
    small = vd.compact(model, x)
    assert_same(model, small, *IMAGE)
    assert any(isinstance(module, CompactLayerNorm) for module in small.modules())
    assert small.get_submodule("0").out_channels == 3
    stored = io.BytesIO()
    torch.save(small, stored)
    stored.seek(0)
    assert torch.equal(torch.load(stored, weights_only=False)(x), small(x))


@pytest.mark.parametrize(
    "make",
    [lambda: images(Standardised(8, 8, 3)), lambda: nn.Sequential(nn.Linear(5, 3), Narrower(3), nn.Linear(3, 3))],
    ids=["conv", "norm"],
)
def test_what_does_something_else_stays(make: Callable[[], nn.Module]) -> None:
    model: Any = zeroed(make(), 0.5)
    shape = IMAGE if isinstance(model[0], nn.Conv2d) else ROW
    small = vd.compact(model, torch.randn(2, *shape, dtype=torch.float64))
    assert_same(model, small, *shape)
    assert type(small[1]) is type(model[1])


def test_a_layer_with_hooks_or_a_shared_weight_stays() -> None:
    model = zeroed(images(NormAct(8), NormAct(8)), 0.5)
    model[1].register_forward_hook(lambda module, args, output: None)
    model[2].weight = model[1].weight
    small = vd.compact(model, torch.randn(2, *IMAGE, dtype=torch.float64))
    assert_same(model, small, *IMAGE)
    assert [small[place].num_features for place in (1, 2)] == [8, 8]


def test_a_layer_alone() -> None:
    norm = zeroed(NormAct(4), 1.0)
    small = vd.compact(norm, torch.randn(2, 4, 3, 3, dtype=torch.float64))
    assert type(small) is NormAct
    assert_same(norm, small, 4, 3, 3)


class Switched(nn.Module):
    """A head whose last layer can be switched off, which ``torch.fx`` cannot follow for a symbol."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor, before_last: bool = False, times: int = 1) -> Tensor:
        x = self.first(x).relu()
        for _ in range(times):
            x = x * 1.5
        return x if before_last else self.last(x)


@pytest.mark.parametrize("inside", [False, True])
def test_switches_and_numbers_have_their_defaults(inside: bool) -> None:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), Switched()) if inside else Switched()
    shape = (5,) if inside else (6,)
    model = zeroed(model, 0.5)
    head = model.get_submodule("2" if inside else "")
    with torch.no_grad():
        head.get_submodule("last").weight[:, 2:] = 0.0
    small = vd.compact(model, torch.randn(2, *shape, dtype=torch.float64))
    assert_same(model, small, *shape)
    assert not any("traced" in why for why in small.compaction.left.values())
    new: Any = small.get_submodule("2" if inside else "")
    assert new.first.out_features <= 2
    if not inside:  # its own code is still there, with its switch
        assert new(torch.randn(2, 6, dtype=torch.float64), True).shape == (2, new.first.out_features)


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "densenet121", "convnext_atto"])
def test_networks_of_timm_get_smaller(name: str) -> None:
    """Half of the rows of each layer are zeros: more than a third of the parameters go."""
    pytest.importorskip("timm")
    model, _ = architectures.image_network(name)
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] > 5:
            dead = torch.rand(len(module.weight), generator=generator) < 0.5
            for parameter in module._parameters.values():
                if parameter is not None:
                    parameter.data[dead] = 0.0
    model = model.double().eval()
    kinds = {type(module) for module in model.modules() if not list(module.children())}
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    small = vd.compact(copy.deepcopy(model), x)
    assert_same(model, small, 3, 64, 64, batch=1)
    before, after = small.compaction.parameters
    assert after < 0.65 * before
    if name != "convnext_atto":
        assert {type(module) for module in small.modules() if not list(module.children())} <= kinds | {Select}
