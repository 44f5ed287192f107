"""Activation noise as pure functions: one primitive, and what has a state or a formula of its own.

Legend: p dropout rate, α = p / (1 − p) noise variance relative to x².
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vardrop.half import real_type, wide_type
from vardrop.masks import bernoulli, from_generator, in_memory_order
from vardrop.products import linear

__all__ = ["concrete", "drop", "drop_types", "gaussian", "moments_linear", "moments_relu"]


def drop(
    x: Tensor,
    rate: float | Tensor,
    shared: int | Sequence[int] = (),
    noise: str = "bernoulli",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""x times independent noise of mean 1 and variance p / (1 − p): dropout in all its forms.

    .. math:: y = x \circ \varepsilon, \quad E[\varepsilon] = 1, \quad Var[\varepsilon] = \alpha = \frac{p}{1-p}

    ``"bernoulli"``: ε is 0 with probability p and else 1 / (1 − p) (Srivastava et al. 2014, inverted). p is rounded to
    the nearest multiple of 2⁻¹⁶ that is neither 0 nor 1, which sixteen random bits can have exactly (eight for 1/4 or
    3/4, one for 1/2), and the scale is that of the rounded rate: the mean is x without bias. For p = 1 there is no such
    scale, and y = 0.

    ``"gaussian"``: ε ~ N(1, α) (section 10 of the same paper), for p < 1.

    Dimensions in ``shared`` share one draw: the spatial ones give channel dropout, time gives locked dropout, all but
    the batch give stochastic depth.

    Where the rate can be read without waiting (a number, or a tensor on a CPU, outside of torch.compile) and is 0, x
    itself comes back and nothing is drawn.

    Args:
        x: floating point or complex; any shape and memory format.
        rate: p; a number, or a 0-dim tensor, which is not checked.
        shared: the dimensions that share one draw.
        noise: ``"bernoulli"`` or ``"gaussian"``.
        generator: source of the noise; torch's default one if None.

    Shape:
        Any shape, and the same shape and memory format out.

    Raises:
        TypeError: if x is neither floating point nor complex.
        ValueError: for a number outside [0, 1] (Gaussian: [0, 1)), a tensor with dimensions, one that asks for a
            gradient that Bernoulli noise does not have, or an unknown noise.
        IndexError: for a dimension that x has not got.

    Example:
        >>> import torch
        >>> from vardrop.functional import drop
        >>> y = drop(torch.ones(2, 3, 4), 0.5, shared=(1, 2))  # one draw for each of the two
        >>> sorted({float(entry) for entry in y.flatten()} | {0.0, 2.0})
        [0.0, 2.0]
    """
    if noise not in ("bernoulli", "gaussian"):
        raise ValueError(f"vardrop.functional.drop: noise must be 'bernoulli' or 'gaussian', got {noise!r}")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"vardrop.functional.drop: x must be floating point or complex, got {x.dtype}")
    rate = _known(rate)
    if isinstance(rate, Tensor):
        if rate.ndim:
            raise ValueError(
                f"vardrop.functional.drop: rate must be a number or a 0-dim tensor, got shape {tuple(rate.shape)}"
            )
        if noise == "bernoulli" and rate.requires_grad:
            raise ValueError(
                "vardrop.functional.drop: rate must not ask for a gradient, which Bernoulli noise cannot give, got one "
                "with requires_grad; use concrete, Gaussian noise, or rate.detach()"
            )
    elif not 0 <= rate <= 1 or (noise == "gaussian" and rate == 1):
        bounds = "[0, 1]" if noise == "bernoulli" else "[0, 1) for Gaussian noise"
        raise ValueError(f"vardrop.functional.drop: rate must be in {bounds}, got {rate}")
    elif rate == 0:
        return x
    sizes = _sizes(x, shared)
    if noise == "gaussian":
        return _jitter(x, (rate / (1 - rate)) ** 0.5, sizes, generator)
    return times(x, *bernoulli(sizes, rate, x, generator))


def times(x: Tensor, kept: Tensor, scale: float | Tensor | None) -> Tensor:
    """x times a mask and its scale, as :func:`vardrop.masks.bernoulli` gives them."""
    y = x * kept
    if scale is None:
        return y
    return y.mul_(scale) if isinstance(scale, float) else y * scale


