"""Networks from a short text: plain PyTorch, one flat ``nn.Sequential`` each."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Iterator, Sequence

from torch import nn

SYNTAX = (
    "mlp:3x400 (three hidden layers of 400 units), mlp:256,128 (one of 256, one of 128), lenet-300-100, lenet-5, or "
    "conv:k (conv:1, conv:0.5) with k at least 0.05, which scales the width"
)
_SIZE = r"[1-9]\d{0,5}"

Dropout = tuple[float, float]


def build(spec: str, shape: tuple[int, ...], outputs: int, dropout: Dropout | None = None) -> nn.Module:
    """A network from a short text.

    * ``mlp:3x400``, ``mlp:256,128``: fully connected, rectified linear units.
    * ``lenet-300-100``: ``mlp:300,100`` by its name in the literature on compression.
    * ``lenet-5``: the one of Caffe: 20 and 50 maps of 5 × 5 with max-pooling, 500 units.
    * ``conv:k``: two convolutions of 5 × 5 with stride 2 and 32k and 64k maps, two layers of 128k units, softplus
      (Kingma et al. 2015, figure 1b, which leaves the padding open: here 2).

    Args:
        spec: one of those above.
        shape: of one example, ``(features,)`` or ``(channels, height, width)``.
        outputs: how many numbers the network gives: classes, or 1 in regression.
        dropout: rates of plain ``nn.Dropout`` in front of the linear layers: of the input and of hidden units.
            Convolutions have none in front. None for no dropout at all.

    Returns:
        A flat ``nn.Sequential`` from ``[N, *shape]`` to ``[N, outputs]``.

    Raises:
        ValueError: if spec is none of those above, the shape does not fit it, or a rate is outside [0, 1).

    Example:
        >>> from vardrop.models import build
        >>> build("mlp:2x16", (1, 8, 8), 10, dropout=(0.2, 0.5))
        Sequential(
          (0): Flatten(start_dim=1, end_dim=-1)
          (1): Dropout(p=0.2, inplace=False)
          (2): Linear(in_features=64, out_features=16, bias=True)
          (3): ReLU()
          (4): Dropout(p=0.5, inplace=False)
          (5): Linear(in_features=16, out_features=16, bias=True)
          (6): ReLU()
          (7): Dropout(p=0.5, inplace=False)
          (8): Linear(in_features=16, out_features=10, bias=True)
        )
    """
    if not shape or min(shape) < 1 or outputs < 1:
        raise ValueError(f"vardrop.models: shape and outputs must be positive, got shape {shape} and outputs={outputs}")
    if dropout is not None and not all(0 <= rate < 1 for rate in dropout):
        raise ValueError(f"vardrop.models: both rates of dropout must be in [0, 1), got {dropout}")
    if spec == "lenet-300-100":
        return nn.Sequential(*_dense(shape, (300, 100), outputs, nn.ReLU, dropout))
    if spec == "lenet-5":
        return nn.Sequential(*_lenet5(shape, outputs, dropout))
    if found := re.fullmatch(rf"mlp:([1-9]\d?)x({_SIZE})", spec):
        return nn.Sequential(*_dense(shape, int(found[1]) * [int(found[2])], outputs, nn.ReLU, dropout))
    if re.fullmatch(rf"mlp:{_SIZE}(,{_SIZE})*", spec):
        return nn.Sequential(*_dense(shape, [int(size) for size in spec[4:].split(",")], outputs, nn.ReLU, dropout))
    if (found := re.fullmatch(r"conv:(\d{1,3}(?:\.\d+)?)", spec)) and float(found[1]) >= 0.05:
        return nn.Sequential(*_conv(shape, float(found[1]), outputs, dropout))
    raise ValueError(f"vardrop.models: a model must be {SYNTAX}, got {spec!r}")


def _dense(
    shape: tuple[int, ...], hidden: Sequence[int], outputs: int, act: Callable[[], nn.Module], dropout: Dropout | None
) -> Iterator[nn.Module]:
    """All of a fully connected network, for examples of any shape."""
    if len(shape) > 1:
        yield nn.Flatten()
    yield from _linears(math.prod(shape), hidden, outputs, act, dropout)


def _linears(
    inputs: int, hidden: Sequence[int], outputs: int, act: Callable[[], nn.Module], dropout: Dropout | None
) -> Iterator[nn.Module]:
    sizes = [inputs, *hidden, outputs]
    for i, (size, following) in enumerate(itertools.pairwise(sizes)):
        if i > 0:
            yield act()
        if dropout is not None:
            yield nn.Dropout(dropout[min(i, 1)])
        yield nn.Linear(size, following)


def _lenet5(shape: tuple[int, ...], outputs: int, dropout: Dropout | None) -> Iterator[nn.Module]:
    channels, height, width = _image("lenet-5", shape, smallest=16)
    yield from (nn.Conv2d(channels, 20, 5), nn.ReLU(), nn.MaxPool2d(2))
    yield from (nn.Conv2d(20, 50, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten())
    area = math.prod(((size - 4) // 2 - 4) // 2 for size in (height, width))
    yield from _linears(50 * area, [500], outputs, nn.ReLU, dropout and (dropout[1], dropout[1]))


def _conv(shape: tuple[int, ...], k: float, outputs: int, dropout: Dropout | None) -> Iterator[nn.Module]:
    channels, height, width = _image(f"conv:{k:g}", shape, smallest=1)
    narrow, wide, units = (round(size * k) for size in (32, 64, 128))
    yield from (nn.Conv2d(channels, narrow, 5, stride=2, padding=2), nn.Softplus())
    yield from (nn.Conv2d(narrow, wide, 5, stride=2, padding=2), nn.Softplus(), nn.Flatten())
    area = math.prod(math.ceil(size / 4) for size in (height, width))
    yield from _linears(wide * area, [units, units], outputs, nn.Softplus, dropout and (dropout[1], dropout[1]))


def _image(spec: str, shape: tuple[int, ...], smallest: int) -> tuple[int, ...]:
    if len(shape) != 3 or min(shape[1:]) < smallest:
        raise ValueError(
            f"vardrop.models: {spec} needs images, (channels, height, width), of at least {smallest} × {smallest}, "
            f"got examples of shape {shape}; an mlp takes any shape"
        )
    return shape
