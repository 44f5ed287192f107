"""Stochastic depth: residual branches and layers that are left out at random in training, and cost nothing then."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from vardrop.layers.base import Drop, source
from vardrop.rates import Rate, Rated
from vardrop.schedules import checked_rate

__all__ = ["DropPath", "LayerDrop", "StochasticDepth", "drop_path", "every_other", "survival_rates"]

Mode = Literal["row", "batch"]
Scaling = Literal["inverted", "original"]


def _checked_choices(mode: str, scaling: str, owner: str) -> None:
    for name, value, choices in (("mode", mode, get_args(Mode)), ("scaling", scaling, get_args(Scaling))):
        if value not in choices:
            raise ValueError(f"vardrop.{owner}: {name} must be one of {', '.join(choices)}, got {value!r}")


def _kept(count: int, rate: Tensor, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Independent coins, True with probability 1 - rate to within 2^-24."""
    return torch.rand(count, device=device, generator=generator) >= rate.detach().to(device, torch.float32)


def _inverse(kept: Tensor) -> Tensor:
    """1 / kept, and 0 where nothing is."""
    return torch.where(kept > 0, 1 / kept, 0.0)


def drop_path(
    x: Tensor,
    rate: float | Tensor,
    mode: Mode = "row",
    scaling: Scaling = "inverted",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop the residual branch of whole examples, as in training (stochastic depth, Huang et al. 2016).

    .. math:: y_i = x_i b_i / (1 - p), \quad b_i \sim \text{Bernoulli}(1 - p)

    Args:
        x: the branch, before it is added to its shortcut.
        rate: p, the probability to drop, from 0 to 1; a 0-dim tensor changes without a new compilation, and is not
            checked.
        mode: ``"row"``, a coin for every example; ``"batch"``, one coin for all.
        scaling: ``"inverted"`` as above; ``"original"`` leaves the division out, and at inference the branch has to be
            multiplied by 1 − p instead, which :class:`DropPath` does. Both have the expectation that inference has.
        generator: source of the coins; torch's default one if None.

    Shape:
        [batch, ...] with any number of dimensions; the same shape out.

    Raises:
        TypeError: if x is of an integer type.
        ValueError: if x has no batch dimension, p is no rate, or a choice is unknown.

    Example:
        >>> import torch
        >>> from vardrop.layers.droppath import drop_path
        >>> drop_path(torch.ones(6, 1), 0.5, generator=torch.Generator().manual_seed(0)).flatten()
        tensor([0., 2., 0., 0., 0., 2.])
    """
    _checked_choices(mode, scaling, "drop_path")
    if x.ndim == 0:
        raise ValueError("vardrop.drop_path: x must have a batch dimension, got a number")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"vardrop.drop_path: x must be of a floating-point or complex type, got {x.dtype}")
    p = rate.detach() if isinstance(rate, Tensor) else torch.tensor(checked_rate(rate, "drop_path"))
    noise = _kept(x.shape[0] if mode == "row" else 1, p, x.device, generator).to(x.real.dtype)
    if scaling == "inverted":
        noise = noise * _inverse(1 - p.to(noise.device)).to(noise.dtype)
    return x * noise.reshape(-1, *[1] * (x.ndim - 1))


class DropPath(Drop):
    """Drops the residual branch of whole examples in training: see :func:`drop_path`.

    It is applied to what a branch has computed already. :class:`StochasticDepth` wraps the branch and saves its cost.

    Args:
        p: probability to drop, or a schedule. For a network of several blocks see :func:`survival_rates`.
        mode: ``"row"``, a coin for every example; ``"batch"``, one coin for all.
        scaling: ``"inverted"`` divides by 1 − p in training, ``"original"`` multiplies by it in evaluation.

    Shape:
        [batch, ...] with any number of dimensions, and the same out.

    Raises:
        ValueError: as :func:`drop_path` does.

    Example:
        >>> import torch
        >>> from vardrop.layers.droppath import DropPath
        >>> layer = DropPath(0.25, scaling="original")
        >>> layer.eval()(torch.ones(2, 3))
        tensor([[0.7500, 0.7500, 0.7500],
                [0.7500, 0.7500, 0.7500]])
    """

    def __init__(self, p: Rate = 0.1, mode: Mode = "row", scaling: Scaling = "inverted") -> None:
        super().__init__(p)
        _checked_choices(mode, scaling, "DropPath")
        self.mode: Mode = mode
        self.scaling: Scaling = scaling

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return drop_path(x, self.rate, self.mode, self.scaling, generator)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        y = super().forward(x, generator)
        return y if self.training or self.scaling == "inverted" else y * (1 - self.rate).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}" + (
            f", scaling={self.scaling!r}" if self.scaling != "inverted" else ""
        )


def _shapes_may_depend_on_coins() -> bool:
    """Not inside a compiler or a torch.func transform."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def _as_if_used(y: Tensor, skipped: Iterable[nn.Module]) -> Tensor:
    """y, with gradients of 0 for the parameters of modules that did not run, which distributed training waits for."""
    unused = {id(p): p for module in skipped for p in module.parameters() if p.requires_grad}
    if not unused or not torch.is_grad_enabled():
        return y
    nothing = [p.flatten()[:0].sum().to(y.device, y.dtype) for p in unused.values()]  # reads no number, so no NaN
    return y + torch.stack(nothing).sum()


def _memory_order(x: Tensor) -> tuple[list[int], list[int]]:
    """The permutation of dimensions after the first that makes a channels-last tensor contiguous, and its inverse."""
    order = [0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)]
    return order, [order.index(axis) for axis in range(x.ndim)]