def gaussian(
    x: Tensor, log_alpha: Tensor, shared: int | Sequence[int] = (), generator: torch.Generator | None = None
) -> Tensor:
    r"""x times N(1, α) noise, by log α, which a gradient reaches (Kingma et al. 2015, section 3.1).

    .. math:: y = x (1 + \sqrt{\alpha} \, \varepsilon), \quad \varepsilon \sim N(0, 1)

    Args:
        x: floating point or complex; any shape and memory format.
        log_alpha: log α, a 0-dim tensor.
        shared: the dimensions that share one draw.
        generator: source of the noise; torch's default one if None.

    Shape:
        Any shape, and the same shape and memory format out.

    Example:
        >>> import torch
        >>> from vardrop.functional import gaussian
        >>> log_alpha = torch.tensor(0.0, requires_grad=True)
        >>> gaussian(torch.ones(100), log_alpha).var().backward()
        >>> bool(log_alpha.grad > 0)
        True
    """
    return _jitter(x, torch.exp(0.5 * log_alpha), _sizes(x, shared), generator)


def concrete(
    x: Tensor,
    rate_logit: Tensor,
    temperature: float = 0.1,
    shared: int | Sequence[int] = (),
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Dropout relaxed so that a gradient reaches the rate: concrete dropout (Gal, Hron, Kendall 2017, eq. 5).

    .. math:: z = \sigma\left(\frac{\mathrm{logit}\,p + \mathrm{logit}\,u}{t}\right), \; u \sim U(0, 1), \qquad
              y = x \frac{1 - z}{1 - p}

    The noise is that of :func:`drop` as t → 0. At t = 0.1 its mean is 1 to within 0.2% for p up to 1/2 (1.2% too much
    at 0.9), and its variance a tenth below p / (1 − p).

    Args:
        x: floating point or complex; any shape.
        rate_logit: logit p, a 0-dim tensor.
        temperature: t, above 0; smaller is closer to zeros and ones.
        shared: the dimensions that share one draw.
        generator: source of the noise; torch's default one if None.

    Shape:
        Any shape, and the same shape out.

    Raises:
        ValueError: if ``temperature`` is not above 0.

    Example:
        >>> import torch
        >>> from vardrop.functional import concrete
        >>> logit = torch.tensor(0.0, requires_grad=True)
        >>> concrete(torch.ones(100), logit).var().backward()
        >>> bool(logit.grad > 0)  # a higher rate is more noise
        True
    """
    if not temperature > 0:
        raise ValueError(f"vardrop.functional.concrete: temperature must be above 0, got {temperature}")
    wide = wide_type(x)
    logit = rate_logit.to(wide)
    u = torch.rand(_sizes(x, shared), dtype=wide, device=x.device, **from_generator(generator))
    z = torch.sigmoid((logit + torch.logit(u, eps=torch.finfo(wide).eps)) / temperature)
    return x * ((1 - z) / torch.sigmoid(-logit)).to(real_type(x))


def drop_types(
    x: Tensor,
    tokens: Tensor,
    rate: float | Tensor,
    num_types: int,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Drop embeddings by word type: in one sequence a word is dropped everywhere or nowhere (Gal, Ghahramani 2016).

    Args:
        x: embeddings, ``[..., time, features]``.
        tokens: the word at every place, ``[..., time]``, integers from 0 to ``num_types`` − 1.
        rate: p; see :func:`drop`.
        num_types: the size of the vocabulary.
        generator: source of the noise; torch's default one if None.

    Shape:
        That of x.

    Raises:
        ValueError: if the shapes do not fit.

    Example:
        >>> import torch
        >>> from vardrop.functional import drop_types
        >>> y = drop_types(torch.ones(1, 3, 2), torch.tensor([[7, 4, 7]]), 0.5, num_types=10)
        >>> torch.equal(y[0, 0], y[0, 2])
        True
    """
    if x.shape[:-1] != tokens.shape:
        raise ValueError(
            "vardrop.functional.drop_types: tokens must have the shape of x without its last dimension, got "
            f"{tuple(tokens.shape)} for x of shape {tuple(x.shape)}"
        )
    factors = x.new_ones((), dtype=real_type(x)).expand(*tokens.shape[:-1], num_types)
    factors = drop(factors, rate, generator=generator)
    return x * factors.gather(-1, tokens).unsqueeze(-1)


# --------------------------------------------------------------------------------------------------- fast dropout


def moments_linear(
    mean: Tensor, variance: Tensor, weight: Tensor, bias: Tensor | None = None, rate: float | Tensor = 0.0
) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of a linear layer behind dropout (Wang, Manning 2013).

    .. math:: m' = W m + b, \qquad v' = W^2 (v + \alpha (m^2 + v))

    for independent inputs of mean m and variance v under noise of variance α = p / (1 − p). Exact; the outputs of one
    layer depend on each other, which the next call leaves out.

    Args:
        mean: m, ``[..., in]``.
        variance: v ≥ 0, of the same shape.
        weight: W, ``[out, in]``.
        bias: b, ``[out]``, or None.
        rate: p of the dropout on the inputs, in [0, 1).

    Returns:
        Mean and variance of the outputs, ``[..., out]``.

    Example:
        >>> import torch
        >>> from vardrop.functional import moments_linear
        >>> moments_linear(torch.ones(2), torch.zeros(2), torch.tensor([[1.0, -3.0]]), rate=0.5)
        (tensor([-2.]), tensor([10.]))
    """
    alpha = rate / (1 - rate)
    spread = variance + alpha * (mean * mean + variance)
    return linear(mean, weight, bias), linear(spread, weight * weight)


def moments_relu(mean: Tensor, variance: Tensor) -> tuple[Tensor, Tensor]:
    r"""Mean and variance of max(0, a) for a ~ N(m, v) (Wang, Manning 2013).

    .. math:: E = m \Phi(r) + s \varphi(r), \quad E[\cdot^2] = (m^2 + v) \Phi(r) + m s \varphi(r), \quad r = m / s

    with s = √v. Where v = 0 it is max(0, m) and 0.

    Args:
        mean: m; any shape.
        variance: v ≥ 0, of the same shape.

    Returns:
        Mean and variance, of the same shape.

    Example:
        >>> import torch
        >>> from vardrop.functional import moments_relu
        >>> moments_relu(torch.tensor([0.0, 2.0]), torch.tensor([1.0, 0.0]))
        (tensor([0.3989, 2.0000]), tensor([0.3408, 0.0000]))
    """
    tiny = torch.finfo(variance.dtype).tiny
    std = variance.clamp_min(tiny).sqrt()  # at v = 0 the gradient of the root is 0
    r = mean / std
    below = torch.special.ndtr(r)
    density = torch.exp(-0.5 * r * r) / math.sqrt(2 * math.pi)
    first = mean * below + std * density
    # E[y²] − E[y]² without the difference of two large numbers: with h = φ + r Φ, v (Φ + r h − h²)
    h = density + r * below
    second = variance * (below + h * (r - h)).clamp_min(0)
    varies = variance > 0
    return torch.where(varies, first, mean.clamp_min(0)), torch.where(varies, second, torch.zeros_like(second))


# ---------------------------------------------------------------------------------------------------------- draws


def _known(rate: float | Tensor) -> float | Tensor:
    """The rate as a number where reading it makes nobody wait and no gradient is lost."""
    if not isinstance(rate, Tensor) or torch.compiler.is_compiling():
        return rate
    if rate.ndim or rate.requires_grad or rate.device.type != "cpu":
        return rate
    try:
        return float(rate)
    except RuntimeError:  # under vmap over rates, or traced with fake tensors
        return rate


def _jitter(x: Tensor, std: float | Tensor, sizes: list[int], generator: torch.Generator | None) -> Tensor:
    """x times 1 + std · N(0, 1), in the memory order of x."""
    draws = torch.randn(math.prod(sizes), dtype=real_type(x), device=x.device, **from_generator(generator))
    noise = in_memory_order(draws, sizes, x)
    if isinstance(std, Tensor):
        return x * (1 + std.to(noise.dtype) * noise)
    return x * noise.mul_(std).add_(1)


def _sizes(x: Tensor, shared: int | Sequence[int]) -> list[int]:
    """The shape of the noise: that of x, and 1 where a dimension shares one draw."""
    sizes = list(x.shape)
    for axis in (shared,) if isinstance(shared, int) else shared:
        if not -x.ndim <= axis < x.ndim:
            raise IndexError(
                f"vardrop.functional: shared must name dimensions of x, got {axis} for shape {tuple(x.shape)}"
            )
        sizes[axis] = 1
    return sizes
