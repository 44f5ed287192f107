"""Smaller networks compute the same, and nothing that could go has stayed."""

from __future__ import annotations

import copy
import io
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.sparsity import channels


def zeroed(model: nn.Module, keep: float, seed: int = 0) -> nn.Module:
    """Weights at random zero, whole rows and columns among them; every norm with statistics of its own; float64."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> Tensor:
        return torch.rand(*shape, generator=generator)

    with torch.no_grad():
        for module in model.modules():
            for weight in module._parameters.values():
                if weight is not None and weight.ndim > 1:
                    weight.copy_(rand(*weight.shape) - 0.5)
                    mask = (rand(*weight.shape) < keep) & (rand(len(weight)) < 0.8).view(-1, *[1] * (weight.ndim - 1))
                    mask &= (rand(weight.shape[1]) < 0.8).view(1, -1, *[1] * (weight.ndim - 2))
                    weight.mul_(mask)
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                size = module.num_features
                module.weight.copy_(rand(size) * (rand(size) < 0.7))
                module.bias.copy_(rand(size) - 0.5)
                module.running_mean.copy_(rand(size))
                module.running_var.copy_(rand(size) + 0.1)
    return model.double().eval()


def assert_same(model: nn.Module, small: nn.Module, *shape: int, batch: int = 5) -> None:
    x = 3 * torch.randn(batch, *shape, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


def parameters(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


# --------------------------------------------------------------------------------------------------- architectures


def mlp(widths: list[int], activation: Callable[[], nn.Module] = nn.Tanh, bias: bool = True) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after, bias=bias), activation()]
    return nn.Sequential(*layers[:-1])


def lenet5() -> nn.Sequential:
    convs = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*convs, nn.Flatten(), nn.Linear(256, 40), nn.ReLU(), nn.Dropout(), nn.Linear(40, 10))


class WithSizes(nn.Module):
    """A LeNet as textbooks write it, with sizes in its code."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3)
        self.bn = nn.BatchNorm2d(8)
        self.fc1 = nn.Linear(8 * 3 * 3, 20)
        self.fc2 = nn.Linear(20, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.bn(self.conv(x))), 2)
        x = x.view(-1, 72)
        return F.log_softmax(self.fc2(torch.sigmoid(self.fc1(x))), dim=1)


