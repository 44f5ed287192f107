"""Divergences of a Gaussian posterior from its prior, elementwise: pure functions, one formula each.

Every function returns the KL divergence of *one* random scalar for every entry of its argument. Nothing is
summed, averaged or divided here; :func:`vardrop.kl_divergence` adds up a model with the right multiplicity.
"""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vardrop.half import HALVES
from vardrop.projection import bounded, keep_inward, outward
from vardrop.second_order import graph_wanted

__all__ = ["ard", "gaussian", "log_uniform"]


class _Fit(NamedTuple):
    """Numerators of the slope and of the value, and their common denominator, lowest power of w first."""

    slope: tuple[float, ...]
    value: tuple[float, ...]
    below: tuple[float, ...]


# The exact form. With u = 1 / (2 alpha), w = 1 / (1 + u) and s = 1 - w, both in (0, 1),
#   -dKL / d log alpha = x D(x)                = s R(w)        D: Dawson's function, x = sqrt(u)
#    KL                = 2 * integral_0^x D    = log(1 + u) / 2 + s H(w)
# where R and H are smooth on [0, 1] and fitted by ratios of polynomials: with few terms for float32 (relative error
# 2e-5), with more for float64 (8e-8). `tools/fit_log_uniform.py` makes the numbers, `tests/test_kl.py` holds them to
# quadrature.
_FITS = {
    torch.float32: _Fit(
        slope=(0.50000822384, -2.57062735123, 20.9892981279, -0.251813487471, 158.448770724, 946.859516437,
               54.1384787276),
        value=(0.98177116396, -6.28616684159, 46.1393818858, -47.6084676482, 330.307312297, 286.118272779,
               -20.5952990465),
        below=(1.0, -6.63577820742, 48.911745132, -59.9035600958, 356.44084587, 243.337007301, 594.943813206),
    ),
    torch.float64: _Fit(
        slope=(0.500000011188, -3.61592961496, 56.7829508646, 11.4459347344, 1663.30533011, 8994.06100474,
               12708.0316535, 300291.615964, 172270.351813, 380.92672655),
        value=(0.981755079259, -8.34088885459, 119.198185796, -114.311794001, 3229.00831761, 9673.46567404,
               49572.5537688, 157345.305774, 33614.2466161, -5245.43907632),
        below=(1.0, -8.73191584203, 123.934403708, -147.983265206, 3369.31076022, 9144.61060295, 51530.8278927,
               135405.702556, 211509.075222, 85445.6248507),
    ),
}  # fmt: skip
_LOWEST = {torch.float32: -87.0, torch.float64: -707.0}  # of log alpha, for which u is a number
_BLOCK = {"cpu": 1 << 18, "other": 1 << 22}  # entries worked on at once: a CPU wants them in its cache


def _polynomial(powers: list[Tensor], coefficients: tuple[float, ...], out: Tensor) -> Tensor:
    torch.mul(powers[0], coefficients[1], out=out).add_(coefficients[0])
    for power, c in zip(powers[1:], coefficients[2:], strict=True):
        out.add_(power, alpha=c)
    return out


def _range(log_alpha: Tensor) -> tuple[float, float]:
    """Bounds of the entries: on a CPU the least and the greatest, elsewhere none, so as not to wait for them."""
    if log_alpha.device.type != "cpu" or torch.compiler.is_compiling():
        return -math.inf, math.inf
    smallest, largest = log_alpha.aminmax()
    return smallest.item(), largest.item()


def _exact_into(value: Tensor, slope: Tensor, log_alpha: Tensor, bound: float, work: Tensor) -> None:
    """Fill in value and slope; the rows of ``work`` hold what is between."""
    fit, lowest = _FITS[log_alpha.dtype], _LOWEST[log_alpha.dtype]
    smallest, largest = _range(log_alpha)
    z, s, below, *powers = (row[: log_alpha.numel()] for row in work)
    torch.clamp(log_alpha, min=lowest, max=bound, out=z).add_(math.log(2.0))
    torch.sigmoid(z, out=powers[0])  # w, w^2, ...: shared by the three polynomials
    for lower, power in pairwise(powers):
        torch.mul(lower, powers[0], out=power)
    torch.sigmoid(z.neg_(), out=s)  # not 1 - w, which has no digits left where alpha is large
    log_1_plus_u = torch.div(s, powers[0], out=z).log1p_()
    s.div_(_polynomial(powers, fit.below, out=below))
    _polynomial(powers, fit.slope, out=slope).mul_(s).neg_()
    _polynomial(powers, fit.value, out=value).mul_(s)
    value.add_(log_1_plus_u, alpha=0.5)
    if not smallest >= lowest:  # where u has no number, KL is linear in log alpha; true of NaN as well
        value.add_(torch.sub(lowest, log_alpha).clamp_(min=0), alpha=0.5)
    if bound < math.inf and not largest < bound - 1e-6:
        slope.sub_(outward(slope, log_alpha, bound, out=below))


