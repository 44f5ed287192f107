"""Norms over channels, residual streams, attention and positions: smaller networks are the same function."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.sparsity import norms
from vardrop.sparsity.attention import CompactAttention
from vardrop.sparsity.encoder import Encoder, EncoderLayer
from vardrop.sparsity.norms import CompactGroupNorm, CompactLayerNorm

DOUBLE = torch.float64
DEAD = (1, 4, 5)  # channels of a stream


@pytest.fixture(autouse=True, params=[0, 1 << 16], ids=["as if large", "small"])
def _ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer norm has a way of its own for few entries; both give the same."""
    monkeypatch.setattr(norms, "_FEW", request.param)


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters at random, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
    return model.double().eval()


def die(*layers: nn.Module, channels: tuple[int, ...] = DEAD) -> None:
    """Outputs of layers become constants."""
    with torch.no_grad():
        for layer in layers:
            layer.weight[list(channels)] = 0


def unread(*layers: nn.Module, channels: tuple[int, ...] = DEAD) -> None:
    """Nothing reads inputs of layers any more."""
    with torch.no_grad():
        for layer in layers:
            weight = layer.in_proj_weight if isinstance(layer, nn.MultiheadAttention) else layer.weight
            weight[:, list(channels)] = 0


def assert_same(model: nn.Module, small: nn.Module, *shape: int) -> None:
    x = 3 * torch.randn(5, *shape, dtype=DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)


# ------------------------------------------------------------------------------------------------------ norms alone

NORMS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "layer": (lambda: nn.LayerNorm(12), (3, 12)),
    "layer without bias": (lambda: nn.LayerNorm(12, bias=False), (12,)),
    "layer without weights": (lambda: nn.LayerNorm(12, elementwise_affine=False), (3, 12)),
    "rms": (lambda: nn.RMSNorm(12), (3, 12)),
    "rms with an eps": (lambda: nn.RMSNorm(12, eps=0.1), (3, 12)),
    "group": (lambda: nn.GroupNorm(3, 12), (12, 4, 5)),
    "group of all": (lambda: nn.GroupNorm(1, 12), (12, 4)),
    "groups of one": (lambda: nn.GroupNorm(12, 12), (12, 4)),
    "group without positions": (lambda: nn.GroupNorm(4, 12), (12,)),
    "group without weights": (lambda: nn.GroupNorm(3, 12, affine=False), (12, 4, 5)),
}


@pytest.mark.parametrize("name", NORMS)
@pytest.mark.parametrize("keep", [0.8, 0.5, 0.1])
@pytest.mark.parametrize("in_a_graph", [False, True])
def test_norms_of_what_is_left_are_those_of_all(
    name: str, keep: float, in_a_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NORMS[name]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: in_a_graph)
    norm = randomised(make())
    kind = CompactGroupNorm if isinstance(norm, nn.GroupNorm) else CompactLayerNorm
    axis = 1 if isinstance(norm, nn.GroupNorm) else len(shape)
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        stored, outputs = (torch.rand(12, generator=generator) < keep for _ in range(2))
        stored[3] = outputs[5] = True
        gone = torch.randn(12, generator=generator, dtype=DOUBLE) * 3 + 100
        x = torch.randn(2, *shape, generator=generator, dtype=DOUBLE) + 100
        at = [1] * x.ndim
        at[axis] = 12
        x.requires_grad_()
        full = torch.where(stored.view(at), x, gone.view(at))
        small = kind(norm, stored, gone, outputs)
        expected = norm(full).index_select(axis, outputs.nonzero().flatten())
        given = x.detach().index_select(axis, stored.nonzero().flatten()).requires_grad_()
        found = small(given)
        torch.testing.assert_close(found, expected)
        with torch.no_grad():
            torch.testing.assert_close(small(given), expected)
        weights = torch.randn(expected.shape, generator=generator, dtype=DOUBLE)
        (dense,) = torch.autograd.grad((weights * expected).sum(), x)
        (own,) = torch.autograd.grad((weights * found).sum(), given)
        torch.testing.assert_close(own, dense.index_select(axis, stored.nonzero().flatten()))


