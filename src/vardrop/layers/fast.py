"""Fast dropout: a linear layer behind dropout, by the Gaussian that its outputs are close to."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vardrop.functional import moments_linear
from vardrop.layers.base import Drop, check_plain, source
from vardrop.rates import Rate
from vardrop.weights.noise import add_noise

__all__ = ["FastDropout"]


class FastDropout(Drop):
    r"""Dropout before a linear layer, sampled after it (Wang, Manning 2013; Kingma et al. 2015, eq. 10).

    .. math:: y \sim N(W x + b, \; \alpha \, W^2 x^2), \quad \alpha = \frac{p}{1-p}

    In training every output is drawn from this Gaussian on its own: one draw for an output in place of one for an
    input, and none of the dependence between outputs that a mask on the inputs would cause. Evaluation is the plain
    layer. To carry mean and variance through a network in place of samples, use :meth:`moments` and
    :func:`vardrop.functional.moments_relu`. For other layers than linear ones there is
    ``vd.convert_(layer, vd.GaussianDropout(type="B", rate=p))``.

    Args:
        p: the rate of the dropout that it stands for, a number in [0, 1) or a schedule.
        layer: an ``nn.Linear``.

    Shape:
        That of the linear layer.

    Raises:
        TypeError: for any other layer, one with another forward, or whose weight is random, lazy or parametrised; in
            a call, for complex inputs.

    Example:
        >>> import torch
        >>> from vardrop import functional as F, layers
        >>> first = layers.FastDropout(0.2, torch.nn.Linear(4, 8))
        >>> second = layers.FastDropout(0.5, torch.nn.Linear(8, 1))
        >>> x = torch.ones(3, 4)
        >>> mean, variance = second.moments(*F.moments_relu(*first.moments(x)))  # no sampling
        >>> mean.shape, bool((variance > 0).all())
        (torch.Size([3, 1]), True)
    """

    one = False

    def __init__(self, p: Rate, layer: nn.Linear) -> None:
        super().__init__(p)
        if not isinstance(layer, nn.Linear):
            raise TypeError(
                f"vardrop.FastDropout: layer must be an nn.Linear, got {type(layer).__name__}; "
                "vd.convert_(layer, vd.GaussianDropout(type='B')) does this for any layer that is linear in its weight"
            )
        check_plain(layer, "FastDropout")
        if type(layer).forward is not nn.Linear.forward or "weight" not in layer._parameters:
            raise TypeError(
                "vardrop.FastDropout: layer must compute x W + b with its own parameters, got a "
                f"{type(layer).__name__} with another forward or a weight that something replaces (weight_norm, "
                "spectral_norm, prune, a parametrisation); use vd.layers.Dropout in front of it"
            )
        self.layer = layer

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not self.training:
            y: Tensor = self.layer(x)
            return y
        mean, variance = self.moments(x)
        return add_noise(mean, variance, source(generator))

    def moments(self, mean: Tensor, variance: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Mean and variance of the outputs, for inputs of this mean and variance (0 if None), in any mode."""
        weight, bias = self.layer.weight, self.layer.bias
        if mean.is_complex():
            raise TypeError(
                f"vardrop.FastDropout: the inputs must be real, as the squares of {mean.dtype} are no variances; use "
                "vd.layers.Dropout in front of the layer"
            )
        variance = mean.new_zeros(()) if variance is None else variance
        if mean.dtype != torch.float16:
            return moments_linear(mean, variance, weight, bias, self.rate)
        # float16 has no room for squares
        wide = moments_linear(mean.float(), variance.float(), weight.float(), None, self.rate)[1]
        return torch.nn.functional.linear(mean, weight, bias), wide
