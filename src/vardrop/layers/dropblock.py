"""DropBlock: whole blocks of a feature map are dropped, at exactly the rate that was asked for.

A seed drops the block of units below and to the right of it. Seeds are independent, on a grid that reaches far enough
beyond the map for every unit, corner or centre, to lie in equally many blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from vardrop.layers.base import Drop, check_choice, inverse
from vardrop.masks import from_generator
from vardrop.rates import Rate
from vardrop.schedules import checked_rate

__all__ = ["DropBlock1d", "DropBlock2d", "DropBlock3d", "drop_block"]

Seeds = Literal["extended", "valid"]
Rescale = Literal["expected", "sample", "batch"]


class _Geometry(NamedTuple):
    """Where seeds may lie; every tuple has one entry per spatial dimension."""

    space: tuple[int, ...]  # the map
    block: tuple[int, ...]  # clipped to the map
    extended: bool

    @property
    def grid(self) -> tuple[int, ...]:
        """The numbers of places for a seed."""
        beyond = 1 if self.extended else -1
        return tuple(size + beyond * (b - 1) for size, b in zip(self.space, self.block, strict=True))

    def hazard(self, p: Tensor) -> Tensor:
        """-log P(a place has no seed)."""
        if self.extended:
            return -torch.log1p(-p) / math.prod(self.block)
        share = math.prod(self.space) / (math.prod(self.block) * math.prod(self.grid))
        return -torch.log1p(-p * share)

    def cover(self, like: Tensor) -> Tensor:
        """The number of places whose seed drops a unit: one number, or [*space]."""
        if self.extended:
            return like.new_tensor(math.prod(self.block))
        cover = like.new_ones(())
        for size, b in zip(self.space, self.block, strict=True):
            i = torch.arange(size, device=like.device)
            inside = i.clamp(max=size - b) - (i - b + 1).clamp(min=0) + 1
            cover = cover[..., None] * inside.to(like.dtype)
        return cover


def _wide(device: torch.device) -> torch.dtype:
    """The type for probabilities: in float32 a seed's, of order p / b³, would be off by per cents."""
    return torch.float32 if device.type == "mps" else torch.float64  # which has no wider one


def _sparse_seeds(places: int, hazard: float, generator: torch.Generator | None) -> Tensor:
    """The seeds among so many places, without a draw for every place; some may come twice.

    Points of a Poisson process of rate h per place: their number is Poisson, each falls anywhere. Numbers of points in
    different places are then independent, and P(none) = exp(-h): exactly the law of independent seeds.
    """
    expected = torch.tensor(places * hazard, dtype=torch.float64, device="cpu")
    count = int(torch.poisson(expected, generator=generator))
    return torch.randint(places, (count,), generator=generator, device="cpu")


def _sparse_mask(x: Tensor, channels: int, where: _Geometry, p: Tensor, generator: torch.Generator | None) -> Tensor:
    """1 where kept and 0 where dropped: the few blocks are written into a mask of ones."""
    like = x if channels == x.shape[1] else x[:, :1]
    mask = torch.ones_like(like, dtype=x.real.dtype, requires_grad=False)  # in the memory format of x
    maps = mask.shape[0] * channels
    seed = _sparse_seeds(maps * math.prod(where.grid), float(where.hazard(p)), generator)
    strides = mask.stride()
    index = torch.zeros((), dtype=torch.long, device="cpu")
    for axis in range(len(where.space) - 1, -1, -1):
        size, b = where.space[axis], where.block[axis]
        first = seed % where.grid[axis] - (b - 1 if where.extended else 0)
        seed = seed // where.grid[axis]
        # what of a block lies beyond the map falls on the rim, which that block covers anyway
        units = (first[:, None] + torch.arange(b, device="cpu")).clamp_(0, size - 1) * strides[2 + axis]
        index = units.reshape(len(seed), b, *[1] * (index.ndim - 1)) + index[:, None] if index.ndim else units
    start = seed // channels * strides[0] + seed % channels * strides[1]
    index = index + start.reshape(-1, *[1] * len(where.space))
    torch.as_strided(mask, (mask.numel(),), (1,)).index_fill_(0, index.flatten(), 0)
    return mask


def _dense_mask(x: Tensor, channels: int, where: _Geometry, p: Tensor, generator: torch.Generator | None) -> Tensor:
    """The same law with a draw for every place and no shape that depends on them: for compilers, vmap and GPUs."""
    shape = (x.shape[0], channels, *where.grid)
    draws = torch.rand(shape, dtype=p.dtype, device=x.device, **from_generator(generator))
    dropped = draws < -torch.expm1(-where.hazard(p))
    if not where.extended:
        beyond = [b - 1 for b in reversed(where.block) for _ in range(2)]
        dropped = torch.nn.functional.pad(dropped, beyond)
    for axis, b in enumerate(where.block, start=2):
        width = 1
        while width < b:  # a window of twice the width is the union of two
            step = min(width, b - width)
            length = dropped.shape[axis] - step
            dropped = dropped.narrow(axis, 0, length) | dropped.narrow(axis, step, length)
            width += step
    return (~dropped).to(x.real.dtype)