@pytest.mark.parametrize("name", ["layer", "rms", "group"])
@pytest.mark.parametrize("in_a_graph", [False, True])
def test_half_precision_keeps_its_statistics_in_single(
    name: str, in_a_graph: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, shape = NORMS[name]
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: in_a_graph)
    norm = make().bfloat16()
    kind = CompactGroupNorm if name == "group" else CompactLayerNorm
    axis = 1 if name == "group" else len(shape)
    stored = torch.arange(12) % 3 > 0
    gone = torch.full((12,), 7.0, dtype=DOUBLE)
    at = [1] * (1 + len(shape))
    at[axis] = 12
    x = torch.where(stored.view(at), torch.randn(2, *shape), gone.float().view(at)).bfloat16()
    made = kind(norm, stored, gone, stored)(x.index_select(axis, stored.nonzero().flatten()))
    assert made.dtype == torch.bfloat16
    torch.testing.assert_close(made, norm(x).index_select(axis, stored.nonzero().flatten()), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("is_unread", [True, False])
def test_rms_norms_of_small_numbers_have_the_eps_of_torch(dtype: torch.dtype, is_unread: bool) -> None:
    """In half precision it is not the one that the pages of torch name."""
    model = nn.Sequential(nn.Linear(4, 8), nn.RMSNorm(8), nn.Linear(8, 3)).to(dtype).eval()
    with torch.no_grad():
        model[0].weight.mul_(1e-3)
        model[0].bias.zero_()
    die(model[0])
    if is_unread:
        unread(model[2])
    x = torch.randn(6, 4, dtype=dtype)
    small = vd.compact(model, x)
    assert type(small[1]) is (nn.RMSNorm if is_unread else CompactLayerNorm)
    torch.testing.assert_close(small(x), model(x), rtol=0.02, atol=0.02)


# ----------------------------------------------------------------------------------------------------------- streams


class Stream(nn.Module):
    """``x + f(norm(x))``, as it is written by hand."""

    def __init__(self, norm: Callable[[], nn.Module] = lambda: nn.LayerNorm(8)) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 8)
        self.n1, self.n2, self.n3 = norm(), norm(), norm()
        self.up1, self.down1 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.up2, self.down2 = nn.Linear(8, 12), nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.down1(F.gelu(self.up1(self.n1(x))))
        x = x + self.down2(F.gelu(self.up2(self.n2(x))))
        return self.head(self.n3(x).mean(1))


@pytest.mark.parametrize("norm", [lambda: nn.LayerNorm(8), lambda: nn.RMSNorm(8, eps=1e-6)], ids=["layer", "rms"])
@pytest.mark.parametrize("is_unread", [True, False])
def test_dead_channels_of_a_stream_go(norm: Callable[[], nn.Module], is_unread: bool) -> None:
    """Constants go from the stream; what norms make of them stays for those that read it."""
    model = randomised(Stream(norm))
    die(model.embed, model.down1, model.down2)
    if is_unread:
        unread(model.up1, model.up2, model.head)
    small = vd.compact(model, torch.randn(2, 4, 5, dtype=DOUBLE))
    assert_same(model, small, 4, 5)
    assert [layer.out_features for layer in (small.embed, small.down1, small.down2)] == [5, 5, 5]
    assert [layer.in_features for layer in (small.up1, small.up2, small.head)] == [5 if is_unread else 8] * 3
    if is_unread and isinstance(model.n1, nn.RMSNorm):  # one of torch's own has the same function
        assert str(small.n1).startswith("RMSNorm((5,), eps=")
    else:
        assert str(small.n1) == "CompactLayerNorm(5 of 8 channels)"
    assert not any(name.startswith(("embed", "down")) for name in small.compaction.left)


def test_constants_that_one_writer_varies_stay_and_are_told() -> None:
    model = randomised(Stream())
    die(model.embed, model.down1)
    small = vd.compact(model, torch.randn(2, 4, 5, dtype=DOUBLE))
    assert small.embed.out_features == 8
    assert "3 of 8 output channels could go, but they go with channels that stay" in small.compaction.left["embed"]


