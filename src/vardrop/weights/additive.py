"""Posteriors with a variance of their own for every weight."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vardrop import kl
from vardrop.weights.geometry import Geometry
from vardrop.weights.posteriors import Posterior, check_prior, divergence, log_square, require, summable, wide
from vardrop.weights.random_kinds import IndependentWeight
from vardrop.weights.random_weight import RandomWeight


@dataclass(frozen=True)
class GaussianPosterior(Posterior):
    r"""Mean-field Gaussian, q(w) = N(μ, σ²) with σ² learned for every weight (eq. 6).

    Args:
        std: σ to start from, positive.
        prior: ``"gaussian"``, or any prior of :class:`VariationalDropout`, through log α = log σ² - log μ².
        prior_std: standard deviation of the Gaussian prior.

    Raises:
        ValueError: for values outside those above.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = vd.convert_(layer, vd.GaussianPosterior(std=0.1))
        >>> sorted(layer.state_dict())
        ['bias', 'weight', 'weight_log_variance']
    """

    std: float = 0.05
    prior: str = "gaussian"
    prior_std: float = 1.0
    noise_name: ClassVar[str] = "log_variance"

    def _check(self) -> None:
        require(0 < self.std < math.inf, self, "std must be positive and finite", self.std)
        check_prior(self)
        require(
            self.prior != "cubic", self, "prior must be another than 'cubic', for alpha has no bound here", self.prior
        )

    def initial(self, weight: Tensor, geometry: Geometry, rate: float | None) -> Tensor:
        return torch.full_like(weight, 2 * math.log(self.std))

    def log_alpha(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        return wide(noise) - log_square(weight)

    def random(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> RandomWeight:
        return IndependentWeight(weight, lambda: wide(noise).exp())

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        if self.prior == "gaussian":
            return kl.gaussian(summable(weight), summable(noise), self.prior_std).sum()
        return divergence(self.prior, self.prior_std, self.log_alpha(weight, noise, geometry), weight)