def _take_rows(x: Tensor, kept: Tensor) -> Tensor:
    """The rows of x with the indices ``kept``, in the memory format of x."""
    order, back = _memory_order(x)
    return x.permute(order).index_select(0, kept).permute(back)


def _add_rows(x: Tensor, kept: Tensor, rows: Tensor, scale: float) -> Tensor:
    """x + scale * rows at the indices ``kept``, in the memory format of x."""
    both = torch.result_type(x, rows)  # autocast may have them differ
    order, back = _memory_order(x)
    sums = x.to(both).permute(order).index_add(0, kept, rows.to(both).permute(order), alpha=scale)
    return sums.permute(back)


class StochasticDepth(Rated):
    r"""A residual block whose branch is left out at random in training, and not computed then (Huang et al. 2016).

    .. math:: y_i = \text{shortcut}(x_i) + b_i\, \text{block}(x_i) / (1 - p), \quad b_i \sim \text{Bernoulli}(1 - p)

    In row mode the block sees the kept examples only, so its cost falls with the rate, and so BatchNorm inside it takes
    its statistics from them. In batch mode it runs for all or for none. When it does not run at all its buffers do not
    change and its parameters get gradients of 0, so distributed data parallel needs no ``find_unused_parameters``;
    fully sharded parallelism, where every process has to run every block, needs :class:`DropPath` instead.

    Compiled code and torch.func transforms have no shapes that depend on coins: there the block runs on every example
    and the branch is dropped after it. Only time and the statistics of BatchNorm differ from the law above.
    A BatchNorm that gets one value per channel raises, and a lone kept example of [batch, features] is that.

    Args:
        block: the branch; takes x, or rows of it.
        p: probability to drop, or a schedule. For a network of several blocks see :func:`survival_rates`.
        mode: ``"row"``, a coin for every example; ``"batch"``, one coin for all.
        scaling: ``"inverted"`` divides by 1 − p in training, ``"original"`` multiplies by it in evaluation.
        shortcut: what x goes through on its other way, for example a strided convolution; None for x itself.

    Shape:
        [batch, ...] with any number of dimensions; block and shortcut must agree on the shape out.

    Raises:
        TypeError: if block or shortcut is no module.
        ValueError: if p is no rate, a choice is unknown, x has no batch dimension, or the shapes do not agree.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from vardrop.layers.droppath import StochasticDepth
        >>> seen = []
        >>> block = nn.Linear(3, 3)
        >>> handle = block.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        >>> layer = StochasticDepth(block, 0.5)
        >>> layer(torch.ones(8, 3), generator=torch.Generator().manual_seed(0)).shape, seen
        (torch.Size([8, 3]), [3])
    """

    def __init__(
        self,
        block: nn.Module,
        p: Rate = 0.1,
        mode: Mode = "row",
        scaling: Scaling = "inverted",
        shortcut: nn.Module | None = None,
    ) -> None:
        super().__init__(p)
        _checked_choices(mode, scaling, "StochasticDepth")
        for name, module in (("block", block), ("shortcut", shortcut)):
            if not isinstance(module, nn.Module) and (name == "block" or module is not None):
                raise TypeError(
                    f"vardrop.StochasticDepth: {name} must be a torch.nn.Module, got {type(module).__name__}"
                )
        self.block = block
        self.shortcut = shortcut
        self.mode: Mode = mode
        self.scaling: Scaling = scaling

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if x.ndim == 0:
            raise ValueError("vardrop.StochasticDepth: x must have a batch dimension, got a number")
        base = x if self.shortcut is None else self.shortcut(x)
        if not self.training:
            branch = self._branch(x, base)
            return base + (branch if self.scaling == "inverted" else branch * (1 - self.rate).to(branch.dtype))
        generator = source(generator)
        if not _shapes_may_depend_on_coins():
            return base + drop_path(self._branch(x, base), self.rate, self.mode, self.scaling, generator)
        coins = _kept(x.shape[0] if self.mode == "row" else 1, self.rate, x.device, generator)
        kept = coins.nonzero().squeeze(1)
        scale = 1.0 if self.scaling == "original" or not len(kept) else 1 / (1 - self.p)
        if len(kept) == len(coins):
            return torch.add(base, self._branch(x, base), alpha=scale)
        if not len(kept):
            return _as_if_used(base, [self.block])
        return _add_rows(base, kept, self._branch(_take_rows(x, kept), base), scale)

    def _branch(self, rows: Tensor, base: Tensor) -> Tensor:
        branch: Tensor = self.block(rows)
        if branch.shape != (rows.shape[0], *base.shape[1:]):
            raise ValueError(
                "vardrop.StochasticDepth: block and shortcut must agree on the shape of what they are added to, got "
                f"{tuple(branch.shape)} and {tuple(base.shape)} for the input {tuple(rows.shape)}; give shortcut= a "
                "module that changes the shape as the block does"
            )
        return branch

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}" + (
            f", scaling={self.scaling!r}" if self.scaling != "inverted" else ""
        )


