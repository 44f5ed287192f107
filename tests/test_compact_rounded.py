"""Channels that convolutions read, rounded up with dead ones: as many as asked for, and the same function."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vardrop as vd

DOUBLE = torch.float64


class Residual(nn.Module):
    """Convolutions inside of a block, and its sum."""

    def __init__(self, width: int, inner: int) -> None:
        super().__init__()
        self.stem, self.up = nn.Conv2d(1, width, 3, padding=1), nn.Conv2d(width, inner, 3, padding=1)
        self.down, self.last = nn.Conv2d(inner, width, 3, padding=1), nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.last((x + self.down(self.up(x).relu())).relu())


def chain(*widths: int, kind: Any = nn.Conv2d) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in zip((1, *widths), (*widths, 2), strict=True):
        layers += [kind(inputs, outputs, 3, padding=1), nn.ReLU()]
    return nn.Sequential(*layers[:-1]).double()


def die(layer: Any, dead: int) -> None:
    """The last units of a layer become constants that are not zero: those behind it need a carrier at their padding."""
    with torch.no_grad():
        layer.weight[layer.out_channels - dead :] = 0
        layer.bias[layer.out_channels - dead :] = 0.5


def compacted(model: nn.Module, **wishes: Any) -> Any:
    """Compacted, the same on inputs of another size."""
    torch.manual_seed(0)
    small = vd.compact(model, torch.randn(2, 1, 8, 8, dtype=DOUBLE), **wishes)
    x = torch.randn(3, 1, 7, 9, dtype=DOUBLE)
    torch.testing.assert_close(small(x), model(x), rtol=1e-9, atol=1e-9)
    return small


def reads(model: nn.Module) -> list[int]:
    """How many channels each convolution reads, without the first."""
    return [module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d)][1:]


@pytest.mark.parametrize(
    ("size", "dead", "multiple", "expected"),
    [
        (40, 10, 1, 31),  # 30 and the carrier
        (40, 10, 4, 32),
        (40, 10, 8, 32),
        (40, 10, 16, 32),
        (40, 5, 16, 36),  # 48 are more than there were
        (40, 9, 4, 32),  # it is one already
        (40, 0, 4, 40),
        (42, 0, 4, 42),
        (40, 25, 4, 16),
        (40, 26, 4, 15),  # fewer than 16
        (40, 40, 4, 1),
    ],
)
def test_what_a_convolution_reads_is_a_multiple(size: int, dead: int, multiple: int, expected: int) -> None:
    model = chain(size)
    die(model[0], dead)
    small = compacted(model, round_to=multiple)
    assert reads(small) == [expected]
    assert small[0].out_channels == expected
    needed = min(size, size - dead + (dead > 0))
    told = small.compaction.left.get("0", "")
    assert (f"is rounded up to a multiple of {multiple}" in told) == (expected > needed), told


def test_the_report_says_how_many_stayed() -> None:
    model = chain(40)
    die(model[0], 13)
    assert compacted(model, round_to=8).compaction.left["0"] == (
        "5 of 40 output channels could go, but one constant other than 0 at a zero padding stays for all of them; what "
        "a convolution reads is rounded up to a multiple of 8"
    )
    assert "rounded" not in compacted(model).compaction.left["0"]


def test_what_is_rounded_has_nothing_more_to_lose() -> None:
    model = chain(40, 40)
    die(model[0], 13)
    die(model[2], 6)
    once = compacted(model, round_to=4)
    twice = compacted(once, round_to=4)
    assert reads(once) == reads(twice) == [28, 36]
    assert not twice.compaction.changed


def test_a_stream_of_sums_is_rounded_as_one() -> None:
    torch.manual_seed(0)
    model = Residual(30, 50).double()
    die(model.stem, 9)
    die(model.down, 9)
    die(model.up, 20)
    small = compacted(model, round_to=4)
    assert (small.up.in_channels, small.last.in_channels, small.stem.out_channels, small.down.out_channels) == (24,) * 4
    assert small.down.in_channels == small.up.out_channels == 32
    assert "rounded up to a multiple of 4" in small.compaction.left["stem"]


def test_only_convolutions_round() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 40), nn.ReLU(), nn.Linear(40, 2)).double()
    with torch.no_grad():
        model[1].weight[:7] = 0
    assert compacted_linear(model, 4)[1].out_features == 33
    last = nn.Sequential(chain(40)[:2], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(40, 2)).double()
    die(last[0][0], 7)
    assert compacted(last, round_to=4)[3].in_features == 33


def compacted_linear(model: nn.Module, multiple: int) -> Any:
    return vd.compact(model, torch.randn(2, 1, 8, 8, dtype=DOUBLE), round_to=multiple)


def test_a_network_for_inference_is_rounded_to_four_unless_said_otherwise() -> None:
    model = chain(40)
    die(model[0], 10)
    assert reads(compacted(model, for_inference=True)) == [32]
    assert reads(compacted(model, for_inference=True, round_to=1)) == [31]
    assert reads(compacted(model)) == [31]


def test_norms_and_depthwise_convolutions_between_are_as_wide() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 40, 3, bias=False), nn.BatchNorm2d(40), nn.ReLU(), nn.Conv2d(40, 40, 3, groups=40), nn.ReLU(),
        nn.Conv2d(40, 2, 1),
    ).double().eval()  # fmt: skip
    with torch.no_grad():
        model[0].weight[:11] = 0
        model[1].running_mean.normal_()
    small = compacted(model, round_to=4)
    assert (small[0].out_channels, small[1].num_features, small[3].groups, small[5].in_channels) == (32,) * 4


@pytest.mark.parametrize("multiple", [0, -4])
def test_a_multiple_is_one_or_more(multiple: int) -> None:
    words = rf"^vardrop.compact: round_to must be 1 \(channels are not rounded\) or more, got {multiple}$"
    with pytest.raises(ValueError, match=words):
        vd.compact(chain(4), torch.randn(2, 1, 8, 8, dtype=DOUBLE), round_to=multiple)


@settings(max_examples=30, deadline=None)
@given(
    widths=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    shares=st.lists(st.floats(0, 1), min_size=3, max_size=3),
    multiple=st.integers(1, 12),
)
def test_any_chain_is_rounded_and_the_same(widths: list[int], shares: list[float], multiple: int) -> None:
    model = chain(*widths)
    for layer, width, share in zip(model[::2], widths, shares, strict=False):
        die(layer, round(share * width))
    bare, small = compacted(model), compacted(model, round_to=multiple)
    for size, least, read in zip(widths, reads(bare), reads(small), strict=True):
        rounded = least + -least % multiple
        assert read == (rounded if least >= 16 and rounded <= size else least)
