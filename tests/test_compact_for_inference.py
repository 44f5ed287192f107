"""Networks for inference compute the same: norms that are folded or made plain, and channels last."""

from __future__ import annotations

import copy
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
from vardrop.sparsity.layout import channels_last
from vardrop.sparsity.norms import CompactLayerNorm

DOUBLE = torch.float64
DEAD = (1, 4, 5)  # channels of a stream


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All parameters and statistics at random, in float64."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.7)
        for name, buffer in model.named_buffers():
            if name.endswith(("running_mean", "running_var")):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.1)
    return model.double().eval()


def die(*layers: nn.Module, channels: tuple[int, ...] = DEAD, bias: float | None = None) -> None:
    """Outputs of layers become constants, different ones if their biases are not given."""
    with torch.no_grad():
        for layer in layers:
            layer.weight[list(channels)] = 0
            if bias is not None:
                layer.bias[list(channels)] = bias


def unread(*layers: nn.Module, channels: tuple[int, ...] = DEAD) -> None:
    """Nothing reads inputs of layers any more."""
    with torch.no_grad():
        for layer in layers:
            layer.weight[:, list(channels)] = 0


def folded(model: nn.Module, *shape: int) -> nn.Module:
    """The compact network for inference, which computes what the model does."""
    small = vd.compact(model, torch.randn(2, *shape, dtype=DOUBLE), for_inference=True)
    x = 3 * torch.randn(5, *shape, dtype=DOUBLE)
    with torch.no_grad():
        torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    return small


# ----------------------------------------------------------------------------------------------- plain layer norms


class Stream(nn.Module):
    """Two blocks of ``x + f(norm(x))``, and a norm of the average."""

    def __init__(self, width: int = 8, bias: bool = True, inner: Callable[[Tensor], Tensor] = F.gelu) -> None:
        super().__init__()
        self.inner = inner
        self.embed = nn.Linear(5, width, bias)
        self.n1, self.n2, self.n3 = (nn.LayerNorm(width, bias=bias) for _ in range(3))
        self.up1, self.down1 = nn.Linear(width, 12, bias), nn.Linear(12, width, bias)
        self.up2, self.down2 = nn.Linear(width, 12, bias), nn.Linear(12, width, bias)
        self.drop, self.head = nn.Dropout(0.1), nn.Linear(width, 3, bias)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + self.drop(self.down1(self.inner(self.up1(self.n1(x)))))
        x += self.down2(self.inner(self.up2(self.n2(x))))
        return self.head(self.n3(x).mean(1))


def norms(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if "Norm" in type(module).__name__]


@pytest.mark.parametrize("bias", [0.0, None], ids=["equal constants", "different constants"])
@pytest.mark.parametrize("is_unread", [True, False])
def test_layer_norms_of_a_narrower_stream_are_plain(bias: float | None, is_unread: bool) -> None:
    model = randomised(Stream())
    die(model.embed, model.down1, model.down2, bias=bias)
    if is_unread:
        unread(model.up1, model.up2, model.head)
    small = folded(model, 4, 5)
    width = 6 if is_unread else 7  # one more than is left, for the mean; and one that stands still
    assert {type(norm) for norm in norms(small)} == {nn.LayerNorm}
    assert {norm.normalized_shape for norm in norms(small)} == {(width,)}
    assert all((norm.weight == 1).all() and norm.bias is None for norm in norms(small))
    assert [layer.out_features for layer in (small.embed, small.down1, small.down2)] == [width] * 3
    assert [layer.in_features for layer in (small.up1, small.up2, small.head)] == [width] * 3
    assert [layer.weight.shape[1] for layer in (small.up1, small.up2, small.head)] == [width] * 3
    report = small.compaction
    assert report.changed["n1"][1].startswith(f"LayerNorm(({width},), eps=")
    assert report.changed["embed"][1] == f"Linear(in_features=5, out_features={width}, bias=True)"
    assert not report.left
    assert not report.kept  # channels of these layers are mixtures of the old ones


def test_a_stream_without_biases_gets_none_where_none_is_needed() -> None:
    model = randomised(Stream(bias=False))
    die(model.embed, model.down1, model.down2)
    unread(model.up1, model.up2, model.head)
    small = folded(model, 4, 5)
    assert all(layer.bias is None for layer in small.modules() if isinstance(layer, nn.Linear))