def test_what_nothing_reads_behind_a_norm_is_cut_behind_it() -> None:
    """The norm needs the channels that vary, but its outputs can go."""
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3), nn.RMSNorm(3), nn.Linear(3, 1))
    randomised(model)
    unread(model[3])
    with torch.no_grad():
        model[1].weight[0] = 0  # a constant behind the norm
    small = vd.compact(model, torch.randn(2, 4, dtype=DOUBLE))
    assert_same(model, small, 4)
    assert (small[0].out_features, small[3].in_features) == (8, 4)
    assert type(small[1][0]) is nn.LayerNorm  # and a selection


def test_a_norm_of_constants_alone_is_a_constant() -> None:
    model = randomised(nn.Sequential(nn.Linear(4, 6), nn.GroupNorm(2, 6), nn.Linear(6, 3)))
    die(model[0], channels=(0, 1, 2, 4))  # the whole first group
    small = vd.compact(model, torch.randn(2, 4, dtype=DOUBLE))
    assert_same(model, small, 4)
    assert (small[0].out_features, small[2].in_features) == (2, 3)


class Convolutions(nn.Module):
    """Residual blocks of convolutions with norms that have no running statistics."""

    def __init__(self, norm: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.stem, self.n0 = nn.Conv2d(2, 8, 3), norm()
        self.a, self.n1, self.b, self.n2 = nn.Conv2d(8, 8, 1), norm(), nn.Conv2d(8, 8, 1), norm()
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.b(F.relu(self.n1(self.a(F.relu(self.n0(x))))))
        return self.head(self.n2(x).mean((2, 3)))


CONV_NORMS: dict[str, Callable[[], nn.Module]] = {
    "group": lambda: nn.GroupNorm(2, 8),
    "all": lambda: nn.GroupNorm(1, 8),
    "instance": lambda: nn.InstanceNorm2d(8, affine=True),
    "instance without weights": lambda: nn.InstanceNorm2d(8),
    "instance, running": lambda: nn.InstanceNorm2d(8, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("name", CONV_NORMS)
def test_channels_go_through_group_and_instance_norms(name: str) -> None:
    model = randomised(Convolutions(CONV_NORMS[name]))
    die(model.stem, model.b)
    die(model.a, channels=(0, 6))
    unread(model.a, model.head)
    small = vd.compact(model, torch.randn(2, 2, 5, 5, dtype=DOUBLE))
    assert_same(model, small, 2, 5, 5)
    assert (small.stem.out_channels, small.b.out_channels, small.a.out_channels) == (5, 5, 6)
    assert (small.a.in_channels, small.head.in_features) == (5, 5)


class ChannelsLast(nn.Module):
    """A ConvNeXt block: depthwise, channels to the end, a scale for each channel, and back."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(1, 8, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 10), nn.Linear(10, 8)
        self.gamma, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        y = self.gamma * self.down(F.silu(self.up(y)))
        return self.head((x + y.permute(0, 3, 1, 2)).mean((2, 3)))


def test_channels_go_where_they_are_last_and_where_a_scale_is_zero() -> None:
    model = randomised(ChannelsLast())
    die(model.stem)
    with torch.no_grad():
        model.stem.bias[list(DEAD)] = 0  # so that the padding of the depthwise one is like the rest
        model.gamma[list(DEAD)] = 0
    small = vd.compact(model, torch.randn(2, 1, 4, 4, dtype=DOUBLE))
    assert_same(model, small, 1, 4, 4)
    assert (small.stem.out_channels, small.down.out_features, small.gamma.shape) == (5, 5, (5,))


# --------------------------------------------------------------------------------------------------------- attention


class Reader(nn.Module):
    """Tokens, positions, attention by torch or by hand, and the first position."""

    def __init__(self, by_hand: bool) -> None:
        super().__init__()
        self.by_hand = by_hand
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Parameter(torch.zeros(6, 8))
        self.n1, self.n2, self.last = nn.LayerNorm(8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 8)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions
        h = self.n1(x)
        if self.by_hand:
            q, k, v = self.qkv(h).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        else:
            h, _ = self.attention(h, h, h)
            x = x + h
        x = x + self.down(F.relu(self.up(self.n2(x))))
        return self.head(self.last(x)[:, 0])


@pytest.mark.parametrize("by_hand", [True, False])
def test_tables_positions_and_attention_lose_channels(by_hand: bool) -> None:
    model = randomised(Reader(by_hand))
    writers = (model.attention.out_proj, model.out, model.down)
    die(*writers)
    unread(model.tokens)  # its columns: constants of 0
    with torch.no_grad():
        model.positions[:, list(DEAD)] = 0.3
    ids = torch.randint(20, (3, 6))
    small = vd.compact(model, ids)
    torch.testing.assert_close(small(ids), model(ids))
    assert (small.tokens.embedding_dim, small.positions.shape, small.down.out_features) == (5, (6, 5), 5)
    if by_hand:
        assert (small.out.out_features, small.out.in_features) == (5, 8)
    else:
        assert (small.attention.out_proj.out_features, small.attention.in_features) == (5, (8, 8, 8))
    unread(model.attention, model.qkv, model.up, model.head)
    small = vd.compact(model, ids)
    torch.testing.assert_close(small(ids), model(ids))
    assert (small.up.in_features, small.head.in_features) == (5, 5)
    assert small.qkv.in_features == 5 if by_hand else small.attention.in_features == (5, 5, 5)


def test_constants_are_folded_into_the_projections_of_attention() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = nn.Linear(3, 6), nn.Linear(3, 5)
            self.attention = nn.MultiheadAttention(6, 2, bias=False, kdim=5, vdim=5, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            keys = self.keys(x)
            return self.attention(self.queries(x), keys, value=keys, key_padding_mask=mask)[0]

    model = randomised(Net())
    die(model.queries, channels=(1, 4))
    die(model.keys, channels=(0,))
    x, mask = torch.randn(3, 4, 3, dtype=DOUBLE), torch.zeros(3, 4, dtype=torch.bool)
    mask[:, 3] = True
    small = vd.compact(model, (x, mask))
    torch.testing.assert_close(small(x, mask), model(x, mask))
    attention = small.attention
    assert isinstance(attention, CompactAttention)
    assert attention.in_features == (4, 4, 4)


LEFT: dict[str, Callable[..., Any]] = {
    "gives its attention weights too": lambda layer, x, h: x + torch.bmm(layer(h, h, h)[1], x),
    "has a mask that is computed from channels": lambda layer, x, h: (
        x + layer(h, h, h, key_padding_mask=(h * 0).mean(1))[0]
    ),
}


@pytest.mark.parametrize("words", LEFT)
def test_attention_of_another_kind_stays_and_is_told(words: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            h = self.first(x)
            return LEFT[words](self.attention, x, h)

    model = randomised(Net())
    die(model.first, channels=(1,))
    small = vd.compact(model, torch.randn(2, 4, 4, dtype=DOUBLE))
    assert small.first.out_features == 4
    assert words in small.compaction.left["first"]


def test_own_parameters_that_are_read_twice_stay() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.shift, self.last = nn.Linear(4, 6), nn.Parameter(torch.ones(6)), nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(torch.tanh(self.first(x) + self.shift) + self.shift)

    model = randomised(Net())
    die(model.first, channels=(2,))
    small = vd.compact(model, torch.randn(2, 4, dtype=DOUBLE))
    assert_same(model, small, 4)
    assert small.shift.shape == (6,)


# ------------------------------------------------------------------------------------------------------ transformers


class Encoded(nn.Module):
    """A stem, torch's encoder, a mean over positions and a head."""

    def __init__(self, norm_first: bool, final: bool = True) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            8, 2, 12, batch_first=True, norm_first=norm_first, activation=nn.GELU(), dropout=0.1
        )
        norm = nn.LayerNorm(8) if final else None
        self.stem, self.head = nn.Linear(3, 8), nn.Linear(8, 2)
        self.encoder = nn.TransformerEncoder(layer, 2, norm, enable_nested_tensor=False)

    def forward(self, x: Tensor, padding: Tensor | None = None) -> Tensor:
        return self.head(self.encoder(self.stem(x), src_key_padding_mask=padding).mean(1))


def kill_stream(model: Any) -> None:
    for layer in model.encoder.layers:
        die(layer.self_attn.out_proj, layer.linear2)
        unread(layer.self_attn, layer.linear1)
        if not layer.norm_first:
            with torch.no_grad():
                for norm in (layer.norm1, layer.norm2):
                    norm.weight[list(DEAD)] = 0
    die(model.stem)
    unread(model.head)


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("final", [True, False])
def test_the_stream_of_an_encoder_gets_narrower(norm_first: bool, final: bool) -> None:
    model = randomised(Encoded(norm_first, final))
    kill_stream(model)
    x, padding = torch.randn(3, 4, 3, dtype=DOUBLE), torch.zeros(3, 4, dtype=torch.bool)
    padding[:, 3] = True
    small = vd.compact(model, x)
    assert_same(model, small, 4, 3)
    layer = small.encoder.layers[1]
    assert isinstance(small.encoder, Encoder)
    assert isinstance(layer, EncoderLayer)
    assert (layer.linear1.in_features, layer.linear2.out_features, layer.self_attn.in_features[0]) == (5, 5, 5)
    assert (small.stem.out_features, small.head.in_features) == (5, 5)
    x.requires_grad_()
    (dense,) = torch.autograd.grad(model(x).square().sum(), x)
    torch.testing.assert_close(torch.autograd.grad(small(x).square().sum(), x)[0], dense)
    for inference in (True, False):
        small = vd.compact(model, (x, padding), for_inference=inference)
        torch.testing.assert_close(small(x, padding), model(x, padding))
    assert small.train()(x, padding).requires_grad
    frozen = vd.compact(model.requires_grad_(False), (x, padding))
    assert not any(parameter.requires_grad for parameter in frozen.parameters())


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoders_that_keep_their_width_keep_their_class(norm_first: bool) -> None:
    model = randomised(Encoded(norm_first))
    for layer in model.encoder.layers:
        die(layer.linear1)
    small = vd.compact(model, torch.randn(2, 4, 3, dtype=DOUBLE))
    assert_same(model, small, 4, 3)
    assert type(small.encoder) is nn.TransformerEncoder
    assert [type(layer) for layer in small.encoder.layers] == [nn.TransformerEncoderLayer] * 2
    assert small.encoder.layers[0].linear1.out_features == 9


@settings(max_examples=15, deadline=None)
@given(st.booleans(), st.integers(0, 10_000), st.sampled_from([0.1, 0.3, 0.6]), st.booleans(), st.booleans())
def test_random_encoders_are_the_same_function(
    norm_first: bool, seed: int, keep: float, dead: bool, inference: bool
) -> None:
    """Rows, columns and single weights at random zero, of a stream that has dead channels or not."""
    model = randomised(Encoded(norm_first), seed)
    generator = torch.Generator().manual_seed(seed)
    if dead:
        kill_stream(model)
    with torch.no_grad():
        for parameter in model.parameters():
            mask = torch.rand(parameter.shape, generator=generator) < keep
            if parameter.ndim == 2:
                mask |= torch.rand(parameter.shape, generator=generator) < keep
                mask &= torch.rand(len(parameter), 1, generator=generator) < 0.8
                mask &= torch.rand(parameter.shape[1], generator=generator) < 0.8
            parameter.mul_(mask)
    small = vd.compact(model, torch.randn(2, 4, 3, dtype=DOUBLE), for_inference=inference)
    assert_same(model, small, 4, 3)
    again = io.BytesIO()
    torch.save(small, again)
    again.seek(0)
    assert_same(small, torch.load(again, weights_only=False), 4, 3)


# ---------------------------------------------------------------------------------------------- what stays, and files


def test_what_is_kept_gathers_the_old_weights() -> None:
    """Indices of a layer that changed, once or twice (hidden units first, then the stream)."""
    model = randomised(Encoded(norm_first=True))
    kill_stream(model)
    for layer in model.encoder.layers:
        die(layer.linear1, channels=(0, 3, 7))
    small = vd.compact(model, torch.randn(2, 4, 3, dtype=DOUBLE))
    linear = {name for name, module in small.named_modules() if type(module) is nn.Linear and "self_attn" not in name}
    assert linear == set(small.compaction.kept)
    for name, (outputs, inputs) in small.compaction.kept.items():
        old, new = model.get_submodule(name).weight, small.get_submodule(name).weight
        assert torch.equal(old[outputs][:, inputs], new)
    assert small.compaction.kept["encoder.layers.0.linear1"][0].tolist() == [1, 2, 4, 5, 6, 8, 9, 10, 11]


def test_what_is_kept_of_convolutions_and_behind_selections() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(2, 6, 2), nn.ReLU(), nn.Flatten(), nn.Linear(24, 5), nn.Linear(5, 2)))
    die(model[0], channels=(1, 3))
    unread(model[3], channels=tuple(range(14)))
    small = vd.compact(model, torch.randn(2, 2, 3, 3, dtype=DOUBLE))
    for name, (outputs, inputs) in small.compaction.kept.items():
        new = small.get_submodule(name)
        new = new[1] if isinstance(new, nn.Sequential) else new
        assert torch.equal(model.get_submodule(name).weight[outputs][:, inputs], new.weight)
    assert set(small.compaction.kept) == {"0", "3"}


