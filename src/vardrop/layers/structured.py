"""Dropout that shares draws, or knows what it drops: tokens, time steps, heads, residual branches, weights."""

from __future__ import annotations

import fnmatch
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vardrop.functional import drop, drop_types
from vardrop.layers.base import Drop, check_plain, source
from vardrop.rates import Rate

__all__ = [
    "AttentionDropout",
    "DropConnect",
    "HeadDropout",
    "LockedDropout",
    "ResidualDropout",
    "TokenDropout",
]


class TokenDropout(Drop):
    """Drop whole embeddings, by position or by word type (Gal, Ghahramani 2016, section 4.2).

    By position every place of a sequence has a draw of its own. By word type, with ``num_types``, a word is dropped
    everywhere in a sequence or nowhere, and every sequence has draws of its own; the call then needs the words too.

    Args:
        p: the rate, a number in [0, 1] or a schedule.
        num_types: the size of the vocabulary, to drop by word type; None to drop by position.

    Shape:
        ``[..., time, features]``, and the same shape out; ``tokens`` are ``[..., time]``.

    Raises:
        ValueError: in a call, if words are missing or not wanted.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> words = torch.tensor([[3, 1, 3]])
        >>> y = layers.TokenDropout(0.5, num_types=5)(torch.ones(1, 3, 2), words)
        >>> torch.equal(y[0, 0], y[0, 2])
        True
    """

    def __init__(self, p: Rate = 0.5, num_types: int | None = None) -> None:
        super().__init__(p)
        self.num_types = num_types

    def forward(  # type: ignore[override]
        self, x: Tensor, tokens: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        if (tokens is None) != (self.num_types is None):
            raise ValueError(
                "vardrop.TokenDropout: tokens must be given where, and only where, words are dropped by type, got "
                f"tokens {'missing' if tokens is None else 'given'} with num_types={self.num_types}"
            )
        if not self.training or self.off:
            return x
        if tokens is None or self.num_types is None:
            return drop(x, self.rate, shared=-1, generator=source(generator))
        return drop_types(x, tokens, self.rate, self.num_types, generator=source(generator))

    def extra_repr(self) -> str:
        return super().extra_repr() + ("" if self.num_types is None else f", num_types={self.num_types}")


class LockedDropout(Drop):
    """One mask for all time steps: variational dropout of recurrent networks (Gal, Ghahramani 2016; AWD-LSTM).

    Args:
        p: the rate, a number in [0, 1] or a schedule.
        dim: the dimension of time.

    Shape:
        ``[batch, time, features]`` for the default ``dim``; any shape that has it, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> y = layers.LockedDropout(0.5)(torch.ones(2, 7, 3))
        >>> bool((y == y[:, :1]).all())
        True
    """

    def __init__(self, p: Rate = 0.5, dim: int = 1) -> None:
        super().__init__(p)
        self.dim = dim

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return drop(x, self.rate, shared=self.dim, generator=generator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dim={self.dim}"


class AttentionDropout(Drop):
    """Drop single attention weights, after the softmax (Vaswani et al. 2017, as BERT and GPT-2 do).

    The weights of a query then sum to 1 on average only.

    Args:
        p: the rate, a number in [0, 1] or a schedule.

    Shape:
        ``[batch, heads, queries, keys]`` or any other, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> weights = torch.softmax(torch.randn(2, 4, 5, 5), -1)
        >>> layers.AttentionDropout(0.1)(weights).shape
        torch.Size([2, 4, 5, 5])
    """

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return drop(x, self.rate, generator=generator)


class HeadDropout(Drop):
    """Drop the outputs of whole attention heads, for every example on its own (DropHead, Zhou et al. 2020).

    Args:
        p: the rate, a number in [0, 1] or a schedule.
        dim: the dimension of the heads.

    Shape:
        ``[batch, heads, time, features]`` for the default ``dim``; any shape that has a batch in front, and the same
        shape out.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> y = layers.HeadDropout(0.5)(torch.ones(2, 4, 7, 3))
        >>> bool((y == y[:, :, :1, :1]).all())
        True
    """

    def __init__(self, p: Rate = 0.5, dim: int = 1) -> None:
        super().__init__(p)
        self.dim = dim

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        shared = [axis for axis in range(1, x.ndim) if axis != self.dim % x.ndim]
        return drop(x, self.rate, shared=shared, generator=generator)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, dim={self.dim}"


class ResidualDropout(Drop):
    """Drop units of a branch before it is added to the residual stream (Vaswani et al. 2017, section 5.4).

    Args:
        p: the rate, a number in [0, 1] or a schedule.

    Shape:
        Branch and residual of any one shape, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> layers.ResidualDropout(1.0)(torch.ones(2), residual=torch.ones(2))
        tensor([1., 1.])
    """

    def forward(  # type: ignore[override]
        self, x: Tensor, residual: Tensor, generator: torch.Generator | None = None
    ) -> Tensor:
        return residual + (drop(x, self.rate, generator=source(generator)) if self.training and not self.off else x)


class DropConnect(Drop):
    """Drop weights of a layer, a new mask for every call (Wan et al. 2013; the weight drop of AWD-LSTM).

    The mask is shared by the examples of the batch, as one weight is. Whatever layer it is runs unchanged, with its
    stride, groups and all, on parameters that have been through :func:`vardrop.functional.drop`.

    Args:
        p: the rate, a number in [0, 1] or a schedule.
        layer: any module.
        weights: a glob of names of its parameters.

    Shape:
        Whatever the layer takes and gives.

    Raises:
        TypeError: for a layer whose weights are random.
        ValueError: if no parameter matches.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> layers.DropConnect(0.5, torch.nn.LSTM(4, 8), weights="weight_hh_*")(torch.ones(5, 1, 4))[0].shape
        torch.Size([5, 1, 8])
    """

    def __init__(self, p: Rate, layer: nn.Module, weights: str = "weight*") -> None:
        super().__init__(p)
        names = [name for name, _ in layer.named_parameters()]
        self.names = fnmatch.filter(names, weights)
        if not self.names:
            raise ValueError(
                f"vardrop.DropConnect: weights must match a parameter of the layer ({', '.join(names) or 'none'}), got "
                f"{weights!r}"
            )
        check_plain(layer, "DropConnect")
        self.layer = layer

    def forward(self, *args: Any, generator: torch.Generator | None = None, **kwargs: Any) -> Any:
        if not self.training:
            return self.layer(*args, **kwargs)
        parameters = dict(self.layer.named_parameters())
        dropped = {name: drop(parameters[name], self.rate, generator=source(generator)) for name in self.names}
        return functional_call(self.layer, dropped, args, kwargs)