def test_no_stream_gets_wider_than_it_was() -> None:
    model = randomised(Stream())
    die(model.embed, model.down1, model.down2, channels=(4,))
    small = folded(model, 4, 5)  # with one number for the mean, and one that stands still, it would have 9 channels
    assert small.embed.out_features == 7
    assert small.compaction.left["n1"] == "its constants stay as numbers, as a plain norm would have 9 channels for 8"
    unread(model.up1, model.up2, model.head, channels=(4,))
    assert folded(model, 4, 5).embed.out_features == 8


def test_nothing_is_folded_unless_asked_for() -> None:
    model = randomised(Stream())
    die(model.embed, model.down1, model.down2)
    small = vd.compact(model, torch.randn(2, 4, 5, dtype=DOUBLE))
    assert {type(norm) for norm in norms(small)} == {CompactLayerNorm}
    assert set(small.compaction.kept) == {"embed", "down1", "down2"}


def test_a_stream_of_full_width_stays_as_it_is() -> None:
    model = randomised(Stream())
    small = folded(model, 4, 5)
    assert not small.compaction.changed
    assert torch.equal(small.up1.weight, model.up1.weight)


class TwoReaders(Stream):
    """A norm that two layers read."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(self.embed(x))
        return self.up1(y) + self.up2(y)


def test_selections_in_front_of_writers_and_readers_are_no_obstacle() -> None:
    model = randomised(TwoReaders())
    die(model.embed)
    unread(model.embed, channels=(0, 1, 2))
    unread(model.up1, channels=(0, 1, 2, 4, 6, 7))
    dense = vd.compact(model, torch.randn(2, 4, 5, dtype=DOUBLE))
    assert [type(layer) for layer in (dense.embed, dense.up1, dense.up2)] == [nn.Sequential, nn.Sequential, nn.Linear]
    small = folded(model, 4, 5)
    assert type(small.n1) is nn.LayerNorm
    assert [type(layer) for layer in (small.embed, small.up1, small.up2)] == [nn.Sequential, nn.Linear, nn.Linear]


@given(seed=st.integers(0, 10**6), dead=st.sets(st.integers(0, 7), min_size=1, max_size=7), unread_too=st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_constants_may_go(seed: int, dead: set[int], unread_too: bool) -> None:
    model = randomised(Stream(), seed)
    die(model.embed, model.down1, model.down2, channels=tuple(dead))
    if unread_too:
        unread(model.up1, model.up2, model.head, channels=tuple(dead))
    wider = len(dead) == 1 and not unread_too
    assert {type(norm) for norm in norms(folded(model, 4, 5))} == {CompactLayerNorm if wider else nn.LayerNorm}


class Reader(nn.Module):
    """Tokens and positions, attention by torch, and the first position."""

    def __init__(self, other: bool = False) -> None:
        super().__init__()
        self.other = other
        self.tokens, self.positions = nn.Embedding(20, 8), nn.Parameter(torch.zeros(6, 8))
        self.n1, self.n2, self.n3, self.last = (nn.LayerNorm(8) for _ in range(4))
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.up, self.down, self.head = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 20)

    def forward(self, x: Tensor) -> Tensor:
        x = self.tokens(x) + self.positions
        h = self.n1(x)
        x = x + self.attention(h, self.n3(x) if self.other else h, h)[0]
        x = x + self.down(F.relu(self.up(self.n2(x))))
        return self.head(self.last(x)[:, 0])


def reader(other: bool = False) -> nn.Module:
    model = randomised(Reader(other))
    die(model.attention.out_proj, model.down)
    unread(model.tokens)  # its columns: constants of 0
    with torch.no_grad():
        model.positions[:, list(DEAD)] = torch.tensor([0.3, -0.2, 1.0], dtype=DOUBLE)
    return model


def test_tables_positions_and_attention_take_the_coordinates() -> None:
    model, ids = reader(), torch.randint(20, (3, 6))
    small = vd.compact(model, ids, for_inference=True)
    torch.testing.assert_close(small(ids), model(ids))
    assert {type(norm) for norm in norms(small)} == {nn.LayerNorm}
    assert (small.tokens.embedding_dim, small.tokens.weight.shape, small.positions.shape) == (7, (20, 7), (6, 7))
    assert (small.attention.in_features, small.attention.out_proj.out_features) == ((7, 7, 7), 7)
    assert isinstance(small.positions, nn.Parameter)
    assert small.positions.requires_grad


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("dead", [DEAD, (1, 4)])
def test_encoders_of_torch(batch_first: bool, final: bool, dead: tuple[int, ...]) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=batch_first, norm_first=True)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8) if final else None, enable_nested_tensor=False)
    model = randomised(nn.Sequential(nn.Linear(5, 8), encoder, *([] if final else [nn.LayerNorm(8)]), nn.Linear(8, 3)))
    for each in encoder.layers:
        die(each.self_attn.out_proj, each.linear2, channels=dead)
    die(model[0], channels=dead)
    small = folded(model, 4, 5)
    assert {type(norm) for norm in norms(small)} == {nn.LayerNorm}
    assert {norm.normalized_shape for norm in norms(small)} == {(10 - len(dead),)}
    assert small(torch.randn(2, 4, 5, dtype=DOUBLE)).sum().backward() is None  # and it can be trained
    assert all(p.grad is not None for p in small.parameters())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 0.05)])
def test_single_and_half_precision(dtype: torch.dtype, tolerance: float) -> None:
    model = randomised(Stream())
    die(model.embed, model.down1, model.down2)
    model = model.to(dtype)
    x = torch.randn(8, 4, 5, dtype=dtype)
    small = vd.compact(model, x, for_inference=True)
    assert {p.dtype for p in small.parameters()} == {dtype}
    torch.testing.assert_close(small(x), model(x), rtol=tolerance, atol=tolerance * 5)


def test_copies_pickles_and_onnx(tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model = randomised(Stream()).float()
    die(model.embed, model.down1, model.down2)
    x = torch.randn(3, 4, 5)
    small = vd.compact(model, x, for_inference=True)
    with torch.no_grad():
        expected = small(x)
        torch.testing.assert_close(copy.deepcopy(small)(x), expected)
        torch.testing.assert_close(torch.compile(small, backend="eager", fullgraph=True)(x), expected)
        file = io.BytesIO()
        torch.save(small, file)
        file.seek(0)
        torch.testing.assert_close(torch.load(file, weights_only=False)(x), expected)
    path = tmp_path / "small.onnx"
    vd.sparsity.export_onnx(small, x, path)
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


# ------------------------------------------------------------------------------- streams that keep their coordinates


class Past(Stream):
    """A head that reads the stream itself."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.down1(self.inner(self.up1(self.n1(x)))))