def _exact(log_alpha: Tensor, bound: float, total: bool) -> tuple[Tensor, Tensor]:
    """Value (or its total) and slope of the exact divergence, a block of entries at a time."""
    flat = log_alpha.reshape(-1)
    block = max(1, flat.numel())
    if not torch.compiler.is_compiling():  # a compiler fuses, and would unroll the loop
        block = min(block, _BLOCK.get(flat.device.type, _BLOCK["other"]))
    slope = torch.empty_like(flat)
    value = flat.new_empty(block) if total else torch.empty_like(flat)
    work = flat.new_empty(len(_FITS[flat.dtype].below) + 2, block)
    sums = []
    for start in range(0, flat.numel(), block):
        part = flat[start : start + block]
        here = value[: part.numel()] if total else value[start : start + block]
        _exact_into(here, slope[start : start + block], part, bound, work)
        sums.append(here.sum())
    if total:
        return torch.stack(sums).sum() if sums else flat.sum(), slope.view(log_alpha.shape)
    return value.view(log_alpha.shape), slope.view(log_alpha.shape)


def _horner(x: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    y = torch.full_like(x, coefficients[-1])
    for c in reversed(coefficients[:-1]):
        y = y * x + c
    return y


def _slope(log_alpha: Tensor, bound: float) -> Tensor:
    """dKL / d log alpha by the same fit, in plain operations, which can be differentiated again."""
    fit = _FITS[log_alpha.dtype]
    z = log_alpha.clamp(_LOWEST[log_alpha.dtype], bound) + math.log(2.0)
    w = torch.sigmoid(z)
    above, below = (_horner(w, row) for row in (fit.slope, fit.below))
    return keep_inward(-torch.sigmoid(-z) * above / below, log_alpha, bound)


class _LogUniform(torch.autograd.Function):
    """The exact divergence with its gradient in closed form; the slope is an output so that transforms see it."""

    @staticmethod
    def forward(log_alpha: Tensor, bound: float, total: bool) -> tuple[Tensor, Tensor]:
        return _exact(log_alpha, bound, total)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, float, bool], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # or the slope's gradient would be written out as zeros
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[0], output[1])
        ctx.bound = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, None, None]:
        if grad is None:
            return None, None, None
        log_alpha, slope = ctx.saved_tensors
        return grad * (_slope(log_alpha, ctx.bound) if graph_wanted() else slope), None, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[Any, ...], log_alpha: Tensor, bound: float, total: bool) -> tuple[Any, Any]:
        batch = in_dims[0]  # elementwise: a batch is one more dimension, and only the sum has to know it
        value, slope = _LogUniform.apply(log_alpha, bound, False)
        if total:
            return (value.movedim(batch, 0).flatten(1).sum(1), slope), (0, batch)
        return (value, slope), (batch, batch)


def _cubic(log_alpha: Tensor) -> Tensor:
    if not torch.compiler.is_compiling() and log_alpha.numel() and bool((log_alpha > 0).any()):
        raise ValueError(
            "vardrop.kl.log_uniform: the cubic of Kingma et al. (2015) holds for alpha <= 1 only, got "
            f"log_alpha up to {log_alpha.max().item():.4g}; bound alpha (max_alpha=1) or use form='exact'"
        )
    alpha = log_alpha.exp()
    c1, c2, c3 = 1.16145124, -1.50204118, 0.58629921
    at_one = 0.4266856043  # the exact value at alpha = 1, which fixes the paper's unnamed constant
    return at_one + (c1 + c2 + c3) - 0.5 * log_alpha - alpha * (c1 + alpha * (c2 + alpha * c3))


def _sigmoid(log_alpha: Tensor) -> Tensor:
    k1, k2, k3 = 0.63576, 1.87320, 1.48695
    return k1 * torch.sigmoid(-(k2 + k3 * log_alpha)) + 0.5 * F.softplus(-log_alpha)


_APPROXIMATIONS = {"cubic": _cubic, "sigmoid": _sigmoid}