class Residual(nn.Module):
    """A small ResNet: a stem, two blocks, one with a projection, a mean over positions."""

    def __init__(self, padding: int = 1) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=padding)
        self.a1, self.n1 = nn.Conv2d(6, 7, 3, padding=1, bias=False), nn.BatchNorm2d(7)
        self.a2, self.n2 = nn.Conv2d(7, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.b1, self.b2 = nn.Conv2d(6, 5, 1), nn.Conv2d(5, 8, 1)
        self.short = nn.Conv2d(6, 8, 1)
        self.relu = nn.ReLU(inplace=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.stem(x))
        x = self.relu(x + self.n2(self.a2(self.relu(self.n1(self.a1(x))))))
        y = self.b2(torch.tanh(self.b1(x)))
        y += self.short(x)
        return self.head(self.relu(y).mean((2, 3)))


class Dense(nn.Module):
    """Concatenation of channels, as in DenseNets and U-Nets, a depthwise convolution and a way up."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(2, 5, 3, padding=1), nn.Conv2d(5, 4, 3)
        self.depthwise, self.norm = nn.Conv2d(4, 4, 3, padding=1, groups=4), nn.BatchNorm2d(4)
        self.up = nn.ConvTranspose2d(4, 6, 3)
        self.last = nn.Conv2d(11 + 2, 3, 1)
        self.prelu = nn.PReLU(4)

    def forward(self, x: Tensor) -> Tensor:
        a = F.gelu(self.first(x))
        b = self.prelu(self.norm(self.depthwise(self.second(a))))
        return self.last(torch.cat([a, torch.relu(self.up(b)), x], 1))


class Squeeze(nn.Module):
    """Channels times a gate of each, as in squeeze-and-excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.down, self.up = nn.Conv2d(1, 6, 3), nn.Linear(6, 3), nn.Linear(3, 6)
        self.last = nn.Conv2d(6, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.conv(x))
        gate = self.up(torch.relu(self.down(x.mean((2, 3))))).sigmoid()
        x = x * gate[:, :, None, None] + gate.unsqueeze(2).unsqueeze(-1)
        return self.last(x.permute(0, 3, 1, 2).transpose(1, 2).permute((0, 1, 3, 2)))


class Gates(nn.Module):
    """Products and differences of tensors and numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(4, 9), nn.Linear(4, 9), nn.Linear(9, 2)

    def forward(self, x: Tensor) -> Tensor:
        gated = self.value(x) * self.gate(x).sigmoid()
        return self.out((1 - gated) / 2 + gated.abs())


class Scaled(nn.Module):
    """A stream whose branches have weights of their own for the channels, written in four ways."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.last = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 3, 1)
        self.branches = nn.ModuleList(nn.Conv2d(6, 6, 1) for _ in range(4))
        for name in ("first", "second", "third"):
            self.register_parameter(name, nn.Parameter(torch.rand(6)))
        self.fourth = nn.Parameter(torch.rand(6, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.branches[0](x).mul(self.first.reshape(1, -1, 1, 1))
        x = x + self.second.view(-1, 1, 1) * self.branches[1](x)
        x = x + self.branches[2](x) * self.third[:, None, None]
        return self.last(x + self.branches[3](x) * self.fourth)


class Chunks(nn.Module):
    """Halves and thirds of the channels, gates of the halves, and parts of positions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 12), nn.Linear(6, 12), nn.Linear(4, 12)
        self.glu, self.last = nn.GLU(), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.first(x).chunk(2, dim=-1)
        x = self.second(F.silu(a) * b)
        _, left, right = torch.chunk(x, 3, 2)
        x = self.third(left * 2 + right.tanh())
        before, after = x.chunk(2, 1)
        return self.last(self.glu(before) + F.glu(after, 2))


class Padded(nn.Module):
    """Borders of zeros, of another number, and of what is there."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(2, 6, 3), nn.Conv2d(6, 5, 3), nn.Conv2d(5, 4, 3)
        self.pads = nn.ModuleList([nn.ZeroPad2d(1), nn.ConstantPad2d(2, 0.5), nn.ReflectionPad2d(1)])
        self.last = nn.Conv2d(4, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(F.pad(self.pads[0](torch.sigmoid(self.first(x))), (1, 0, 2, 1)))
        x = self.third(F.pad(self.pads[1](x.relu()), [1, 1], value=0.5))
        return self.last(F.pad(self.pads[2](x), (1, 1, 1, 1), mode="replicate"))


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (lambda: mlp([7, 9, 8, 3]), (7,)),
    "mlp of sequences": (lambda: mlp([7, 9, 8, 3]), (4, 7)),
    "mlp without biases": (lambda: mlp([7, 9, 8, 3], nn.Softplus, bias=False), (7,)),
    "lenet-5": (lenet5, (1, 28, 28)),
    "sizes in the code": (WithSizes, (1, 8, 8)),
    "residual": (Residual, (2, 6, 6)),
    "concatenation": (Dense, (2, 6, 6)),
    "gates": (Gates, (4,)),
    "batch norm": (lambda: nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.ELU(), nn.Linear(8, 2)), (5,)),
    "batch norm first": (lambda: nn.Sequential(nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 2)), (5,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(5, 8), nn.LayerNorm(8), nn.ReLU(), nn.Linear(8, 2)), (5,)),
    "squeeze": (Squeeze, (1, 5, 5)),
    "conv1d": (lambda: nn.Sequential(nn.Conv1d(3, 6, 3), nn.AvgPool1d(2, padding=1), nn.Conv1d(6, 2, 2)), (3, 9)),
    "groups": (lambda: nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 6, 1, groups=2), nn.Conv2d(6, 2, 1)), (2, 3, 3)),
    "scaled": (Scaled, (2, 6, 6)),
    "chunks": (Chunks, (2, 4)),
    "padded": (Padded, (2, 6, 6)),
    "reflection": (
        lambda: nn.Sequential(
            nn.Conv2d(2, 6, 3), nn.Sigmoid(), nn.Conv2d(6, 4, 3, padding=1, padding_mode="reflect"), nn.Conv2d(4, 2, 1)
        ),
        (2, 6, 6),
    ),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("inference", [False, True])
