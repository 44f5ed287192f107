"""Dropout of single units and of whole channels."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from vardrop.functional import drop
from vardrop.layers.base import Drop

__all__ = ["Dropout", "Dropout1d", "Dropout2d", "Dropout3d"]


class Dropout(Drop):
    r"""Set units to 0 with probability p and scale the others by 1 / (1 − p) (Srivastava et al. 2014).

    .. math:: E[y] = x, \quad Var[y] = \frac{p}{1-p} x^2

    What ``torch.nn.Dropout`` does, at a fraction of its cost on a CPU (see :func:`vardrop.functional.drop`), with rates
    that can follow a schedule without a new compilation.

    Args:
        p: the rate, a number in [0, 1] or a schedule; see :mod:`vardrop.rates`.

    Shape:
        Any shape, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop import layers, rates
        >>> layer = layers.Dropout(rates.linear(0.0, 0.5, steps=100))
        >>> layer
        Dropout(p=0, schedule=linear(0, 0.5, steps=100))
        >>> layer.p = 0.5
        >>> sorted(set(layer(torch.ones(1000)).tolist()))
        [0.0, 2.0]
    """

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return drop(x, self.rate, generator=generator)


class _ChannelDropout(Drop):
    """Dropout of whole channels: the last dimensions, so many as ``spatial`` says, share one draw."""

    spatial: ClassVar[int]

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if x.ndim not in (self.spatial + 1, self.spatial + 2):
            raise ValueError(
                f"vardrop.{type(self).__name__}: x must have channels and {self.spatial} spatial dimensions, with or "
                f"without a batch in front, got shape {tuple(x.shape)}"
            )
        return drop(x, self.rate, shared=range(-self.spatial, 0), generator=generator)


class Dropout1d(_ChannelDropout):
    """Set whole channels of a sequence to 0 with probability p and scale the others (Tompson et al. 2015).

    Args:
        p: the rate, a number in [0, 1] or a schedule.

    Shape:
        ``[batch, channels, length]`` or ``[channels, length]``, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> y = layers.Dropout1d(0.5)(torch.ones(2, 3, 4))
        >>> bool((y == y[..., :1]).all())
        True
    """

    spatial = 1


class Dropout2d(_ChannelDropout):
    """Set whole channels of an image to 0 with probability p and scale the others (Tompson et al. 2015).

    Args:
        p: the rate, a number in [0, 1] or a schedule.

    Shape:
        ``[batch, channels, height, width]`` or ``[channels, height, width]``, and the same shape out.
        ``torch.nn.Dropout2d`` takes three dimensions for a batch of sequences instead: use :class:`Dropout1d` for them.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> y = layers.Dropout2d(0.5)(torch.ones(2, 3, 4, 4))
        >>> bool((y == y[..., :1, :1]).all())
        True
    """

    spatial = 2


class Dropout3d(_ChannelDropout):
    """Set whole channels of a volume to 0 with probability p and scale the others (Tompson et al. 2015).

    Args:
        p: the rate, a number in [0, 1] or a schedule.

    Shape:
        ``[batch, channels, depth, height, width]`` or ``[channels, depth, height, width]``, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop import layers
        >>> y = layers.Dropout3d(0.5)(torch.ones(2, 3, 4, 4, 4))
        >>> bool((y == y[..., :1, :1, :1]).all())
        True
    """

    spatial = 3
