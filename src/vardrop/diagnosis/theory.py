r"""What theory says of the variance shift (Li et al. 2019), as pure functions of moments.

Dropout of rate p multiplies by noise of mean 1 and variance :math:`\alpha = p / (1 - p)`; Gaussian dropout, and
DropBlock at an exact rate, do the same to each unit. By the law of total variance the noise adds its conditional
variance, whatever the distribution of the inputs and however they depend on each other:

.. math:: \sigma^2_{train} = \sigma^2_{test} + E[\mathrm{Var}(y | a)]
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def direct_ratio(p: float, mean: Tensor | float, variance: Tensor | float) -> Any:
    r"""k² where dropout is right before a BatchNorm.

    .. math:: k^2 = \frac{(c^2 + v) / q - c^2}{v}, \quad q = 1 - p

    Args:
        p: the rate of dropping.
        mean: c, of the input without noise.
        variance: v, of the input without noise.

    Example:
        >>> from vardrop.diagnosis.theory import direct_ratio
        >>> direct_ratio(0.5, mean=0.0, variance=1.0), direct_ratio(0.5, mean=1.0, variance=1.0)
        (2.0, 3.0)
    """
    return ((mean**2 + variance) / (1 - p) - mean**2) / variance


def rate_for(excess: float, p: float, target: float) -> float:
    r"""The rate that brings :math:`k^2 - 1` down to a target: it is proportional to :math:`p / (1 - p)`.

    Args:
        excess: k² − 1 at rate p.
        p: the rate now.
        target: the k² − 1 that is wanted.

    Example:
        >>> from vardrop.diagnosis.theory import rate_for
        >>> round(rate_for(excess=1.0, p=0.5, target=0.1), 4)
        0.0909
    """
    alpha = p / (1 - p) * min(1.0, target / excess)
    return alpha / (1 + alpha)


_CONVOLUTIONS = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}


def conditional_variance(layer: nn.Module, x: Tensor) -> Tensor | None:
    r"""What a linear layer makes of independent noise on its inputs: :math:`\mathrm{op}(x^2, W^2)`, for α = 1.

    Args:
        layer: ``nn.Linear`` or a convolution; None is returned for another, and for padding that is not with zeros.
        x: its input without noise.
    """
    if isinstance(layer, nn.Linear):
        return F.linear(x.square(), layer.weight.square())
    for kind, function in _CONVOLUTIONS.items():
        if isinstance(layer, kind) and getattr(layer, "padding_mode", "zeros") == "zeros":
            weight = torch.as_tensor(layer.weight).square()
            return function(x.square(), weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return None
