"""Concrete dropout: Bernoulli dropout whose rate is learned through a relaxed mask."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from vardrop.functional import concrete
from vardrop.layers.base import Drop, check_plain, source
from vardrop.rates import Rate

__all__ = ["ConcreteDropout"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class ConcreteDropout(Drop):
    r"""Dropout before a layer, at a rate that is learned (Gal, Hron, Kendall 2017).

    Before ``nn.Linear`` every unit has a draw of its own, before a convolution every channel has. The mask is relaxed
    in training; evaluation is the plain layer.

    Its divergence is that of the paper's eq. 4, for weights that are scaled by 1 / (1 − p) in training:

    .. math:: KL = \frac{l^2}{2 (1 - p)} \lVert W \rVert^2 - K \, H(p)

    with l the length scale of the prior, K the number of units or channels that are dropped, H the entropy of a coin in
    nats. :func:`vardrop.kl_divergence` counts it, and :class:`vardrop.ELBO` divides it by the number of training
    examples; without them add :meth:`regularizer` to the *mean* negative log-likelihood. It is a divergence up to a
    constant, and may be negative.

    Args:
        p: the rate, ``rates.learned(0.1)`` as a rule; a number in [0, 1) or a schedule is not learned.
        layer: ``nn.Linear`` or ``nn.Conv1d`` to ``nn.Conv3d``.
        length_scale: l, at least 0.
        temperature: of the relaxed mask, above 0.

    Shape:
        Whatever the layer takes and gives.

    Raises:
        TypeError: for any other layer, or one whose weights are random.
        ValueError: for a negative ``length_scale`` or a ``temperature`` that is not above 0.

    Example:
        >>> import torch
        >>> from vardrop import layers, rates
        >>> layer = layers.ConcreteDropout(rates.learned(0.1), torch.nn.Linear(4, 2))
        >>> loss = layer(torch.ones(8, 4)).square().mean() + layer.regularizer(num_data=1000)
        >>> loss.backward()
        >>> bool(layer.rate_logit.grad.isfinite())
        True
    """

    learnable = True
    one = False

    def __init__(self, p: Rate, layer: nn.Module, length_scale: float = 1e-2, temperature: float = 0.1) -> None:
        super().__init__(p)
        if not isinstance(layer, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d):
            raise TypeError(
                "vardrop.ConcreteDropout: layer must be nn.Linear, nn.Conv1d, nn.Conv2d or nn.Conv3d, got "
                f"{type(layer).__name__}"
            )
        if not length_scale >= 0:
            raise ValueError(f"vardrop.ConcreteDropout: length_scale must be at least 0, got {length_scale}")
        if not temperature > 0:
            raise ValueError(f"vardrop.ConcreteDropout: its temperature must be above 0, got {temperature}")
        check_plain(layer, "ConcreteDropout")
        self.layer = layer
        self.length_scale = length_scale
        self.temperature = temperature
        self.spatial = len(layer.kernel_size) if isinstance(layer, _CONVOLUTIONS) else 0

    @property
    def units(self) -> int:
        """K, the units or channels that are dropped."""
        return int(self.layer.in_features if isinstance(self.layer, nn.Linear) else self.layer.in_channels)

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        shared = range(-self.spatial, 0)
        return concrete(x, self.logit(), self.temperature, shared=shared, generator=generator)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        y: Tensor = self.layer(self.noise(x, source(generator)) if self.training else x)
        return y

    def kl(self) -> Tensor:
        """The divergence above, in nats; the layer's share of the objective before it is divided by N."""
        logit = self.logit().float()
        weights = 0.5 * self.length_scale**2 * (1 + logit.exp()) * self.layer.weight.float().square().sum()
        kept = torch.sigmoid(-logit)
        entropy = torch.special.entr(kept) + torch.special.entr(1 - kept)
        return weights - self.units * entropy

    def regularizer(self, num_data: int) -> Tensor:
        """The divergence for every one of the ``num_data`` examples of the training set."""
        if not num_data > 0:
            raise ValueError(
                f"vardrop.ConcreteDropout: num_data must be the number of training examples, above 0, got {num_data!r}"
            )
        return self.kl() / num_data
