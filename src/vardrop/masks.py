"""Random masks from random bits: Bernoulli draws of an exact rate, at a fraction of the cost of torch's."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vardrop.half import wide_type

_LEVELS = 1 << 16  # rates are multiples of 2^-16: sixteen random bits for every unit, four units in an int64
_FEW = 1 << 8  # or of 2^-8, such as 1/4: eight bits; the rate 1/2 is one bit


def bernoulli(
    sizes: list[int], rate: float | Tensor, x: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, float | Tensor | None]:
    """What is kept: ones, with probability 1 − rate, and zeros; and the scale that makes their mean 1.

    They are bytes: all that autograd keeps for the backward pass. At the rate 1/2 a mask of 2 and 0 needs no scale.

    Args:
        sizes: the shape of the mask: that of x, or 1 along some of its axes.
        rate: in (0, 1]; a number or a 0-dim tensor.
        x: what the mask is for, of which the device, the kind of numbers and the order in memory matter.
        generator: source of the bits; torch's default one if None.

    Returns:
        The mask, in the memory order of x, and the scale, or None.

    Example:
        >>> import torch
        >>> from vardrop.masks import bernoulli
        >>> bernoulli([2, 3], 0.75, torch.ones(2, 3), torch.Generator().manual_seed(2))
        (tensor([[0, 0, 1],
                [0, 0, 1]], dtype=torch.uint8), 4.0)
    """
    count = math.prod(sizes)
    if isinstance(rate, Tensor):
        bits = _bits(count, torch.int16, x, generator)
        level = (rate * _LEVELS).round().clamp(max=_LEVELS - 1)
        kept = (bits >= (level - _LEVELS // 2).to(torch.int16)).to(torch.uint8)
        scale = torch.where(rate == 1, 0.0, _LEVELS / (_LEVELS - level.to(wide_type(x))))
        return in_memory_order(kept, sizes, x), scale.clamp(max=torch.finfo(x.dtype).max)  # inf times 0 is no number
    number = min(max(round(rate * _LEVELS), 1), _LEVELS - 1)
    if number == _LEVELS // 2:
        return in_memory_order(_coins(count, x, generator), sizes, x), None
    factor = 0.0 if rate == 1 else _LEVELS / (_LEVELS - number)
    if number % _FEW:
        lowest = number - _LEVELS // 2  # of the bits that are kept
        kept = _at_least(_bits(count, torch.int16, x, generator), lowest).to(torch.uint8)
    else:
        lowest = number // _FEW - _FEW // 2
        kept = _at_least(_bits(count, torch.int8, x, generator), lowest).view(torch.uint8)
    return in_memory_order(kept, sizes, x), factor


def _coins(count: int, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """2 or 0 for every unit, of one bit each: a seventh of them takes the second bits of some bytes, and so on."""
    bytes_ = _bits(-(-count // 7), torch.uint8, x, generator)
    special = bytes_.device.type != "cpu" or type(bytes_) is not Tensor or torch.compiler.is_compiling()
    powers = _powers(bytes_.device) if special else _powers_of_the_processor()
    return (bytes_ & powers).clamp(max=2).view(-1)[:count]


def _powers(device: torch.device | str) -> Tensor:
    """2, 4, ..., 128: the bits of a byte that are coins."""
    return 1 << torch.arange(1, 8, dtype=torch.uint8, device=device).unsqueeze(1)


@functools.cache
def _powers_of_the_processor() -> Tensor:
    return _powers("cpu")


def _bits(count: int, dtype: torch.dtype, x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Integers whose bits are all random."""
    size = (-(-count * dtype.itemsize // 8),)
    words = torch.randint(-(1 << 63), (1 << 63) - 1, size, device=x.device, **from_generator(generator))
    return words.view(dtype)[:count]


def _at_least(bits: Tensor, lowest: int) -> Tensor:
    """1 where bits >= lowest, else 0, in a fifth of the time of the comparison."""
    return bits.clamp(lowest - 1, lowest).sub_(lowest - 1)


def from_generator(generator: torch.Generator | None) -> dict[str, Any]:
    """The argument of a draw; left out where it is None, as torch knows no symbolic sizes with one."""
    return {} if generator is None else {"generator": generator}


def in_memory_order(draws: Tensor, sizes: Sequence[int], x: Tensor) -> Tensor:
    """A row of draws as a tensor of some sizes, in the memory order of x: what mixes two orders is slow."""
    if x.is_contiguous():
        return draws.view(sizes)
    order = _memory_order(x)
    return draws.view([sizes[axis] for axis in order]).permute(_inverse(order))


def _memory_order(x: Tensor) -> list[int]:
    """The dimensions of x from the outermost in memory to the innermost."""
    strides = x.stride()
    order: list[int] = []
    for axis in range(x.ndim):  # by insertion: a compiler with dynamic shapes can compare strides, but not sort by them
        place = axis
        while place and strides[order[place - 1]] < strides[axis]:
            place -= 1
        order.insert(place, axis)
    return order


def _inverse(order: list[int]) -> list[int]:
    """The permutation that undoes one."""
    return sorted(range(len(order)), key=order.__getitem__)
