"""Stochastic depth: residual blocks that are left out at random in training, and cost nothing then."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from vardrop.layers.base import check_choice, source
from vardrop.layers.droppath import (
    Mode,
    Scaling,
    as_if_used,
    coins,
    drop_path,
    shapes_may_depend_on_coins,
)
from vardrop.rates import Rate, Rated

__all__ = ["StochasticDepth"]


def _memory_order(x: Tensor) -> tuple[list[int], list[int]]:
    """The permutation of dimensions after the first that makes a channels-last tensor contiguous, and its inverse."""
    order = [0, *sorted(range(1, x.ndim), key=x.stride, reverse=True)]
    return order, [order.index(axis) for axis in range(x.ndim)]


class _Fork(torch.autograd.Function):
    """x, and its rows with the indices ``kept``; the gradients of both are added in one pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)
        return x.view_as(x), x.index_select(0, kept)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (kept,) = ctx.saved_tensors
        of_all, of_rows = gradients
        return of_all.index_add(0, kept, of_rows), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> tuple[Tensor, Tensor]:
        (kept,) = ctx.saved_tensors
        return tangents[0].view_as(tangents[0]), tangents[0].index_select(0, kept)


class _Join(torch.autograd.Function):
    """x + scale * rows at the indices ``kept``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kept: Tensor, rows: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(kept)
        ctx.save_for_forward(kept)
        ctx.scale = scale
        return x.index_add(0, kept, rows, alpha=scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, Tensor, None]:
        (kept,) = ctx.saved_tensors
        (of_all,) = gradients
        return of_all, None, of_all.index_select(0, kept).mul_(ctx.scale), None

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor) -> Tensor:
        (kept,) = ctx.saved_tensors
        return tangents[0].index_add(0, kept, tangents[2], alpha=ctx.scale)


def _take_rows(x: Tensor, kept: Tensor) -> tuple[Tensor, Tensor]:
    """x again, and its rows with the indices ``kept``, in the memory format of x."""
    if x.is_contiguous():
        return _Fork.apply(x, kept)
    order, back = _memory_order(x)
    again, rows = _Fork.apply(x.permute(order), kept)
    return again.permute(back), rows.permute(back)


def _add_rows(x: Tensor, kept: Tensor, rows: Tensor, scale: float) -> Tensor:
    """x + scale * rows at the indices ``kept``, in the memory format of x."""
    both = torch.result_type(x, rows)  # autocast may have them differ
    x, rows = x.to(both), rows.to(both)
    if x.is_contiguous():
        return _Join.apply(x, kept, rows, scale)
    order, back = _memory_order(x)
    sums: Tensor = _Join.apply(x.permute(order), kept, rows.permute(order), scale)
    return sums.permute(back)


def _arguments(block: nn.Module, rows: tuple[str, ...]) -> tuple[str, ...]:
    """The names of what the block takes by position besides x; all of ``rows`` have to be arguments of it."""
    parameters = list(inspect.signature(block.forward).parameters.values())[1:]
    order = tuple(p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD))
    known = [*order, *(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters) and not set(rows) <= set(known):
        raise ValueError(
            f"vardrop.StochasticDepth: rows must name arguments of the block besides x ({', '.join(known) or 'none'}), "
            f"got {', '.join(rows)}"
        )
    return order


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

    What the layer is called with besides x goes on to the block (not to the shortcut): masks, states, flags. In row
    mode ``rows`` has to name those arguments that have a row for every example, as of them too the block then gets the
    kept rows; sizes that happen to agree are no sign of it, so nothing is guessed.

    Args:
        block: the branch; takes x, or rows of it, and gives a tensor.
        p: probability to drop, or a schedule. For a network of several blocks see :func:`survival_rates`.
        mode: ``"row"``, a coin for every example; ``"batch"``, one coin for all.
        scaling: ``"inverted"`` divides by 1 − p in training, ``"original"`` multiplies by it in evaluation.
        shortcut: what x goes through on its other way, for example a strided convolution; None for x itself.
        rows: names of the block's other arguments that have a row for every example, or a single one that is broadcast;
            they may be tuples or dicts of such tensors. ``()`` says that none has.

    Shape:
        [batch, ...] with any number of dimensions; block and shortcut must agree on the shape out.

    Raises:
        TypeError: if block or shortcut is no module, the block gives no tensor, or a generator comes by position.
        ValueError: if p is no rate, a choice is unknown, x has no batch dimension, the shapes do not agree, ``rows``
            has a name that the block does not know, or a call has tensors besides x of which ``rows`` does not tell.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from vardrop.layers.stochastic_depth import StochasticDepth
        >>> seen = []
        >>> block = nn.Linear(3, 3)
        >>> handle = block.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
        >>> layer = StochasticDepth(block, 0.5)
        >>> layer(torch.ones(8, 3), generator=torch.Generator().manual_seed(0)).shape, seen
        (torch.Size([8, 3]), [3])
        >>> attention = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True)  # where a row of padding is an example's
        >>> layer = StochasticDepth(attention, 0.5, rows=("src_key_padding_mask",))
        >>> layer(torch.ones(8, 5, 4), src_key_padding_mask=torch.zeros(8, 5, dtype=torch.bool)).shape
        torch.Size([8, 5, 4])
    """

    def __init__(
        self,
        block: nn.Module,
        p: Rate = 0.1,
        mode: Mode = "row",
        scaling: Scaling = "inverted",
        shortcut: nn.Module | None = None,
        rows: Sequence[str] | None = None,
    ) -> None:
        super().__init__(p)
        check_choice("StochasticDepth", "mode", mode, Mode)
        check_choice("StochasticDepth", "scaling", scaling, Scaling)
        for name, module in (("block", block), ("shortcut", shortcut)):
            if not isinstance(module, nn.Module) and (name == "block" or module is not None):
                raise TypeError(
                    f"vardrop.StochasticDepth: {name} must be a torch.nn.Module, got {type(module).__name__}"
                )
        self.block = block
        self.shortcut = shortcut
        self.mode: Mode = mode
        self.scaling: Scaling = scaling
        self.rows = None if rows is None else (rows,) if isinstance(rows, str) else tuple(rows)
        self._order = _arguments(block, self.rows) if self.rows else ()

    def forward(self, x: Tensor, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Tensor:
        if x.ndim == 0:
            raise ValueError("vardrop.StochasticDepth: x must have a batch dimension, got a number")
        if args or kwargs:
            self._check_told(args, kwargs)
        base = x if self.shortcut is None else self.shortcut(x)
        if not self.training:
            branch = self._branch(x, base, *args, **kwargs)
            return base + (branch if self.scaling == "inverted" else branch * (1 - self.rate).to(branch.dtype))
        generator = source(generator)
        if not shapes_may_depend_on_coins():
            return base + drop_path(
                self._branch(x, base, *args, **kwargs), self.rate, self.mode, self.scaling, generator
            )
        drawn = coins(x.shape[0] if self.mode == "row" else 1, self.rate, x.device, generator)
        kept = drawn.nonzero().squeeze(1)
        scale = 1.0 if self.scaling == "original" or not len(kept) else 1 / (1 - self.p)
        if len(kept) == len(drawn):
            return torch.add(base, self._branch(x, base, *args, **kwargs), alpha=scale)
        if not len(kept):
            return as_if_used(base, [self.block])
        args, kwargs = self._arguments_of(kept, x.shape[0], args, kwargs)
        again, rows = _take_rows(x, kept)
        base = again if self.shortcut is None else base
        return _add_rows(base, kept, self._branch(rows, base, *args, **kwargs), scale)

    def _check_told(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if any(isinstance(value, torch.Generator) for value in args):
            raise TypeError(
                "vardrop.StochasticDepth: a generator must be given by its name, as what stands behind x is the "
                "block's, got one by position; write generator=..."
            )
        if (
            self.mode == "row"
            and self.rows is None
            and any(isinstance(leaf, Tensor) for leaf in tree_leaves((args, kwargs)))
        ):
            raise ValueError(
                "vardrop.StochasticDepth: rows= must name the arguments that have a row for every example, as the "
                "block gets the kept rows of them, got tensors besides x and no rows; rows=() says that none has"
            )

    def _arguments_of(
        self, kept: Tensor, batch: int, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The other arguments of the block, of which those in ``rows`` are for the kept examples."""

        def some(name: str, value: Any) -> Any:
            def rows(leaf: Any) -> Any:
                if not isinstance(leaf, Tensor) or leaf.shape[:1] == (1,):
                    return leaf
                if leaf.shape[:1] != (batch,):
                    raise ValueError(
                        f"vardrop.StochasticDepth: {name} must have a row for each of the {batch} examples, or one for "
                        f"all, as rows says that it has, got shape {tuple(leaf.shape)}"
                    )
                return _take_rows(leaf, kept)[1]

            return tree_map(rows, value) if name in (self.rows or ()) else value

        names = [*self._order, *[""] * len(args)]  # what *args takes has no name
        return tuple(map(some, names, args)), {name: some(name, value) for name, value in kwargs.items()}

    def _branch(self, rows: Tensor, base: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        branch = self.block(rows, *args, **kwargs)
        if not isinstance(branch, Tensor):
            raise TypeError(
                f"vardrop.StochasticDepth: block must give a tensor, got {type(branch).__name__}; wrap what makes the "
                "branch alone"
            )
        if branch.shape != (rows.shape[0], *base.shape[1:]):
            raise ValueError(
                "vardrop.StochasticDepth: block and shortcut must agree on the shape of what they are added to, got "
                f"{tuple(branch.shape)} and {tuple(base.shape)} for the input {tuple(rows.shape)}; give shortcut= a "
                "module that changes the shape as the block does"
            )
        return branch

    def extra_repr(self) -> str:
        return (
            f"{super().extra_repr()}, mode={self.mode!r}"
            + (f", scaling={self.scaling!r}" if self.scaling != "inverted" else "")
            + (f", rows={self.rows}" if self.rows is not None else "")
        )
