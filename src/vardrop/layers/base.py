"""What all layers of activation noise share: a rate, and where their randomness comes from."""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.rates import Rate, Rated
from vardrop.weights import estimators


class Drop(Rated):
    """A layer that multiplies its input with noise in training and returns it as it is in evaluation.

    Subclasses write :meth:`noise`, the layer in training. The noise comes from the ``generator`` that a call is given,
    else from that of the ``vd.estimator`` block around it, else from torch's default one.

    Args:
        p: the rate; see :class:`vardrop.rates.Rated`.

    Example:
        >>> import torch
        >>> from vardrop import functional as F, layers
        >>> class RowDropout(layers.Drop):  # one draw for all columns
        ...     def noise(self, x, generator):
        ...         return F.drop(x, self.rate, shared=-1, generator=generator)
        >>> y = RowDropout(0.5)(torch.ones(4, 3))
        >>> bool((y == y[:, :1]).all())
        True
    """

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p)

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The output in training."""
        raise NotImplementedError

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not self.training:
            return x
        return self.noise(x, source(generator))


def source(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator that a layer draws from: the one it is given, or that of the estimator in force."""
    return estimators.current().generator if generator is None else generator