def test_the_smaller_network_is_the_same_function(name: str, inference: bool) -> None:
    make, shape = MODELS[name]
    for keep, seed in ((0.15, 0), (0.4, 1), (0.02, 2)):
        model = zeroed(make(), keep, seed)
        before = copy.deepcopy(model.state_dict())
        small = vd.compact(model, torch.randn(2, *shape, dtype=torch.float64), for_inference=inference)
        assert_same(model, small, *shape)
        assert parameters(small) < parameters(model) or name == "groups"
        assert small.compaction.parameters == (parameters(model), parameters(small))
        assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_random_networks_are_the_same_function(data: st.DataObject) -> None:
    """Convolutions, norms, pools, sums and concatenations, drawn one after the other."""
    draw, modules, plan = data.draw, nn.ModuleList(), []
    width = start = draw(st.integers(1, 4))
    for _ in range(draw(st.integers(1, 5))):
        kind = draw(st.sampled_from(["conv", "norm", "act", "sum", "cat", "depthwise", "pool"]))
        if kind in ("conv", "sum", "cat"):
            out = width if kind == "sum" else draw(st.integers(1, 6))
            size = draw(st.sampled_from([1, 3]))
            modules.append(nn.Conv2d(width, out, size, padding=size // 2, bias=draw(st.booleans())))
            width = width + out if kind == "cat" else out
        elif kind == "norm":
            modules.append(nn.BatchNorm2d(width))
        elif kind == "depthwise":
            modules.append(nn.Conv2d(width, width, 3, padding=1, groups=width))
        else:
            kinds = (nn.ReLU, nn.Sigmoid, nn.GELU) if kind == "act" else (lambda: nn.AvgPool2d(3, 1, padding=1),)
            modules.append(draw(st.sampled_from(kinds))())
        plan.append(kind)
    modules.append(nn.Linear(width * 9, draw(st.integers(1, 4))))

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.steps = modules

        def forward(self, x: Tensor) -> Tensor:
            for kind, step in zip(plan, self.steps, strict=False):
                y = step(x)
                x = x + y if kind == "sum" else torch.cat([x, y], 1) if kind == "cat" else y
            return self.steps[-1](x.flatten(1))

    model = zeroed(Net(), draw(st.sampled_from([0.05, 0.2, 0.5])), draw(st.integers(0, 1000)))
    small = vd.compact(model, torch.randn(2, start, 3, 3, dtype=torch.float64), for_inference=draw(st.booleans()))
    assert_same(model, small, start, 3, 3)
    biases = sum(m.out_channels for m in modules if isinstance(m, nn.Conv2d) and m.bias is None)  # may have to be made
    assert parameters(small) <= parameters(model) + biases


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 8), min_size=3, max_size=5), st.integers(0, 1000), st.sampled_from([0.1, 0.3, 0.6]))
def test_units_stay_if_they_vary_and_matter(widths: list[int], seed: int, keep: float) -> None:
    """The truth by brute force: a unit's values over many inputs, and the slopes of the outputs by it."""
    model = zeroed(mlp(widths), keep, seed)
    small = vd.compact(model, torch.randn(2, widths[0], dtype=torch.float64), select_inputs=False)
    x = torch.randn(64, widths[0], dtype=torch.float64)
    for index in range(1, len(model), 2):
        hidden = model[: index + 1](x).detach().requires_grad_()
        outputs = model[index + 1 :](hidden)
        slopes = torch.stack([torch.autograd.grad(y.sum(), hidden, retain_graph=True)[0] for y in outputs.T])
        alive = (hidden.std(0) > 1e-12) & (slopes.abs().amax((0, 1)) > 0)
        assert small[index - 1].out_features == max(1, int(alive.sum()))