def log_uniform(
    log_alpha: Tensor, form: str = "exact", reduction: str = "none", max_log_alpha: float = math.inf
) -> Tensor:
    r"""KL divergence of N(θ, αθ²) from the log-uniform prior p(log|w|) ∝ 1, elementwise, zero as α → ∞.

    .. math:: KL(\alpha) = 2 \int_0^{1/\sqrt{2\alpha}} D(t)\,dt, \qquad
              \frac{dKL}{d\log\alpha} = -x D(x), \; x = 1/\sqrt{2\alpha}

    with D Dawson's function (Hron, Matthews, Ghahramani 2017, in another notation). It does not depend on θ, which is
    why dropout training of θ is variational inference (Kingma et al. 2015, section 3.3). The prior is improper: this
    number is a divergence up to a constant, chosen here so that a weight of pure noise costs nothing.

    Args:
        log_alpha: log α, the log of the noise variance relative to θ²; any shape, floating point.
        form: ``"exact"``, with relative error below 1e-7 in float64 and 3e-5 in float32 for value and gradient;
            ``"cubic"``, the fit of Kingma et al. 2015, section 3.3, for α ≤ 1 only, off by up to 0.04;
            ``"sigmoid"``, the fit of Molchanov et al. 2017, off by up to 0.01.
        reduction: ``"none"``, or ``"sum"``, which for the exact form takes one pass over the entries.
        max_log_alpha: an upper bound on log α by projection (:func:`vardrop.projection.bounded`): the divergence falls
            with α, so where it is minimised its gradient at the bound is 0.

    Shape:
        Any shape, and the same shape out, or a scalar.

    Raises:
        ValueError: for an unknown ``form`` or ``reduction``, and for ``"cubic"`` if any α is above 1.
        TypeError: if ``log_alpha`` is not a floating-point tensor.

    Example:
        >>> import torch, vardrop as vd
        >>> vd.kl.log_uniform(torch.tensor([-1.0, 0.0, 3.0]))
        tensor([0.9145, 0.4267, 0.0247])
    """
    if not torch.is_floating_point(log_alpha):
        raise TypeError(f"vardrop.kl.log_uniform: log_alpha must be a floating-point tensor, got {log_alpha.dtype}")
    if reduction not in ("none", "sum"):
        raise ValueError(f"vardrop.kl.log_uniform: reduction must be 'none' or 'sum', got {reduction!r}")
    if form == "exact":
        wide = log_alpha.float() if log_alpha.dtype in HALVES else log_alpha
        return _LogUniform.apply(wide, max_log_alpha, reduction == "sum")[0].to(log_alpha.dtype)
    if form not in _APPROXIMATIONS:
        raise ValueError(f"vardrop.kl.log_uniform: form must be 'exact', 'cubic' or 'sigmoid', got {form!r}")
    value = _APPROXIMATIONS[form](bounded(log_alpha, max_log_alpha))
    return value.sum() if reduction == "sum" else value


def ard(log_alpha: Tensor) -> Tensor:
    r"""KL divergence of N(θ, αθ²) from N(0, s²) with the best s² for every scalar, elementwise.

    .. math:: KL = \tfrac12 \log(1 + 1/\alpha)

    Automatic relevance determination by empirical Bayes (Kharitonov, Molchanov, Vetrov 2018): the proper counterpart
    of the log-uniform prior.

    Args:
        log_alpha: log α; any shape, floating point.

    Shape:
        Any shape, and the same shape out.

    Example:
        >>> import torch, vardrop as vd
        >>> vd.kl.ard(torch.tensor([0.0]))
        tensor([0.3466])
    """
    return 0.5 * F.softplus(-log_alpha)


def gaussian(mean: Tensor, log_variance: Tensor, prior_std: float | Tensor = 1.0) -> Tensor:
    r"""KL divergence of N(μ, σ²) from N(0, s²), elementwise.

    .. math:: KL = \log\frac{s}{\sigma} + \frac{\sigma^2 + \mu^2}{2 s^2} - \frac12

    Args:
        mean: μ; any shape.
        log_variance: log σ²; broadcasts with ``mean``.
        prior_std: s, positive.

    Shape:
        The broadcast shape of ``mean`` and ``log_variance``.

    Raises:
        ValueError: if a float ``prior_std`` is not positive.

    Example:
        >>> import torch, vardrop as vd
        >>> vd.kl.gaussian(torch.zeros(1), torch.zeros(1))
        tensor([0.])
    """
    if not isinstance(prior_std, Tensor):
        if not prior_std > 0:
            raise ValueError(f"vardrop.kl.gaussian: prior_std must be positive, got {prior_std}")
        prior_std = torch.tensor(prior_std, dtype=log_variance.dtype, device=log_variance.device)
    scaled = (log_variance.exp() + mean * mean) / (prior_std * prior_std)
    return 0.5 * (scaled - 1.0 - log_variance) + prior_std.log()
