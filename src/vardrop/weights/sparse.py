"""Sparse variational dropout: rates without a bound, learned through the variance of a weight or of a group."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vardrop.weights.geometry import Geometry
from vardrop.weights.multiplicative import SHARINGS, RelativeWeight
from vardrop.weights.posteriors import Posterior, divergence, log_square, require, wide
from vardrop.weights.random_kinds import IndependentWeight
from vardrop.weights.random_weight import RandomWeight


def _over(numerator: Tensor, theta: Tensor) -> Tensor:
    """numerator / θ, 0 where θ² is."""
    square = theta * theta
    return numerator * theta / square.clamp_min(torch.finfo(square.dtype).tiny)


class _LogAlpha(torch.autograd.Function):
    """log σ² - log θ² within ± clip, and its gradient, 0 beyond, in few passes over the weights."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, log_variance: Tensor, clip: float) -> tuple[Tensor, Tensor]:
        ratio = log_variance - log_square(theta)
        return ratio.clamp(-clip, clip), ratio

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        theta, _, ctx.clip = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(theta, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        theta, ratio = ctx.saved_tensors
        inside = torch.ops.aten.hardtanh_backward(grad, ratio, -ctx.clip, ctx.clip)
        return _over(inside * -2, theta), inside, None


class _Variance(torch.autograd.Function):
    """α θ² of the clipped log α, but with no logarithm of a weight that may be zero."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, log_variance: Tensor, clip: float) -> Tensor:
        square = theta * theta
        return torch.clamp(log_variance.exp(), square * math.exp(-clip), square * math.exp(clip))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        theta, log_variance, _ = inputs
        ctx.save_for_backward(theta, log_variance, output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        theta, log_variance, variance = ctx.saved_tensors
        by_log = grad * variance
        inside = torch.where(variance == log_variance.exp(), by_log, 0.0)
        return _over((by_log - inside) * 2, theta), inside, None


@dataclass(frozen=True)
class SparseVariationalDropout(Posterior):
    r"""Sparse variational dropout: α unbounded, learned through σ² (Molchanov, Ashukha, Vetrov 2017).

    .. math:: q(w) = N(\theta, \sigma^2), \qquad \log\alpha = \log\sigma^2 - \log\theta^2, \; |\log\alpha| \le clip

    The additive parametrisation keeps the gradient of θ free of the noise. Weights with large α (above 3 in log α:
    p > 0.95) can be removed.

    With a rate for every ``"neuron"`` or for the ``"layer"`` whole groups of weights go at once, which is what makes a
    network smaller without sparse storage: with g the weights of the group of w,

    .. math:: q(w) = N(\theta, \alpha_g\theta^2), \qquad \log\alpha_g = \log\sigma_g^2 - \log\,\text{mean}_g\,\theta^2

    and the divergence still counts once for every weight.

    Args:
        log_variance: log σ² to start from.
        clip: log α is clipped to ± this in the forward pass.
        prior: ``"log_uniform"`` (exact), ``"sigmoid"`` (the paper's approximation) or ``"ard"``.
        sharing: one α for every ``"weight"``, for every ``"neuron"`` or for the ``"layer"``.
        unit: what a neuron is: an ``"output"`` unit of the layer (a filter of a convolution) or an ``"input"`` unit.

    Raises:
        ValueError: for values outside those above.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = vd.convert_(layer, vd.SparseVariationalDropout())
        >>> vd.dropout_rates(layer, as_="log_alpha")["weight"].shape
        torch.Size([2, 4])
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = vd.convert_(layer, vd.SparseVariationalDropout(sharing="neuron"))
        >>> vd.dropout_rates(layer, as_="log_alpha")["weight"].shape
        torch.Size([2])
    """

    log_variance: float = -10.0
    clip: float = 8.0
    prior: str = "log_uniform"
    sharing: str = "weight"
    unit: str = "output"
    noise_name: ClassVar[str] = "log_variance"

    def _check(self) -> None:
        require(math.isfinite(self.log_variance), self, "log_variance must be finite", self.log_variance)
        require(0 < self.clip <= 40, self, "clip must be above 0 and at most 40", self.clip)
        kinds = ("log_uniform", "sigmoid", "ard")
        require(self.prior in kinds, self, f"prior must be one of {', '.join(kinds)}", self.prior)
        require(self.sharing in SHARINGS, self, f"sharing must be one of {', '.join(SHARINGS)}", self.sharing)
        require(self.unit in ("input", "output"), self, "unit must be 'input' or 'output'", self.unit)

    def initial(self, weight: Tensor, geometry: Geometry, rate: float | None) -> Tensor:
        shape = {"layer": (1,), "neuron": (geometry.units(self.unit),), "weight": geometry.shape}[self.sharing]
        return weight.new_full(shape, self.log_variance)

    def log_alpha(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        weight, noise = wide(weight), wide(noise)
        if noise.shape != weight.shape:  # the mean of a group is what its noise is relative to
            weight = geometry.mean(weight.square(), self.unit, noise.numel()).sqrt()
        return _LogAlpha.apply(weight, noise, self.clip)[0]

    def random(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> RandomWeight:
        if noise.shape == weight.shape:
            return IndependentWeight(weight, lambda: _Variance.apply(wide(weight), wide(noise), self.clip))
        log_alpha = self.log_alpha(weight, noise, geometry)
        return RelativeWeight(weight, geometry.spread(log_alpha, self.unit), math.inf)

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        each = divergence(self.prior, 1.0, self.log_alpha(weight, noise, geometry), None)
        return each * (math.prod(geometry.shape) / noise.numel())