def test_compact_norms_run_in_onnx(tmp_path: Any) -> None:
    onnx, _ = pytest.importorskip("onnx"), pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.convolutions, self.encoded = Convolutions(CONV_NORMS["group"]), Encoded(norm_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.encoded(self.convolutions(x).unsqueeze(1))

    model = randomised(Both()).float()
    die(model.convolutions.stem, model.convolutions.b)
    kill_stream(model.encoded)
    x = torch.randn(2, 2, 5, 5)
    small = vd.compact(model, x)
    kinds = [type(m) for m in small.modules() if isinstance(m, CompactLayerNorm | CompactGroupNorm)]
    assert (kinds.count(CompactLayerNorm), kinds.count(CompactGroupNorm)) == (5, 2)
    vd.sparsity.export_onnx(small, x, tmp_path / "net.onnx")
    nodes = [node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node]
    assert nodes.count("Reciprocal") == 4  # two in a group norm; of layer norms the formula is for eager torch alone
    session = runtime.InferenceSession(tmp_path / "net.onnx", providers=["CPUExecutionProvider"])
    other = torch.randn(7, 2, 5, 5)
    (made,) = session.run(None, {session.get_inputs()[0].name: other.numpy()})
    torch.testing.assert_close(torch.from_numpy(made), model(other).detach(), rtol=1e-4, atol=1e-5)


def cross(width: int | None = None) -> nn.Module:
    """Attention of a query to something else."""

    class Cross(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(6, 3, kdim=width, vdim=width, batch_first=True)

        def forward(self, query: Tensor, other: Tensor) -> Tensor:
            return self.attention(query, other, other, need_weights=False)[0]

    model = randomised(Cross())
    unread(model.attention.out_proj, channels=(2, 3))
    return model


def test_projections_of_attention_to_something_else_are_the_module_that_is_there() -> None:
    model, inputs = cross(), (torch.randn(2, 4, 6, dtype=DOUBLE), torch.randn(2, 5, 6, dtype=DOUBLE))
    small, called = vd.compact(model, inputs), []
    torch.testing.assert_close(small(*inputs), model(*inputs))
    small.attention.in_proj.register_forward_hook(lambda *_: called.append(1))
    torch.testing.assert_close(small(*inputs), model(*inputs))
    assert called
    model, inputs = cross(5), (inputs[0], torch.randn(2, 5, 5, dtype=DOUBLE))
    model.attention.k_proj_weight.requires_grad_(False)
    small = vd.compact(model, inputs)
    torch.testing.assert_close(small(*inputs), model(*inputs))
    assert [layer.weight.requires_grad for layer in small.attention.in_proj] == [True, False, True]


def test_heads_that_die_in_compacted_attention_are_told() -> None:
    model, inputs = cross(), (torch.randn(2, 4, 6, dtype=DOUBLE), torch.randn(2, 5, 6, dtype=DOUBLE))
    small = vd.compact(model, inputs)
    assert small.attention.num_heads == 2
    unread(small.attention.out_proj, channels=(0, 1))
    again = vd.compact(small, inputs)
    torch.testing.assert_close(again(*inputs), small(*inputs))
    assert "1 of 2 heads could go, but it is compact already" in again.compaction.left["attention"]
