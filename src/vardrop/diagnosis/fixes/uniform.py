"""Uout (Li et al. 2019): uniform noise in the place of dropout, whose small variance hardly shifts a BatchNorm."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from vardrop.diagnosis.fixes.lower_rate import TARGET
from vardrop.diagnosis.fixes.plan import Changes, Offender, dropout_of, places
from vardrop.diagnosis.theory import rate_for
from vardrop.layers.base import Drop
from vardrop.rates import Rate

BETA = 0.1  # the paper's


class UniformNoise(Drop):
    r"""Multiply units by 1 + U(−β, β) noise in training (Uout, Li et al. 2019, section 5).

    .. math:: y = x + x r, \quad r \sim U(-\beta, \beta), \quad \mathrm{Var}[y] = \tfrac13 \beta^2 x^2

    Its rate is that of the dropout with the same variance, :math:`p / (1 - p) = \beta^2 / 3`.

    Args:
        p: the rate, up to 1/4, where β is 1.

    Attributes:
        beta: β.

    Shape:
        Any shape, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop.diagnosis.fixes.uniform import UniformNoise
        >>> layer = UniformNoise.of(beta=0.1)
        >>> y = layer(torch.ones(1000))
        >>> bool((y - 1).abs().max() <= 0.1), round(layer.p, 5)
        (True, 0.00332)
    """

    one = False

    def __init__(self, p: Rate = 0.0) -> None:
        super().__init__(p)

    @classmethod
    def of(cls, beta: float) -> UniformNoise:
        """The layer of a β, from 0 to 1.

        Args:
            beta: half the width of the noise.
        """
        if not 0 <= beta <= 1:
            raise ValueError(f"vardrop.UniformNoise: beta must lie in [0, 1], got {beta}; the paper takes 0.1")
        return cls(beta**2 / (3 + beta**2))

    @property
    def beta(self) -> float:
        """Half the width of the noise."""
        return math.sqrt(3 * self.p / (1 - self.p))

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        rate = self.rate.to(x.device)
        width = (3 * rate / (1 - rate)).sqrt().to(x.dtype)
        draws = torch.rand(x.shape, dtype=x.dtype, device=x.device, generator=generator)
        return x + x * (2 * draws - 1) * width


def uniform(model: nn.Module, found: Sequence[Offender]) -> Changes:
    """Put uniform noise in the place of dropouts that shift a BatchNorm.

    Args:
        model: is changed.
        found: what shifts it.
    """
    changes = Changes()
    for offender in found:
        site = dropout_of(model, offender.name)
        held = [] if isinstance(site, str) or site.owner is None else list(places(model, site.owner))
        if isinstance(site, str) or not held:
            changes.left[offender.name] = site if isinstance(site, str) else "it is the model itself"
            continue
        most = rate_for(max(offender.excess, 1e-9), min(site.rate, 0.999), TARGET / offender.share)
        beta = round(min(BETA, math.sqrt(3 * most / (1 - most))), 4)
        training = held[0][0].training
        layer = UniformNoise.of(beta).train(training)
        for holder, child in held:
            setattr(holder, child, layer)
        changes.changed[offender.name] = f"uniform noise with β = {beta:g}, was dropout with p = {site.rate:g}"
    return changes