class Bent(Stream):
    """A stream that a nonlinear function writes."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = x + torch.tanh(self.down1(self.inner(self.up1(self.n1(x)))))
        return self.head(self.n3(x))


class Activated(Stream):
    """A norm that a nonlinear function reads."""

    def forward(self, x: Tensor) -> Tensor:
        return self.head(F.silu(self.n1(self.embed(x))))


class Joined(Stream):
    """Norms of two tensors of one stream, which have no writer in common."""

    def forward(self, x: Tensor) -> Tensor:
        first, second = self.embed(x), self.down1(self.inner(self.up1(self.n1(self.embed2(x)))))
        return self.head(self.n2(first)) + self.up2(self.n3(torch.cat([first, second], 1)))[:, :4, :3]

    def __init__(self) -> None:
        super().__init__()
        self.embed2 = nn.Linear(5, 8)


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Past, "its constants stay as numbers, as head reads the stream past its norms"),
        (Bent, "as tanh() writes the stream, and is no linear layer, attention or table"),
        (Activated, "as silu() reads a norm, and is no linear layer or attention"),
        (Joined, "as nothing that writes the stream is in front of all of its norms"),
    ],
)
def test_other_streams_keep_their_coordinates_and_are_told(kind: Callable[[], nn.Module], words: str) -> None:
    model = randomised(kind())
    die(model.embed, model.down1, model.down2)
    if kind is Joined:
        with torch.no_grad():
            model.down1.bias.copy_(model.embed.bias)  # the same constants at all positions
    small = folded(model, 4, 5)
    assert CompactLayerNorm in {type(norm) for norm in norms(small)}
    assert any(words in why for why in small.compaction.left.values()), small.compaction.left


def test_rms_norms_whose_constants_are_read_are_told() -> None:
    model = randomised(nn.Sequential(nn.Linear(5, 8), nn.RMSNorm(8, eps=1e-6), nn.Linear(8, 3)))
    die(model[0])
    small = folded(model, 5)
    assert type(small[1]) is CompactLayerNorm
    assert small.compaction.left["1"] == "its constants stay as numbers, as it is an RMS norm"


def test_attention_to_two_norms_is_told() -> None:
    model, ids = reader(other=True), torch.randint(20, (3, 6))
    small = vd.compact(model, ids, for_inference=True)
    torch.testing.assert_close(small(ids), model(ids))
    assert type(small.last) is CompactLayerNorm
    assert small.compaction.left["last"].endswith("attention attends to something else too")


# ----------------------------------------------------------------------------------------------------- batch norms


CONVOLUTIONS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "1d": (lambda: nn.Sequential(nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6), nn.ReLU()), (2, 7)),
    "2d without bias": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)), (2, 5, 5)),
    "2d without weights": (lambda: nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6, affine=False)), (2, 5, 5)),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 6, 2), nn.BatchNorm3d(6)), (2, 3, 3, 3)),
    "transposed": (lambda: nn.Sequential(nn.ConvTranspose2d(2, 6, 3), nn.BatchNorm2d(6)), (2, 4, 4)),
    "depthwise": (lambda: nn.Sequential(nn.Conv2d(6, 6, 3, groups=6), nn.BatchNorm2d(6)), (6, 5, 5)),
    "grouped": (lambda: nn.Sequential(nn.Conv2d(4, 6, 3, groups=2), nn.BatchNorm2d(6)), (4, 5, 5)),
    "linear": (lambda: nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)), (4,)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_batch_norms_go_into_the_layer_in_front(name: str) -> None:
    make, shape = CONVOLUTIONS[name]
    model = randomised(make())
    small = folded(model, *shape)
    assert isinstance(small[1], nn.Identity)
    assert small.compaction.changed["1"][1] == "Identity()"
    assert small[0].bias.requires_grad


def test_batch_norms_of_narrower_layers_and_behind_a_selection() -> None:
    model = randomised(nn.Sequential(nn.Flatten(), nn.Linear(16, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 2)))
    unread(model[1], channels=tuple(range(12)))
    die(model[1], channels=(0, 3))
    small = folded(model, 4, 4)
    assert (small[1][1].in_features, small[1][1].out_features, type(small[2])) == (4, 4, nn.Identity)


class Twice(nn.Module):
    """What a convolution gives is read behind its norm and in front of it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return self.head((y + self.norm(y)).mean((2, 3)))