class Noting(nn.Module):
    """Keeps what it saw, and what it computed once, as attention biases are kept."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.seen: Tensor | None = None
        self.cache: dict[str, Tensor] = {}
        self.history: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.first(x).tanh()
        self.history.append(self.seen)
        if not self.cache:
            self.cache["bias"] = torch.arange(3.0) * 2
        return self.second(self.seen) + self.cache["bias"]


def test_nothing_of_the_tracing_stays_in_the_modules() -> None:
    model = zeroed(nn.Sequential(Noting()), 0.5)
    small = vd.compact(model, torch.randn(1, 4, dtype=torch.float64))
    assert_same(model, small, 4)
    noting: Any = small[0]
    assert all(type(each) is Tensor for each in (noting.seen, *noting.cache.values(), *noting.history))
    assert not small.compaction.left or "traced" not in str(small.compaction.left)
    copy.deepcopy(small)


class Asking(nn.Module):
    """Its code asks of what kind its input is, for which a symbol has another answer."""

    def __init__(self, otherwise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second, self.otherwise = nn.Linear(4, 6), nn.Linear(6, 3), otherwise

    def forward(self, x: Tensor) -> Tensor:
        x = x if isinstance(x, Tensor) else self.otherwise(x)
        return self.second(self.first(x).relu())


@pytest.mark.parametrize(
    ("otherwise", "words"),
    [
        (lambda x: x * 2, "computes something else as torch.fx traced it: its code asks what kind of input it gets"),
        (lambda x: x["nothing"], r"does not run as torch.fx traced it \(.*\)"),
    ],
)
def test_code_that_asks_for_the_kind_of_its_input_stays(otherwise: Callable[[Tensor], Tensor], words: str) -> None:
    model = zeroed(Asking(otherwise), 0.5)
    small = vd.compact(model, torch.randn(2, 4, dtype=torch.float64))
    assert_same(model, small, 4)
    with pytest.raises(AssertionError, match=f"^{words}$"):
        raise AssertionError(small.compaction.left["Asking"])


@pytest.mark.parametrize("kind", ["chunk", "glu"])
def test_hidden_units_of_a_gate_go_where_both_halves_may(kind: str) -> None:
    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.outer = nn.Linear(4, 12), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            if kind == "glu":
                return self.outer(F.glu(self.inner(x)))
            value, gate = self.inner(x).chunk(2, -1)
            return self.outer(value * F.silu(gate))

    model = Gated().double()
    with torch.no_grad():
        model.inner.weight[0], model.inner.bias[0] = 0, 0  # nothing times a gate
        model.inner.weight[[1, 7]] = 0  # constants
        model.inner.weight[8] = 0  # a gate that stands still
        model.outer.weight[:, 5] = 0  # nothing reads it
    small = vd.compact(model, torch.randn(2, 4, dtype=torch.float64))
    assert small.get_submodule("inner").out_features == 6
    assert small.get_submodule("outer").in_features == 3
    assert_same(model, small, 4)


def test_weights_of_channels_go_with_their_channels() -> None:
    model = Scaled().double()
    with torch.no_grad():
        for layer in (model.stem, *model.branches):
            layer.weight[2:] = 0
    small = vd.compact(model, torch.randn(1, 2, 6, 6, dtype=torch.float64))
    assert_same(model, small, 2, 6, 6)
    shapes = [tuple(small.get_parameter(name).shape) for name in ("first", "second", "third", "fourth")]
    assert shapes == [(2,), (2,), (2,), (2, 1, 1)]


def test_constants_are_folded_through_a_whole_network() -> None:
    """Nothing depends on the input: one unit a layer, and the output is the constant that it was."""
    model = mlp([4, 6, 5, 3]).double()
    with torch.no_grad():
        model[0].weight.zero_()
    small = vd.compact(model, torch.randn(1, 4, dtype=torch.float64))
    assert_same(model, small, 4)
    assert [m.out_features for m in small.modules() if isinstance(m, nn.Linear)] == [1, 1, 3]


def test_pixels_without_weights_are_selected_away() -> None:
    model = mlp([40, 6, 3]).double()
    with torch.no_grad():
        model[0].weight[:, 5:] = 0
    example = torch.randn(1, 40, dtype=torch.float64)
    small = vd.compact(model, example)
    assert small[0][1].in_features == 5
    assert_same(model, small, 40)
    assert vd.compact(model, example, select_inputs=False)[0].in_features == 40


FLATTENS: dict[str, Callable[[Tensor], Tensor]] = {
    "flatten method": lambda x: x.flatten(1),
    "flatten function": lambda x: torch.flatten(x, start_dim=1),
    "view of sizes": lambda x: x.view(x.size(0), -1),
    "view of shape": lambda x: x.view((x.shape[0], -1)),
    "view of numbers": lambda x: x.view(-1, 24),
    "reshape": lambda x: x.reshape(-1, 24),
    "mean": lambda x: x.mean((2, 3), keepdim=True).expand(-1, -1, 2, 2).flatten(1),
}


@pytest.mark.parametrize("flatten", FLATTENS.values(), ids=FLATTENS)
def test_channels_go_through_a_flatten_however_it_is_spelled(flatten: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.out = nn.Conv2d(1, 6, 2), nn.Linear(24, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(flatten(F.relu(self.conv(x))))

    model = Net().double()
    with torch.no_grad():
        model.conv.weight[:3] = 0  # constants
        model.out.weight[:, 4 * 4 : 5 * 4] = 0  # nothing reads channel 4
        model.out.weight[:, 5 * 4 + 1] = 0  # and a part of channel 5
    small = vd.compact(model, torch.randn(2, 1, 3, 3, dtype=torch.float64))
    assert_same(model, small, 1, 3, 3)
    if flatten is FLATTENS["mean"]:  # expand writes the channels anew
        assert "expand() is not known here" in small.compaction.left["conv"]
    else:
        assert (small.conv.out_channels, small.out.in_features) == (2, 8)


def test_channels_of_sums_and_concatenations_go() -> None:
    model = Residual().double().eval()
    with torch.no_grad():
        for conv, norm in ((model.stem, None), (model.a2, model.n2)):
            conv.weight[:2] = 0  # the same channels on both sides of the sum
            if conv.bias is not None:
                conv.bias[:2] = 0
            if norm is not None:
                norm.bias[:2] = 0
        for conv in (model.b2, model.short):
            conv.weight[5] = 0
        model.head.weight[:, 7] = 0
    small = vd.compact(model, torch.randn(2, 2, 6, 6, dtype=torch.float64))
    assert_same(model, small, 2, 6, 6)
    assert (small.stem.out_channels, small.a2.out_channels, small.n2.num_features) == (4, 4, 4)
    assert (small.b2.out_channels, small.short.out_channels, small.head.in_features) == (6, 6, 6)
    dense = Dense().double().eval()
    with torch.no_grad():
        dense.first.weight[3] = 0
        dense.up.weight[:, 4] = 0
        dense.last.weight[:, 5] = 0
    small = vd.compact(dense, torch.randn(2, 2, 6, 6, dtype=torch.float64))
    assert_same(dense, small, 2, 6, 6)
    assert (small.first.out_channels, small.up.out_channels, small.last.in_channels) == (4, 4, 10)


def test_channels_go_through_gates() -> None:
    model = Squeeze().double().eval()
    with torch.no_grad():
        model.last.weight[:, 1:3] = 0
        model.down.weight[:, 1:3] = 0
    small = vd.compact(model, torch.randn(2, 1, 5, 5, dtype=torch.float64))
    assert_same(model, small, 1, 5, 5)
    assert (small.conv.out_channels, small.up.out_features, small.last.in_channels) == (4, 4, 4)


@pytest.mark.parametrize("transposed", [False, True])
def test_of_constants_at_a_padding_one_stays_for_all_and_is_told(transposed: bool) -> None:
    last = nn.ConvTranspose2d(6, 2, 3) if transposed else nn.Conv2d(6, 2, 3, padding=1)
    model = nn.Sequential(nn.Conv2d(1, 6, 1), nn.Sigmoid(), last).double()
    with torch.no_grad():
        model[0].weight[1:5] = 0
    small = vd.compact(model, torch.randn(1, 1, 4, 4, dtype=torch.float64))
    assert small[0].out_channels == 3
    told = "1 of 6 output channels could go, but one constant other than 0 at a zero padding stays for all of them"
    assert told in str(small.compaction)
    assert_same(model, small, 1, 4, 4)


def test_a_constant_at_a_padding_is_carried_by_one_that_the_layer_had_no_weight_for() -> None:
    """Two layers read the same constants; each would have kept another one."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Conv2d(1, 6, 1)
            self.left, self.right = nn.Conv2d(6, 2, 3, padding=1), nn.Conv2d(6, 2, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            x = self.first(x).sigmoid()
            return self.left(x) + self.right(x)

    model = Net().double()
    with torch.no_grad():
        model.first.weight[2:] = 0
        model.left.weight[:, 4:] = 0
        model.right.weight[:, 2:4] = 0
    small = vd.compact(model, torch.randn(1, 1, 4, 4, dtype=torch.float64))
    assert small.get_submodule("first").out_channels == 3
    assert_same(model, small, 1, 4, 4)


@pytest.mark.parametrize("edge", [0.0, 0.5, None])
def test_a_constant_goes_through_a_border_of_its_value(edge: float | None) -> None:
    pad: nn.Module = nn.ReflectionPad2d(1) if edge is None else nn.ConstantPad2d(1, edge)
    model = nn.Sequential(nn.Conv2d(1, 3, 1), nn.Sigmoid(), pad, nn.Conv2d(3, 2, 3)).double()
    with torch.no_grad():
        model[0].weight[1], model[0].bias[1] = 0, 0  # a sigmoid of 0.5
    small = vd.compact(model, torch.randn(1, 1, 4, 4, dtype=torch.float64))
    assert small[0].out_channels == (3 if edge == 0 else 2)
    assert_same(model, small, 1, 4, 4)


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (nn.LayerNorm((3, 6)), "takes mean and variance over positions too, with a weight for each"),
        (nn.Softmax(-1), r"1 \(Softmax\) is not known here"),
    ],
)
def test_what_couples_all_channels_keeps_them_and_is_told(module: nn.Module, words: str) -> None:
    model = nn.Sequential(nn.Linear(4, 6), module, nn.Linear(6, 2))
    model = zeroed(model, 0.9).float()
    with torch.no_grad():
        model[0].weight[2] = 0
    small = vd.compact(model, torch.randn(2, 3, 4))
    assert small[0].out_features == 6
    with pytest.raises(AssertionError, match=words):
        raise AssertionError(small.compaction.left["0"])