class LayerDrop(Rated):
    """A stack of layers, each of which is left out at random in training (LayerDrop, Fan et al. 2020).

    One coin per layer decides for the whole batch, and a layer that is left out costs nothing; nothing is rescaled, as
    in the paper. Evaluation runs all layers, or those of ``keep``: a network trained so can be made shallower
    without more training. ``nn.ModuleList(stack.active())`` is then the smaller stack.

    The parameters of layers that were left out get gradients of 0, so distributed data parallel needs no
    ``find_unused_parameters``. Code that runs the layers itself iterates over :meth:`active` in place of the list,
    and has no such gradients. Compiled code and torch.func transforms run every layer, and go on with the output or
    the input of each.

    Args:
        layers: the layers; the output of each is the first argument of the next.
        p: probability to leave a layer out, or a schedule; 0.2 in the paper.
        keep: the layers that run in evaluation, by index; None for all. See :func:`every_other`.

    Attributes:
        layers: all of them, as ``nn.ModuleList``.
        keep: as given; may be changed at any time, and is not part of the ``state_dict``.

    Raises:
        TypeError: if a layer is no module.
        ValueError: if p is no rate, there is no layer, or ``keep`` names one that does not exist.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from vardrop.layers.droppath import LayerDrop, every_other
        >>> stack = LayerDrop([nn.Linear(4, 4) for _ in range(6)], p=0.2)
        >>> stack(torch.ones(2, 4)).shape
        torch.Size([2, 4])
        >>> stack.keep = every_other(6)
        >>> len(stack.eval().active())
        3
    """

    def __init__(self, layers: Iterable[nn.Module], p: Rate = 0.2, keep: Sequence[int] | None = None) -> None:
        super().__init__(p)
        found = list(layers)
        if not found:
            raise ValueError("vardrop.LayerDrop: layers must be one module or more, got none")
        for layer in found:
            if not isinstance(layer, nn.Module):
                raise TypeError(f"vardrop.LayerDrop: layers must be torch.nn.Modules, got {type(layer).__name__}")
        self.layers = nn.ModuleList(found)
        self.keep = keep

    @property
    def keep(self) -> tuple[int, ...] | None:
        """The layers that run in evaluation; None for all."""
        return self._keep

    @keep.setter
    def keep(self, indices: Sequence[int] | None) -> None:
        if indices is not None:
            indices = tuple(operator.index(index) for index in indices)
            if list(indices) != sorted(set(indices)) or any(not 0 <= index < len(self.layers) for index in indices):
                raise ValueError(
                    f"vardrop.LayerDrop: keep must be growing indices below {len(self.layers)}, the number of layers, "
                    f"got {list(indices)}"
                )
        self._keep = indices

    def _coins(self, generator: torch.Generator | None) -> Tensor:
        return _kept(len(self.layers), self.rate, self.rate.device, source(generator))

    def active(self, generator: torch.Generator | None = None) -> list[nn.Module]:
        """The layers of one pass: drawn anew in training, those of ``keep`` in evaluation."""
        if self.training:
            coins = self._coins(generator).tolist()
            return [layer for layer, coin in zip(self.layers, coins, strict=True) if coin]
        return [layer for index, layer in enumerate(self.layers) if self.keep is None or index in self.keep]

    def forward(self, x: Any, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        if self.training and not _shapes_may_depend_on_coins():
            for layer, coin in zip(self.layers, self._coins(generator).unbind(), strict=True):
                x = torch.where(coin, layer(x, *args, **kwargs), x)
            return x
        active = self.active(generator)
        for layer in active:
            x = layer(x, *args, **kwargs)
        if self.training and isinstance(x, Tensor):
            x = _as_if_used(x, [layer for layer in self.layers if layer not in active])
        return x

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.keep is None else f", keep={list(self.keep)}")