def _sparse_pays(x: Tensor) -> bool:
    """On a CPU drawing is what costs. Elsewhere, and where shapes must not depend on draws, every place gets one."""
    return (
        not torch.compiler.is_compiling()
        and x.device.type == "cpu"
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _checked_block(block_size: int | Sequence[int], dims: int, owner: str) -> tuple[int, ...]:
    sizes = tuple(block_size) if isinstance(block_size, Sequence) else (block_size,) * dims
    if len(sizes) != dims or any(isinstance(b, bool) or not isinstance(b, int) or b < 1 for b in sizes):
        raise ValueError(
            f"vardrop.{owner}: block_size must be a whole number of 1 or more, or {dims} of them, one for every "
            f"spatial dimension, got {block_size!r}"
        )
    return sizes


def drop_block(
    x: Tensor,
    rate: float | Tensor,
    block_size: int | Sequence[int] = 7,
    *,
    share_channels: bool = False,
    seeds: Seeds = "extended",
    rescale: Rescale = "expected",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop blocks of a feature map and rescale the rest (DropBlock, Ghiasi et al. 2018), at the exact rate.

    Every place of a grid that is extended by b − 1 in each of the n dimensions has a seed with probability γ, and a
    seed drops the block of :math:`b^n` units that begins there. A unit is dropped by any of :math:`b^n` places, so

    .. math:: P(\text{dropped}) = 1 - (1 - \gamma)^{b^n} = p \quad\text{for}\quad \gamma = 1 - (1 - p)^{1 / b^n}

    at every position of every map. The paper's own rule, ``seeds="valid"``, takes blocks that lie inside the map only,
    with :math:`\gamma = p \prod H_i / (b^n \prod (H_i - b + 1))`: its rate is below p, and lower at a rim than inside.

    A block larger than the map is clipped to it, dimension by dimension. On a CPU the number of seeds is Poisson
    and each lies anywhere, which is the law of independent seeds at a fraction of the draws. Compiled code, torch.func
    transforms and GPUs draw for every place; the law is the same, the stream of random numbers is not.

    Args:
        x: a feature map, real or complex.
        rate: p, from 0 to 1; a 0-dim tensor changes without a new compilation, and is not checked.
        block_size: b in units, or one for every spatial dimension.
        share_channels: drop the same places in every channel, instead of independent ones (which the paper prefers).
        seeds: ``"extended"`` for the exact rate, ``"valid"`` for the paper's rule.
        rescale: what to divide by. ``"expected"``: the probability that the unit is kept, 1 − p with extended seeds;
            the expectation of every unit is then x, and examples stay independent. ``"sample"`` or ``"batch"``:
            the share that was kept in this example, or in the whole batch as in the paper; the scale of the map then
            varies less, and x is the expectation only in so far as maps are many blocks large. A sample, or batch,
            of which nothing is left is 0.
        generator: source of the seeds; torch's default one if None.

    Shape:
        [batch, channels, length], [batch, channels, height, width] or with more dimensions; the same shape out.

    Raises:
        TypeError: if x is of an integer type.
        ValueError: if x has no spatial dimension, p is no rate, a block is smaller than 1, or a choice is unknown.

    Example:
        >>> import torch
        >>> from vardrop.layers.dropblock import drop_block
        >>> x = torch.ones(64, 8, 14, 10)
        >>> y = drop_block(x, 0.1, block_size=5, generator=torch.Generator().manual_seed(0))
        >>> y.unique()
        tensor([0.0000, 1.1111])
        >>> round(float((y == 0).float().mean()), 2)
        0.1
    """
    if x.ndim < 3:
        raise ValueError(
            "vardrop.drop_block: x must have a batch, a channel and one or more spatial dimensions, got shape "
            f"{tuple(x.shape)}; for values without a place in space use nn.Dropout"
        )
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"vardrop.drop_block: x must be of a floating-point or complex type, got {x.dtype}")
    check_choice("drop_block", "seeds", seeds, Seeds)
    check_choice("drop_block", "rescale", rescale, Rescale)
    block = _checked_block(block_size, x.ndim - 2, "drop_block")
    value = rate.detach() if isinstance(rate, Tensor) else torch.tensor(checked_rate(rate, "drop_block"), device="cpu")
    if x.numel() == 0:
        return x
    p = value.to(x.device, _wide(x.device))
    space = tuple(x.shape[2:])
    where = _Geometry(space, tuple(map(min, block, space)), seeds == "extended")
    sparse = _sparse_pays(x) and float(p) < 1  # at 1 the number of seeds would be infinite
    draw = _sparse_mask if sparse else _dense_mask
    with torch.no_grad():
        mask = draw(x, 1 if share_channels else x.shape[1], where, p, generator)
        if rescale == "expected":
            kept = torch.exp(-where.hazard(p) * where.cover(p))
        else:
            over = list(range(1 if rescale == "sample" else 0, x.ndim))
            kept = mask.mean(over, keepdim=True, dtype=torch.promote_types(mask.dtype, torch.float32))
        scale = inverse(kept, mask.dtype)
        mask = mask.mul_(scale) if sparse else mask * scale
    return x * mask


class _DropBlock(Drop):
    """DropBlock over a fixed number of spatial dimensions."""

    dims: int

    def __init__(
        self,
        p: Rate = 0.1,
        block_size: int | Sequence[int] = 7,
        *,
        share_channels: bool = False,
        seeds: Seeds = "extended",
        rescale: Rescale = "expected",
    ) -> None:
        super().__init__(p)
        owner = type(self).__name__
        check_choice(owner, "seeds", seeds, Seeds)
        check_choice(owner, "rescale", rescale, Rescale)
        self.block_size = _checked_block(block_size, self.dims, owner)
        self.share_channels = share_channels
        self.seeds: Seeds = seeds
        self.rescale: Rescale = rescale

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if x.ndim != self.dims + 2:
            space = ", ".join(("depth", "height", "width")[-self.dims :] if self.dims > 1 else ("length",))
            raise ValueError(
                f"vardrop.{type(self).__name__}: x must have the shape [batch, channels, {space}], got {tuple(x.shape)}"
            )
        return super().forward(x, generator)

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return drop_block(
            x,
            self.rate,
            self.block_size,
            share_channels=self.share_channels,
            seeds=self.seeds,
            rescale=self.rescale,
            generator=generator,
        )

    def extra_repr(self) -> str:
        b = self.block_size
        parts = [super().extra_repr(), f"block_size={b[0] if len(set(b)) == 1 else b}"]
        parts += ["share_channels=True"] if self.share_channels else []
        parts += [f"seeds={self.seeds!r}"] if self.seeds != "extended" else []
        parts += [f"rescale={self.rescale!r}"] if self.rescale != "expected" else []
        return ", ".join(parts)


class DropBlock1d(_DropBlock):
    """DropBlock on sequences of features, in training: see :func:`drop_block`.

    Args:
        p: share of the units that is dropped, or a schedule; the paper raises it linearly from 0.
        block_size: length of a block.
        share_channels: drop the same places in every channel.
        seeds: ``"extended"`` for the exact rate, ``"valid"`` for the paper's rule.
        rescale: divide by the ``"expected"`` share that is kept, or by that of the ``"sample"`` or the ``"batch"``.

    Shape:
        [batch, channels, length], and the same out.

    Raises:
        ValueError: as :func:`drop_block` does.

    Example:
        >>> import torch
        >>> from vardrop.layers.dropblock import DropBlock1d
        >>> DropBlock1d(0.1, block_size=5)(torch.ones(4, 8, 100)).shape
        torch.Size([4, 8, 100])
    """

    dims = 1


class DropBlock2d(_DropBlock):
    """DropBlock on images of features, in training: see :func:`drop_block`.

    Args:
        p: share of the units that is dropped, or a schedule; the paper raises it linearly from 0.
        block_size: height and width of a block, or one number for both.
        share_channels: drop the same places in every channel.
        seeds: ``"extended"`` for the exact rate, ``"valid"`` for the paper's rule.
        rescale: divide by the ``"expected"`` share that is kept, or by that of the ``"sample"`` or the ``"batch"``.

    Shape:
        [batch, channels, height, width], and the same out.

    Raises:
        ValueError: as :func:`drop_block` does.

    Example:
        >>> import torch
        >>> from vardrop import rates
        >>> from vardrop.layers.dropblock import DropBlock2d
        >>> layer = DropBlock2d(rates.linear(0.0, 0.1, steps=1000), block_size=7)
        >>> scheduler = rates.RateScheduler(layer)
        >>> for _ in range(500): scheduler.step()
        >>> round(layer.p, 3), layer(torch.ones(4, 8, 14, 14)).shape
        (0.05, torch.Size([4, 8, 14, 14]))
    """

    dims = 2


class DropBlock3d(_DropBlock):
    """DropBlock on volumes or films of features, in training: see :func:`drop_block`.

    Args:
        p: share of the units that is dropped, or a schedule; the paper raises it linearly from 0.
        block_size: depth, height and width of a block, or one number for all.
        share_channels: drop the same places in every channel.
        seeds: ``"extended"`` for the exact rate, ``"valid"`` for the paper's rule.
        rescale: divide by the ``"expected"`` share that is kept, or by that of the ``"sample"`` or the ``"batch"``.

    Shape:
        [batch, channels, depth, height, width], and the same out.

    Raises:
        ValueError: as :func:`drop_block` does.

    Example:
        >>> import torch
        >>> from vardrop.layers.dropblock import DropBlock3d
        >>> DropBlock3d(0.1, block_size=(1, 3, 3))(torch.ones(2, 4, 8, 16, 16)).shape
        torch.Size([2, 4, 8, 16, 16])
    """

    dims = 3
