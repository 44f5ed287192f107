"""Dropout posteriors: noise relative to the weight, with learned or fixed rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from vardrop.projection import bounded, keep_inward
from vardrop.second_order import graph_wanted
from vardrop.weights.fused import can_fuse, local_linear
from vardrop.weights.geometry import Geometry
from vardrop.weights.linear_ops import LinearOp
from vardrop.weights.posteriors import Posterior, check_prior, divergence, require, wide
from vardrop.weights.random_kinds import CorrelatedWeight, IndependentWeight
from vardrop.weights.random_weight import RandomWeight

SHARINGS = ("layer", "neuron", "weight")
DEFAULT_RATE = 0.2  # where a learned rate starts if neither the user nor a replaced dropout says


class _RelativeVariance(torch.autograd.Function):
    """α θ² of the bounded log α, in few passes over the weights: they cost more than a small batch's products."""

    generate_vmap_rule = True

    @staticmethod
    def forward(theta: Tensor, log_alpha: Tensor, bound: float) -> tuple[Tensor, Tensor]:
        alpha = log_alpha.clamp(max=bound).exp_()
        slope = alpha.mul_(theta) if alpha.shape == theta.shape else alpha * theta  # α θ
        return slope * theta, slope

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: tuple[Tensor, Tensor]) -> None:
        theta, log_alpha, ctx.bound = inputs
        ctx.set_materialize_grads(False)  # or the slope's gradient would be written out as zeros
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(theta, log_alpha, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        if grad is None:
            return None, None, None
        theta, log_alpha, slope = ctx.saved_tensors
        again = graph_wanted()
        half = grad * (bounded(log_alpha, ctx.bound).exp() * theta if again else slope)
        by_log_alpha = None
        if ctx.needs_input_grad[1]:
            by_log_alpha = keep_inward((half * theta).sum_to_size(log_alpha.shape), log_alpha, ctx.bound)
        return half * 2 if again else half.mul_(2), by_log_alpha, None


class RelativeWeight(IndependentWeight):
    """A weight with independent entries N(θ, αθ²).

    Args:
        loc: θ.
        log_alpha: log α, before its bound; has the axes of ``loc`` and broadcasts with it.
        bound: the largest log α.
    """

    def __init__(self, loc: Tensor, log_alpha: Tensor, bound: float) -> None:
        super().__init__(loc, lambda: _RelativeVariance.apply(wide(loc), log_alpha, bound)[0])
        self._log_alpha = log_alpha
        self._bound = bound

    def local(self, op: LinearOp, generator: torch.Generator | None) -> Tensor:
        if op.function is F.linear and can_fuse(op.inputs[0], self.loc, self._log_alpha):
            return local_linear(op.inputs[0], self.loc, self._log_alpha, op.bias, self._bound, generator)
        return super().local(op, generator)


@dataclass(frozen=True)
class _Multiplicative(Posterior):
    """Noise relative to the weight: q(w) = N(θ, αθ²) (type B), or w_i = s_i θ_i with s_i ~ N(1, α) (type A)."""

    type: str = "A"
    sharing: str = "neuron"
    unit: str = "input"
    alpha: float | None = None
    rate: float | None = None
    prior: str = "log_uniform"
    prior_std: float = 1.0

    @property
    def bound(self) -> float:
        """The largest log α."""
        return math.inf

    def _check(self) -> None:
        require(self.type in ("A", "B"), self, "type must be 'A' (correlated) or 'B' (independent noise)", self.type)
        require(self.sharing in SHARINGS, self, f"sharing must be one of {', '.join(SHARINGS)}", self.sharing)
        require(self.unit in ("input", "output"), self, "unit must be 'input' or 'output'", self.unit)
        if self.type == "A" and (self.sharing == "weight" or self.unit == "output"):
            raise ValueError(
                f"vardrop.{type(self).__name__}: type 'A' has one random factor for every input unit, so its rates are "
                f"shared per 'layer' or per input 'neuron', got sharing={self.sharing!r}, unit={self.unit!r}; type='B' "
                "has one random scalar for every weight"
            )
        if self.alpha is not None and self.rate is not None:
            raise ValueError(
                f"vardrop.{type(self).__name__}: give alpha or rate, not both (alpha = rate / (1 - rate)), got "
                f"alpha={self.alpha} and rate={self.rate}"
            )
        if self.alpha is not None:
            require(0 < self.alpha < math.inf, self, "alpha must be positive and finite", self.alpha)
        if self.rate is not None:
            require(0 < self.rate < 1, self, "rate must be above 0 and below 1", self.rate)
        check_prior(self)
        start = self.alpha if self.rate is None else self.rate / (1 - self.rate)
        if self.prior == "cubic" and start is not None and start > 1 + 1e-9:
            require(False, self, "prior='cubic' holds for alpha <= 1", start)

    def initial(self, weight: Tensor, geometry: Geometry, rate: float | None) -> Tensor:
        replaced = DEFAULT_RATE if rate is None else min(max(rate, 1e-4), 1 - 1e-4)  # of a dropout, may be 0 or 1
        rate = replaced if self.rate is None else self.rate
        start = min(math.log(rate / (1 - rate)) if self.alpha is None else math.log(self.alpha), self.bound)
        shape = {"layer": (1,), "neuron": (geometry.units(self.unit),), "weight": geometry.shape}[self.sharing]
        return weight.new_full(shape, start)

    def log_alpha(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        return bounded(wide(noise), self.bound)

    def random(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> RandomWeight:
        if self.type == "A":
            std = (0.5 * self.log_alpha(weight, noise, geometry)).exp().expand(geometry.units("input"))
            return CorrelatedWeight(weight, std, geometry.input_axis, geometry.groups)

        return RelativeWeight(weight, geometry.spread(wide(noise), self.unit), self.bound)

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        if self.prior == "gaussian" and self.type == "B":  # the one divergence that depends on the mean
            every = geometry.spread(noise, self.unit).expand(geometry.shape)
            return divergence(self.prior, self.prior_std, every, weight, self.bound)
        scalars = geometry.units("input") if self.type == "A" else math.prod(geometry.shape)
        return divergence(self.prior, self.prior_std, noise, None, self.bound) * (scalars / noise.numel())


@dataclass(frozen=True)
class VariationalDropout(_Multiplicative):
    r"""Gaussian dropout whose rates are learned (Kingma, Salimans, Welling 2015, section 3).

    .. math:: \text{A: } w_i = s_i\,\theta_i, \; q(s_i) = N(1, \alpha_i) \qquad
              \text{B: } q(w_{ij}) = N(\theta_{ij}, \alpha_{ij}\theta_{ij}^2)

    The KL divergence counts once for every random scalar: every input unit (A), every weight (B), however many share
    one α.

    Args:
        type: ``"A"``, correlated weight noise: dropout on the input; ``"B"``, independent weight noise: dropout on the
            weights.
        sharing: one α for the ``"layer"``, for every ``"neuron"`` or (type B) for every ``"weight"``.
        unit: what a neuron is: an ``"input"`` or (type B) an ``"output"`` unit of the layer.
        alpha: α to start from.
        rate: or p to start from, α = p / (1 - p). With neither, the p of a dropout that is replaced, else 0.2.
        prior: ``"log_uniform"`` (exact), its approximations ``"cubic"`` and ``"sigmoid"``, ``"ard"`` or ``"gaussian"``.
        prior_std: standard deviation of the Gaussian prior, on weights (B) or on scales (A).
        max_alpha: upper bound of α by projection; section 3.4 finds that large α are local optima.

    Raises:
        ValueError: for values outside those above.

    Example:
        >>> import torch, vardrop as vd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
        >>> report = vd.convert_(net, vd.VariationalDropout(type="B", sharing="weight"))
        >>> report.converted
        ['0', '2']
    """

    max_alpha: float = 1.0

    @property
    def bound(self) -> float:
        return math.log(self.max_alpha)

    def _check(self) -> None:
        super()._check()
        require(self.max_alpha > 0, self, "max_alpha must be positive (math.inf for no bound)", self.max_alpha)
        if self.prior == "cubic":
            require(
                self.max_alpha <= 1, self, "prior='cubic' holds for alpha <= 1 and needs max_alpha <= 1", self.max_alpha
            )
        start = self.alpha if self.rate is None else self.rate / (1 - self.rate)
        if start is not None and start > self.max_alpha * (1 + 1e-9):
            raise ValueError(
                f"vardrop.VariationalDropout: alpha must start at or below max_alpha={self.max_alpha}, got "
                f"alpha={start:.4g}; raise max_alpha or start lower"
            )


@dataclass(frozen=True)
class GaussianDropout(_Multiplicative):
    r"""Gaussian dropout with a fixed rate, α = p / (1 - p).

    Type A multiplies the input with N(1, α) (Srivastava et al. 2014); type B samples the pre-activation from its
    marginal, eq. 10, as fast dropout does for a Bernoulli rate p (Wang and Manning 2013).

    Args:
        type: ``"A"``, before the linear operation, or ``"B"``, after it.
        rate: p; with neither rate nor alpha, the p of a dropout that is replaced, else 0.2.
        alpha: or α.
        sharing: without effect on one fixed rate but on the shape in which :func:`vardrop.dropout_rates` gives it.
        unit: see :class:`VariationalDropout`.
        prior: see :class:`VariationalDropout`; with α fixed the divergence is a constant but for ``"gaussian"``.
        prior_std: see :class:`VariationalDropout`.

    Raises:
        ValueError: for values outside those above.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = vd.convert_(layer, vd.GaussianDropout(type="B", rate=0.5))
        >>> vd.dropout_rates(layer)
        {'weight': tensor([0.5000])}
    """

    sharing: str = "layer"
    learned: ClassVar[bool] = False