LEFT: dict[str, Callable[[Tensor], Tensor]] = {
    "has 2 groups of several channels, which must stay of one size": nn.Conv2d(6, 4, 1, groups=2),
    "has 2 groups, which must stay of one size": nn.ConvTranspose2d(6, 4, 1, groups=2),
    "is not known here with other arguments than one tensor": lambda x: torch.relu(input=x),
    "changes in place what is used elsewhere too": lambda x: F.relu(x, inplace=True) + x,
    "takes more than one tensor, in a way that is not known here": lambda x: torch.where(x > 0, x, x.sin()),
    "changes in place what is used elsewhere": lambda x: x.chunk(2, 1)[0].tanh_() + x.sum(),
    "asks for the number of channels": lambda x: x.cos() * x.shape[1],
    "has more than two arguments": lambda x: torch.add(x, x.sin(), alpha=2),
    "joins something else than numbers and tensors of the same channels": lambda x: x + x[:, :1],
    "rearranges the channels": lambda x: x.view(x.shape[0], 2, 3, -1),
    "flattens other axes than those after the first": lambda x: x.flatten(2),
    "takes all axes together": lambda x: x.mean(),
    "is taken over the channels": lambda x: x.mean(1),
    "works along the channels": lambda x: F.avg_pool3d(x, 3, 1, 1),
    "works along axis 3, where the channels do not lie": nn.Linear(4, 2),
    "has no running statistics, and so takes those of the batch": nn.BatchNorm2d(6, track_running_stats=False),
    "pads by a size that is computed": lambda x: F.pad(x, x.shape[2:]),
    "takes a part of the tensor": lambda x: x[:, 1:],
    "is not known here for parts of different sizes": lambda x: x.chunk(4, 1)[0],
    "is not known here": lambda x: torch.cat(x.chunk(2, 1), 1),
}


