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
from vardrop.weights.random_weight import IndependentWeight, RandomWeight


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


@dataclass(frozen=True)
class SparseVariationalDropout(Posterior):
    r"""Sparse variational dropout: α unbounded, learned through σ² (Molchanov, Ashukha, Vetrov 2017).

    .. math:: q(w) = N(\theta, \sigma^2), \qquad \log\alpha = \log\sigma^2 - \log\theta^2, \; |\log\alpha| \le clip

    The additive parametrisation keeps the gradient of θ free of the noise. Weights with large α (above 3 in log α:
    p > 0.95) can be removed.

    Args:
        log_variance: log σ² to start from.
        clip: log α is clipped to ± this in the forward pass.
        prior: ``"log_uniform"`` (exact), ``"sigmoid"`` (the paper's approximation) or ``"ard"``.

    Raises:
        ValueError: for values outside those above.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = vd.convert_(layer, vd.SparseVariationalDropout())
        >>> vd.dropout_rates(layer, as_="log_alpha")["weight"].shape
        torch.Size([2, 4])
    """

    log_variance: float = -10.0
    clip: float = 8.0
    prior: str = "log_uniform"
    noise_name: ClassVar[str] = "log_variance"

    def _check(self) -> None:
        require(math.isfinite(self.log_variance), self, "log_variance must be finite", self.log_variance)
        require(0 < self.clip <= 40, self, "clip must be above 0 and at most 40", self.clip)
        kinds = ("log_uniform", "sigmoid", "ard")
        require(self.prior in kinds, self, f"prior must be one of {', '.join(kinds)}", self.prior)

    def initial(self, weight: Tensor, geometry: Geometry, rate: float | None) -> Tensor:
        return torch.full_like(weight, self.log_variance)

    def log_alpha(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        return (wide(noise) - log_square(weight)).clamp(-self.clip, self.clip)

    def random(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> RandomWeight:
        def variance() -> Tensor:  # of log alpha within the clip, but with no logarithm of a weight that may be zero
            square = wide(weight).square()
            return torch.clamp(wide(noise).exp(), math.exp(-self.clip) * square, math.exp(self.clip) * square)

        return IndependentWeight(weight, variance)

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        return divergence(self.prior, 1.0, self.log_alpha(weight, noise, geometry), None)
