"""Gaussian dropout of activations, at a fixed or a learned rate."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vardrop import functional, kl
from vardrop.layers.base import Drop
from vardrop.projection import bounded
from vardrop.rates import Learned, Rate

__all__ = ["GaussianDropout"]


class GaussianDropout(Drop):
    r"""Multiply units by N(1, α) noise, α = p / (1 − p) (Srivastava et al. 2014, section 10).

    With ``p=rates.learned(...)`` this is variational dropout A as a layer (Kingma et al. 2015, section 3.1): one α for
    the layer, a parameter in its logarithm, bounded by projection. Its divergence counts once for every random scale
    variable, that is for every unit of the next layer's input, and :func:`vardrop.kl_divergence` adds it to those of
    random weights. For a rate of its own for every unit or weight see :func:`vardrop.convert_`.

    Dimensions in ``shared`` share one draw, as in :func:`vardrop.functional.drop`: (2, 3) is one for every channel of
    an image, -1 one for every token.

    Args:
        p: the rate, a number in [0, 1), a schedule, or ``rates.learned(...)``.
        features: how many draws an example has, the factor on the divergence; needed to learn a rate. They are units,
            or with ``shared`` channels or tokens.
        max_alpha: the largest α that is learned; 1, a rate of 1/2, in the paper.
        shared: the dimensions that share one draw.

    Shape:
        Any shape, and the same shape out.

    Raises:
        ValueError: for p = 1, a learned rate without ``features``, or one that starts beyond ``max_alpha``.
        IndexError: in a call, for a dimension that the input has not got.

    Example:
        >>> import torch, vardrop as vd
        >>> from vardrop import layers, rates
        >>> layer = layers.GaussianDropout(rates.learned(0.5), features=100)
        >>> round(layer.kl().item(), 2)  # 0.4267 nats each
        42.67
        >>> y = layers.GaussianDropout(0.5, shared=(2, 3))(torch.ones(2, 3, 4, 4))  # whole channels
        >>> bool((y == y[..., :1, :1]).all())
        True
    """

    learnable = True
    one = False

    def __init__(
        self,
        p: Rate = 0.5,
        features: int | None = None,
        max_alpha: float = 1.0,
        shared: int | Sequence[int] = (),
    ) -> None:
        super().__init__(p)
        if not max_alpha > 0:
            raise ValueError(
                f"vardrop.GaussianDropout: max_alpha must be above 0 (math.inf: no bound), got {max_alpha}"
            )
        if isinstance(p, Learned):
            if features is None or features < 1:
                raise ValueError(
                    "vardrop.GaussianDropout: features must be how many units have noise of this rate, as its "
                    f"divergence counts them, got {features}; for example features=linear.in_features"
                )
            if p.initial / (1 - p.initial) > max_alpha * (1 + 1e-6):
                raise ValueError(
                    "vardrop.GaussianDropout: a learned rate must start at alpha = p / (1 - p) up to max_alpha="
                    f"{max_alpha}, got {p!r}; start lower or raise max_alpha"
                )
        self.features = features
        self.max_log_alpha = math.log(max_alpha)
        self.shared = (shared,) if isinstance(shared, int) else tuple(shared)

    def logit(self) -> Tensor:
        return bounded(super().logit(), self.max_log_alpha) if self.is_learned else super().logit()

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        if self.is_learned:
            return functional.gaussian(x, self.logit(), self.shared, generator)
        return functional.drop(x, self.rate, self.shared, "gaussian", generator)

    def kl(self) -> Tensor | None:
        """The divergence of a learned rate from the log-uniform prior, summed over ``features``."""
        if not self.is_learned or self.features is None:
            return None
        log_alpha = self.rate_logit.float()
        return self.features * kl.log_uniform(log_alpha, reduction="sum", max_log_alpha=self.max_log_alpha)

    def extra_repr(self) -> str:
        return super().extra_repr() + (f", shared={self.shared}" if self.shared else "")