@pytest.mark.parametrize("words", LEFT)
def test_reasons_are_given_for_what_is_left(words: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 6, 1)
            self.step = LEFT[words]

        def forward(self, x: Tensor) -> Tensor:
            return self.step(self.conv(x))

    model = Net().double().eval()
    with torch.no_grad():
        model.conv.weight[2] = 0
        model.conv.bias[2] = 0
    small = vd.compact(model, torch.randn(2, 1, 4, 4, dtype=torch.float64))
    assert small.conv.out_channels == 6
    assert words in small.compaction.left["conv"]


class Twice(nn.Module):
    """A layer that is called twice, and one whose weight is used by hand."""

    def __init__(self) -> None:
        super().__init__()
        self.shared, self.tied, self.out = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.shared(torch.relu(self.shared(x))))
        return self.out(F.linear(self.tied(x), self.tied.weight))


def test_shared_modules_and_tied_weights_stay_whole() -> None:
    model = zeroed(Twice(), 0.3)
    small = vd.compact(model, torch.randn(2, 6, dtype=torch.float64))
    assert_same(model, small, 6)
    assert small.shared.weight.shape == small.tied.weight.shape == (6, 6)
    tied = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 2))
    tied[2].weight = tied[0].weight
    zeroed(tied, 0.3)
    small = vd.compact(tied, torch.randn(2, 5, dtype=torch.float64))
    assert_same(tied, small, 5)
    assert small[2].weight is small[0].weight


def test_what_stays_whole_is_told_where_it_has_dead_units() -> None:
    model = Twice().double()
    with torch.no_grad():
        model.shared.weight[:2] = 0.0
        model.tied.weight[:, 4] = 0.0
    small = vd.compact(model, torch.randn(2, 6, dtype=torch.float64))
    assert_same(model, small, 6)
    assert small.compaction.left["shared"] == (
        "is called more than once: stays whole, though 2 of 6 rows and 0 of 6 columns of its weight are zeros"
    )
    assert small.compaction.left["tied"] == (
        "has a parameter that is read elsewhere: stays whole, though 0 of 6 rows and 1 of 6 columns of its weight are "
        "zeros"
    )
    tied = nn.Sequential(nn.Linear(5, 5), nn.ReLU(), nn.Linear(5, 5)).double()
    tied[2].weight = tied[0].weight
    with torch.no_grad():
        tied[0].weight[3] = 0.0
    left = vd.compact(tied, torch.randn(2, 5, dtype=torch.float64)).compaction.left
    assert left["0"].startswith("shares a parameter with 2: stays whole, though 1 of 5 rows")
    assert left["2"].startswith("shares a parameter with 0: stays whole")