def test_batch_norms_that_stay_are_told() -> None:
    left = folded(randomised(Twice()), 2, 3, 3).compaction.left
    assert left["norm"] == "is not folded: conv is read by others too"
    first = nn.Sequential(nn.BatchNorm2d(2), nn.ReLU(), nn.BatchNorm2d(2), nn.Conv2d(2, 3, 1))
    small = folded(randomised(first), 2, 3, 3)
    words = "is not folded: it is not behind a convolution or a linear layer"
    assert [small.compaction.left[name] for name in "02"] == [words, words]
    hooked = randomised(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    hooked[0].register_forward_hook(lambda module, given, output: None)
    assert folded(hooked, 2, 3, 3).compaction.left["1"].startswith("is not folded: 0 has hooks")
    own = randomised(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3)))
    own[1].register_forward_hook(lambda module, given, output: None)
    assert "has hooks" in folded(own, 2, 3, 3).compaction.left["1"]
    grouped = nn.Sequential(nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4))
    assert "not behind" in folded(randomised(grouped), 4, 3, 3).compaction.left["1"]
    batch = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5, track_running_stats=False))
    assert "takes those of the batch" in folded(randomised(batch), 4).compaction.left["1"]


def test_training_mode_is_kept() -> None:
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 1), nn.BatchNorm2d(3), nn.Dropout())).train()
    small = vd.compact(model, torch.randn(2, 2, 3, 3, dtype=DOUBLE), for_inference=True)
    assert all(module.training for module in small.modules())


# --------------------------------------------------------------------------------------------------- channels last