def survival_rates(depth: int, last: float = 0.5) -> list[float]:
    r"""The probability that each of so many residual blocks survives, falling linearly (Huang et al. 2016, eq. 4).

    .. math:: 1 - \frac{l}{L} (1 - p_L), \quad l = 1, \dots, L

    A block is dropped with the rest: ``StochasticDepth(block, 1 - survival)``. Accounts that give the rate of dropping
    as :math:`(l / L)\, p_L` have taken the survival rate :math:`p_L` for a drop rate; only at 0.5 is it the same.

    Args:
        depth: L, the number of blocks.
        last: :math:`p_L`, the survival of the last block, from 0 to 1; 0.5 in the paper.

    Raises:
        ValueError: if there is no block, or ``last`` is no probability.

    Example:
        >>> from vardrop.layers.droppath import survival_rates
        >>> survival_rates(4, last=0.5)
        [0.875, 0.75, 0.625, 0.5]
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"vardrop.survival_rates: depth must be a number of blocks, 1 or more, got {depth!r}")
    if not 0 <= last <= 1:
        raise ValueError(f"vardrop.survival_rates: last must be a survival rate in [0, 1], got {last!r}")
    return [1 - block / depth * (1 - last) for block in range(1, depth + 1)]


def every_other(depth: int, drop: float = 0.5) -> list[int]:
    r"""The layers that stay when a stack is pruned to a share of its depth (the "every other" of Fan et al. 2020).

    Counted from 1, layers l with :math:`l \equiv 0 \pmod{\lfloor 1 / drop \rfloor}` go.

    Args:
        depth: the number of layers.
        drop: the share that goes, above 0 and at most 0.5; other shares than 1/k are rounded up to one.

    Returns:
        Indices from 0, for ``LayerDrop.keep``.

    Raises:
        ValueError: if depth is no number of layers, or ``drop`` is out of its range.

    Example:
        >>> from vardrop.layers.droppath import every_other
        >>> every_other(6), every_other(6, drop=1 / 3)
        ([0, 2, 4], [0, 1, 3, 4])
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"vardrop.every_other: depth must be a number of layers, 1 or more, got {depth!r}")
    if not 0 < drop <= 0.5:
        raise ValueError(f"vardrop.every_other: drop must be a share above 0 and at most 0.5, got {drop!r}")
    period = int(1 / drop + 1e-9)  # 1 / (1 / 3) is not always 3
    return [index for index in range(depth) if (index + 1) % period]