class Branches(nn.Module):
    """Control flow that depends on the data; what is inside of it can be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = mlp([4, 9, 3])

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x)
        return y if y.sum() > 0 else -y


def test_parts_of_what_cannot_be_traced_are_treated() -> None:
    model = zeroed(Branches(), 0.3)
    small = vd.compact(model, torch.randn(2, 4, dtype=torch.float64), select_inputs=False)
    assert_same(model, small, 4)
    assert small.inner[0].out_features < 9
    assert "its code cannot be traced by torch.fx" in small.compaction.left["Branches"]


def test_hooks_and_parametrised_layers_are_left_alone() -> None:
    model = zeroed(mlp([4, 6, 6, 2]), 0.3)
    model[2].register_forward_hook(lambda module, args, output: output)
    nn.utils.parametrizations.weight_norm(model[4])
    small = vd.compact(model, torch.randn(2, 4, dtype=torch.float64))
    assert_same(model, small, 4)
    assert small[2].out_features == 6


# -------------------------------------------------------------------------------------------------------- attention


def attention_weights(layer: nn.MultiheadAttention, unread: int, constant: int) -> None:
    """One head that nothing reads, one whose values are constants."""
    width = layer.head_dim
    with torch.no_grad():
        layer.in_proj_bias.normal_()
        layer.out_proj.bias.normal_()
        layer.out_proj.weight[:, unread * width : (unread + 1) * width] = 0
        first = 2 * layer.embed_dim + constant * width
        layer.in_proj_weight[first : first + width] = 0


@pytest.mark.parametrize("batch_first", [True, False])
def test_dead_heads_go(batch_first: bool) -> None:
    torch.manual_seed(0)

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(12, 4, batch_first=batch_first)

        def forward(self, x: Tensor, padding: Tensor, mask: Tensor) -> Tensor:
            return self.attention(x, x, x, key_padding_mask=padding, attn_mask=mask)[0]

    model = Net().double().eval()
    attention_weights(model.attention, 1, 3)
    x = torch.randn(5, 5, 12, dtype=torch.float64)
    padding = torch.zeros(5, 5, dtype=torch.bool)
    padding[:, 4] = True
    per_head = torch.randn(5 * 4, 5, 5, dtype=torch.float64)
    for mask in (torch.ones(5, 5, dtype=torch.bool).triu(1), per_head):
        float_padding = padding if mask.dtype == torch.bool else torch.zeros(5, 5).double().masked_fill(padding, -1e9)
        small = vd.compact(model, (x, float_padding, mask))
        assert small.attention.num_heads == 2
        assert small.compaction.changed["attention"] == ("4 heads", "2 heads")
        torch.testing.assert_close(small(x, float_padding, mask), model(x, float_padding, mask))


def test_attention_weights_that_are_used_are_not_lost() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(4, 2)

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.attention(x, x, x)

    model = Net().eval()
    attention_weights(model.attention, 0, 0)
    with pytest.raises(
        RuntimeError, match="the smaller network must compute what the model does, got a difference of inf"
    ):
        vd.compact(model, torch.randn(3, 2, 4))


def test_heads_with_keys_of_their_own_stay() -> None:
    model = nn.MultiheadAttention(4, 2, add_zero_attn=True).eval()
    attention_weights(model, 0, 0)
    x = torch.randn(3, 2, 4)
    small = vd.compact(model, (x, x, x))
    assert "1 of 2 heads could go, but it has keys of its own" in str(small.compaction)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")  # of torch's fused path, in the dense model
@pytest.mark.parametrize("norm_first", [True, False])
def test_transformer_encoders_lose_heads_and_hidden_units(norm_first: bool) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 4, 20, batch_first=True, norm_first=norm_first, activation="gelu")
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).double().eval()
    for each in model.layers:
        attention_weights(each.self_attn, 0, 2)
        with torch.no_grad():
            each.linear1.weight[:7] = 0
            each.linear2.weight[:, 5:12] = 0
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    small = vd.compact(model, x)
    assert [(each.self_attn.num_heads, each.linear1.out_features) for each in small.layers] == [(2, 8), (2, 8)]
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[:, 4:] = True
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x))
        some, all_of = (each(x, src_key_padding_mask=padding)[:, :4] for each in (small, model))
        torch.testing.assert_close(some, all_of)
    small.train()(x).sum().backward()


def test_decoders_too() -> None:
    torch.manual_seed(0)
    model = nn.TransformerDecoderLayer(8, 2, 6).double().eval()
    attention_weights(model.multihead_attn, 1, 1)
    x = torch.randn(3, 2, 8, dtype=torch.float64)
    small = vd.compact(model, (x, x))
    assert (small.multihead_attn.num_heads, small.self_attn.num_heads) == (1, 2)
    torch.testing.assert_close(small(x, x), model(x, x))


# ------------------------------------------------------------------------------------------------- what it returns


def test_the_result_is_plain_and_in_the_same_mode() -> None:
    model = lenet5().train()
    model[8].eval()
    vd.convert_(model, vd.SparseVariationalDropout(log_variance=-5.0))
    vd.sparsify_(model, target_sparsity=0.95, allow_empty=True)
    small = vd.compact(model, torch.randn(1, 1, 28, 28))
    assert type(small[0]) is nn.Conv2d
    assert (small.training, small[8].training, small[9].training) == (True, False, True)
    assert model[0].training
    x = torch.randn(3, 1, 28, 28)
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lenet-5", "sizes in the code", "residual"])
@pytest.mark.parametrize("inference", [False, True])
def test_results_pickle_and_copy(name: str, inference: bool) -> None:
    make, shape = MODELS[name]
    small = vd.compact(zeroed(make(), 0.2), torch.randn(2, *shape, dtype=torch.float64), for_inference=inference)
    file = io.BytesIO()
    torch.save(small, file)
    file.seek(0)
    assert_same(small, torch.load(file, weights_only=False), *shape)
    assert_same(small, copy.deepcopy(small), *shape)
    assert torch.export.export(small, (torch.randn(2, *shape, dtype=torch.float64),)) is not None


def test_work_falls_with_the_parameters() -> None:
    model = mlp([10, 20, 4])
    with torch.no_grad():
        model[2].weight[:, 5:] = 0
    small = vd.compact(model, torch.randn(3, 10))
    assert small.compaction.multiply_adds == (3 * (200 + 80), 3 * (50 + 20))
    assert "parameters: 304 -> 79" in str(small.compaction)


def test_a_small_model_trains_on_and_its_zeros_can_be_held() -> None:
    model = zeroed(mlp([6, 8, 3]), 0.4)
    small = vd.compact(model, torch.randn(2, 6, dtype=torch.float64))
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)
    zeros = small[0].weight == 0 if isinstance(small[0], nn.Linear) else small[0][1].weight == 0
    with vd.finetune(small):
        small(torch.randn(4, 6, dtype=torch.float64)).square().sum().backward()
        optimizer.step()
    after = small[0].weight if isinstance(small[0], nn.Linear) else small[0][1].weight
    assert torch.equal(after == 0, zeros)


def test_a_wrong_network_is_never_returned(monkeypatch: pytest.MonkeyPatch) -> None:
    model = zeroed(mlp([4, 6, 2]), 0.5)
    with torch.no_grad():
        model[0].weight[0] = 0
        model[2].weight[:, 0] = 1
    monkeypatch.setattr(channels.Mix, "folded", lambda self, which=None: self.bias)
    with pytest.raises(RuntimeError, match="the smaller network must compute what the model does, got a difference"):
        vd.compact(model, torch.randn(2, 4, dtype=torch.float64))
    monkeypatch.setattr(channels.Each, "couple", lambda self: False)
    with pytest.raises(RuntimeError, match="the smaller network must run where the model does, got"):
        vd.compact(zeroed(Residual(), 0.2), torch.randn(2, 2, 6, 6, dtype=torch.float64))


def test_what_only_training_calls_is_told() -> None:
    class Auxiliary(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.head, self.other = nn.Linear(3, 6), nn.Linear(6, 2), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            x = self.body(x)
            return self.head(x) + self.other(x) if self.training else self.head(x)

    model = zeroed(Auxiliary(), 0.3)
    small = vd.compact(model, torch.randn(2, 3, dtype=torch.float64))
    assert_same(model, small, 3)
    assert "head" not in small.compaction.left or "they are outputs" in small.compaction.left["head"]
    assert "is not called in evaluation" in small.compaction.left["other"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_whole_way(dtype: torch.dtype) -> None:
    """Learned noise, zeros, fine-tuning, digits, a smaller network; with layers of noise of ours, in half precision."""
    torch.manual_seed(0)
    model = nn.Sequential(
        *[nn.Conv2d(1, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), vd.layers.Dropout2d(0.3), nn.Flatten()],
        *[nn.Linear(8 * 36, 30), vd.layers.GaussianDropout(0.2), nn.PReLU(30), nn.Linear(30, 3)],
    ).to(dtype)
    vd.convert_(model, vd.SparseVariationalDropout(log_variance=-4.0))
    x = torch.randn(4, 1, 8, 8, dtype=dtype)
    vd.sparsify_(model, target_sparsity=0.97)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    with vd.finetune(model):
        model(x).float().square().mean().backward()
        optimizer.step()
    rounded = vd.quantize_to_noise(model)
    small = vd.compact(rounded, x)
    assert small[-1].in_features < 30
    assert parameters(small) < 0.6 * sum(p.numel() for p in model.state_dict().values()) / 2
    torch.testing.assert_close(
        small.eval()(x), rounded.eval()(x), rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-3
    )


def test_inputs_that_the_model_does_not_take_are_refused() -> None:
    with pytest.raises(ValueError, match="example_input must be what the model takes, got one that it fails on"):
        vd.compact(mlp([4, 2]), torch.randn(2, 5))
    with pytest.raises(TypeError, match=r"compact: model must be a torch.nn.Module, got function"):
        vd.compact(mlp, torch.randn(2, 5))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.relu_(),
        lambda h: F.relu_(h),
        lambda h: F.relu(h, inplace=True),
        lambda h: h.clamp_(min=0.0),
        lambda h: h.view(len(h), -1).add_(1.0),
    ],
)
def test_a_constant_that_is_written_over_is_not_folded(change: Callable[[Tensor], Tensor]) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            change(h)
            return self.b(h)

    model = Net().double().eval()
    with torch.no_grad():
        model.a.weight[:2] = 0
        model.a.bias[:2] = -1.0
    x = torch.randn(5, 6, dtype=torch.float64)
    torch.testing.assert_close(vd.compact(model, x)(x), model(x))