def lenet() -> nn.Module:
    convs = [nn.Conv2d(1, 6, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(6, 8, 5), nn.ReLU(), nn.MaxPool2d(2)]
    model = randomised(nn.Sequential(*convs, nn.Flatten(), nn.Linear(128, 10), nn.Tanh(), nn.Linear(10, 3)))
    die(model[0], channels=(0, 3))
    return model


def is_last(weight: Tensor) -> bool:
    return weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()


def test_convolutions_have_their_channels_last() -> None:
    small = folded(lenet(), 1, 28, 28)
    assert is_last(small[3].weight)
    assert small.compaction.changed["memory"] == ("channels first", "channels last")
    maps = small[:6](torch.randn(2, 1, 28, 28, dtype=DOUBLE))
    assert is_last(maps)
    plain = vd.compact(lenet(), torch.randn(2, 1, 28, 28, dtype=DOUBLE))
    assert plain[3].weight.is_contiguous()


def test_kernels_of_three_dimensions_keep_their_order() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.flat, self.deep, self.last = nn.Conv2d(2, 4, 3), nn.Conv3d(1, 2, 3), nn.Linear(2, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.deep(self.flat(x).unsqueeze(1)).mean((2, 3, 4)))

    model = Both().double().eval()
    x = torch.randn(2, 2, 6, 6, dtype=torch.float64)
    small = vd.compact(model, x, for_inference=True)
    torch.testing.assert_close(small(x), model(x))
    assert small.compaction.changed["memory"] == ("channels first", "channels last")


def test_what_has_channels_last_is_written_and_read(tmp_path: Any) -> None:
    runtime = pytest.importorskip("onnxruntime")
    model, x = lenet().float(), torch.randn(2, 1, 28, 28)
    small = vd.compact(model, x, for_inference=True)
    expected = small(x).detach()
    vd.save_compressed(small, tmp_path / "small.vdc")
    vd.sparsity.save_sparse(small, tmp_path / "small.safetensors")
    for read, name in ((vd.load_compressed, "small.vdc"), (vd.sparsity.load_sparse, "small.safetensors")):
        other = copy.deepcopy(small)
        with torch.no_grad():
            for parameter in other.parameters():
                parameter.zero_()
        read(tmp_path / name, other)
        torch.testing.assert_close(other(x), expected)
    vd.sparsity.export_onnx(small, x, tmp_path / "small.onnx")
    session = runtime.InferenceSession(str(tmp_path / "small.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, rtol=1e-4, atol=1e-5)


def test_channels_that_are_last_leave_no_trace_in_onnx(tmp_path):
    """torch's average over positions takes other steps where they are: it would move the numbers back in the graph."""
    onnx = pytest.importorskip("onnx")
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    last = copy.deepcopy(model).to(memory_format=torch.channels_last)
    x = torch.randn(2, 1, 8, 8)
    kinds = []
    for net, example in ((model, x), (last, x), (last, x.to(memory_format=torch.channels_last))):
        vd.sparsity.export_onnx(net, example, tmp_path / "net.onnx")
        kinds.append([node.op_type for node in onnx.load(tmp_path / "net.onnx").graph.node])
    assert kinds[0] == kinds[1] == kinds[2]
    assert "Gather" not in kinds[0]
    assert last[0].weight.is_contiguous(memory_format=torch.channels_last)  # the model stays as it was


class Viewed(nn.Module):
    """Code that wants channels first."""

    def __init__(self, code: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.code, self.head = nn.Conv2d(1, 3, 2), code, nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.code(self.conv(x)))


class Custom(nn.Flatten):
    """A leaf of another's code, as hooks and compilers make them."""


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (lambda x: x.view(x.shape[0], -1), "channels stay first: its code calls view(), which depends on"),
        (lambda x: x.flatten(1) if x.sum() < 1e9 else x, "channels stay first: its code cannot be traced by torch.fx"),
    ],
)
def test_channels_stay_first_where_code_may_want_them_there(code: Callable[[Tensor], Tensor], words: str) -> None:
    small = folded(randomised(Viewed(code)), 1, 3, 3)
    assert small.compaction.left["memory"].startswith(words)
    assert small.conv.weight.is_contiguous()


def test_channels_stay_first_for_leaves_of_others_maps_and_other_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    left = folded(randomised(nn.Sequential(nn.Conv2d(2, 3, 2), nn.ReLU())), 2, 3, 3).compaction.left
    assert left["memory"].startswith("channels stay first: its outputs are maps")
    from vardrop.sparsity import tracing

    monkeypatch.setattr(Custom, "__module__", "elsewhere")
    leaf = tracing.Tracer.is_leaf_module
    monkeypatch.setattr(
        tracing.Tracer, "is_leaf_module", lambda self, m, name: isinstance(m, Custom) or leaf(self, m, name)
    )
    model = randomised(nn.Sequential(nn.Conv2d(2, 3, 2), Custom(), nn.Linear(12, 2)))
    assert folded(model, 2, 3, 3).compaction.left["memory"].startswith("channels stay first: the code of 1 (Custom)")
    assert channels_last(nn.Sequential(nn.Conv2d(2, 3, 2)).to("meta"), ()) == "it is faster on processors only"
    assert channels_last(nn.Sequential(nn.Linear(2, 3)), ()) == ""
