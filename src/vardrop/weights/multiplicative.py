"""Dropout posteriors: noise relative to the weight, with learned or fixed rates."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vardrop.weights.geometry import Geometry
from vardrop.weights.posteriors import Posterior, check_prior, divergence, require, wide
from vardrop.weights.random_weight import CorrelatedWeight, IndependentWeight, RandomWeight

SHARINGS = ("layer", "neuron", "weight")
DEFAULT_RATE = 0.2  # where a learned rate starts if neither the user nor a replaced dropout says


class _Bounded(torch.autograd.Function):
    """min(x, bound) as a projection: beyond the bound only a gradient that points back inside passes."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, bound: float) -> Tensor:
        return x.clamp(max=bound)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        # descent moves against the gradient: a positive one leads down, back inside
        outward = (ctx.saved_tensors[0] >= ctx.bound) & (grad < 0)
        return grad.masked_fill(outward, 0.0), None


def bounded(x: Tensor, bound: float) -> Tensor:
    r"""Projection of x onto x ≤ bound, elementwise, for gradient descent.

    ``clamp`` would give the gradient 0 to every entry at or beyond the bound, which then could never come back. Here
    a gradient that points inside passes (Kingma et al. 2015, section 3.4: α ≤ 1 during training).

    Args:
        x: any shape.
        bound: the upper bound.

    Shape:
        The same shape out.

    Example:
        >>> import torch
        >>> from vardrop.weights.posteriors import bounded
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> (3 * bounded(x, 1.0)).backward()
        >>> x.grad
        tensor([3.])
    """
    return x if bound == math.inf else _Bounded.apply(x, bound)


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

    def initial(self, weight: Tensor, geometry: Geometry, rate: float | None) -> Tensor:
        rate = self.rate if self.rate is not None else rate
        rate = DEFAULT_RATE if rate is None else min(max(rate, 1e-4), 1 - 1e-4)
        start = min(math.log(rate / (1 - rate)) if self.alpha is None else math.log(self.alpha), self.bound)
        shape = {"layer": (1,), "neuron": (geometry.units(self.unit),), "weight": geometry.shape}[self.sharing]
        return weight.new_full(shape, start)

    def log_alpha(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        return bounded(wide(noise), self.bound)

    def random(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> RandomWeight:
        if self.type == "A":
            std = (0.5 * self.log_alpha(weight, noise, geometry)).exp().expand(geometry.units("input"))
            return CorrelatedWeight(weight, std, geometry.input_axis, geometry.groups)

        def variance() -> Tensor:
            alpha = geometry.spread(self.log_alpha(weight, noise, geometry).exp(), self.unit)
            return alpha * wide(weight).square()

        return IndependentWeight(weight, variance)

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        log_alpha = self.log_alpha(weight, noise, geometry)
        if self.prior == "gaussian" and self.type == "B":  # the one divergence that depends on the mean
            every = geometry.spread(log_alpha, self.unit).expand(geometry.shape)
            return divergence(self.prior, self.prior_std, every, weight)
        scalars = geometry.units("input") if self.type == "A" else math.prod(geometry.shape)
        return divergence(self.prior, self.prior_std, log_alpha, None) * (scalars / log_alpha.numel())


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
            require(self.max_alpha <= 1, self, "prior='cubic' holds for alpha <= 1 and needs max_alpha <= 1", self.max_alpha)
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


