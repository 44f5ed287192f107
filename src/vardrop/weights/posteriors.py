"""What a posterior over the entries of one weight has to say: its noise, its random weight, its divergence.

A config is a small frozen dataclass, one for each method; `multiplicative.py` and `additive.py` have them.

Legend: θ or μ mean, α noise variance relative to θ², p = α / (1 + α) dropout rate, σ² variance.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vardrop import kl
from vardrop.half import HALVES
from vardrop.projection import bounded
from vardrop.weights.geometry import Geometry
from vardrop.weights.random_weight import RandomWeight

PRIORS = ("log_uniform", "cubic", "sigmoid", "ard", "gaussian")


def wide(x: Tensor) -> Tensor:
    """float16 has no room for the squares of weights."""
    return x.float() if x.dtype == torch.float16 else x


def summable(x: Tensor) -> Tensor:
    """A sum over a layer's weights wants more digits than the half types have."""
    return x.float() if x.dtype in HALVES else x


def require(condition: bool, config: Any, words: str, given: Any) -> None:
    """Refuse a value of a config, in the words of the config."""
    if not condition:
        raise ValueError(f"vardrop.{type(config).__name__}: {words}, got {given!r}")


@dataclass(frozen=True)
class Posterior:
    """What all configs share; not to be used itself."""

    def __post_init__(self) -> None:
        self._check()

    def _check(self) -> None:
        raise TypeError("vardrop.Posterior: use one of its kinds, for example vardrop.VariationalDropout()")

    noise_name: ClassVar[str] = "log_alpha"
    learned: ClassVar[bool] = True

    def initial(self, weight: Tensor, geometry: Geometry, rate: float | None) -> Tensor:
        """The noise tensor to start from; ``rate`` is the p of a dropout that it replaces, if there was one."""
        raise NotImplementedError

    def random(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> RandomWeight:
        """The random weight with mean ``weight``."""
        raise NotImplementedError

    def log_alpha(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        """log α for every random scalar, or for every group of them that shares it."""
        raise NotImplementedError

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        """KL divergence from the prior, summed over all random scalars of the weight."""
        raise NotImplementedError

    def kl_without_padding(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        """The same without the row of an embedding that is a constant, if it has one."""
        return self.kl(*geometry.without_padding(weight, noise, getattr(self, "unit", "input")))


def check_prior(config: Any) -> None:
    """Refuse a prior that there is none of."""
    require(config.prior in PRIORS, config, f"prior must be one of {', '.join(PRIORS)}", config.prior)
    require(config.prior_std > 0, config, "prior_std must be positive", config.prior_std)


def divergence(prior: str, prior_std: float, log_alpha: Tensor, mean: Tensor | None, bound: float = math.inf) -> Tensor:
    """Summed over ``log_alpha``, projected onto its bound; ``mean`` is that of the random scalars, None for 1."""
    log_alpha = summable(log_alpha)
    if prior in ("log_uniform", "cubic", "sigmoid"):
        form = "exact" if prior == "log_uniform" else prior
        return kl.log_uniform(log_alpha, form, reduction="sum", max_log_alpha=bound)
    log_alpha = bounded(log_alpha, bound)
    if prior == "gaussian":
        if mean is None:
            return kl.gaussian(torch.ones_like(log_alpha), log_alpha, prior_std).sum()
        mean = summable(mean)
        return kl.gaussian(mean, log_alpha + log_square(mean), prior_std).sum()
    return kl.ard(log_alpha).sum()


def log_square(weight: Tensor) -> Tensor:
    """log w², finite at zero, where its gradient is zero."""
    square = wide(weight).square()
    return square.clamp_min(torch.finfo(square.dtype).tiny).log()


def describe(config: Posterior) -> str:
    """The call that makes ``config``, without what is at its default."""
    fields = dataclasses.fields(config)
    told = [f"{f.name}={getattr(config, f.name)!r}" for f in fields if getattr(config, f.name) != f.default]
    return f"{type(config).__name__}({', '.join(told)})"
