"""LayerDrop: whole layers of a stack are left out at random in training, and can be pruned after it."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.layers.base import source
from vardrop.layers.droppath import as_if_used, coins, shapes_may_depend_on_coins
from vardrop.rates import Rate, Rated

__all__ = ["LayerDrop", "every_other"]


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
        >>> from vardrop.layers.layerdrop import LayerDrop, every_other
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
        return coins(len(self.layers), self.rate, self.rate.device, source(generator))

    def active(self, generator: torch.Generator | None = None) -> list[nn.Module]:
        """The layers of one pass: drawn anew in training, those of ``keep`` in evaluation."""
        if self.training:
            drawn = self._coins(generator).tolist()
            return [layer for layer, coin in zip(self.layers, drawn, strict=True) if coin]
        return [layer for index, layer in enumerate(self.layers) if self.keep is None or index in self.keep]

    def forward(self, x: Any, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        if self.training and not shapes_may_depend_on_coins():
            for layer, coin in zip(self.layers, self._coins(generator).unbind(), strict=True):
                x = torch.where(coin, layer(x, *args, **kwargs), x)
            return x
        active = self.active(generator)
        for layer in active:
            x = layer(x, *args, **kwargs)
        if self.training and isinstance(x, Tensor):
            x = as_if_used(x, [layer for layer in self.layers if layer not in active])
        return x

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.keep is None else f", keep={list(self.keep)}")


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
        >>> from vardrop.layers.layerdrop import every_other
        >>> every_other(6), every_other(6, drop=1 / 3)
        ([0, 2, 4], [0, 1, 3, 4])
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"vardrop.every_other: depth must be a number of layers, 1 or more, got {depth!r}")
    if not 0 < drop <= 0.5:
        raise ValueError(f"vardrop.every_other: drop must be a share above 0 and at most 0.5, got {drop!r}")
    period = int(1 / drop + 1e-9)  # 1 / (1 / 3) is not always 3
    return [index for index in range(depth) if (index + 1) % period]
