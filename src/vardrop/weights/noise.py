"""Draws that the estimators are made of: standard normal values, signs, and a Gaussian of given mean and variance."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vardrop.masks import from_generator, in_memory_order
from vardrop.second_order import graph_wanted


def normal(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent N(0, 1) values of the given shape, with the dtype and device of ``like``."""
    return torch.randn(shape, dtype=like.dtype, device=like.device, **from_generator(generator))


def normal_like(x: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent N(0, 1) values, one for each of x and in its memory order."""
    return in_memory_order(normal((x.numel(),), x, generator), x.shape, x)


def signs(shape: Sequence[int], like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Independent values of the given shape, +1 or -1 with equal probability."""
    bits = torch.randint(0, 2, tuple(shape), dtype=like.dtype, device=like.device, **from_generator(generator))
    return bits.mul_(2).sub_(1)


class _Slope(torch.autograd.Function):
    """noise / (2 sqrt(variance)), of which the value is there already, as a function of the variance."""

    generate_vmap_rule = True

    @staticmethod
    def forward(value: Tensor, variance: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        value, variance = ctx.saved_tensors
        some = torch.where(variance > 0, variance, 1.0)  # where there is none the value is 0
        return None, -0.5 * grad * _Slope.apply(value, variance) / some


class _AddNoise(torch.autograd.Function):
    """mean + sqrt(variance) * noise, where the gradient of the root at variance 0 is defined as 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(mean: Tensor, variance: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
        std = variance.clamp_min(0).sqrt_()  # some convolution algorithms come out a little below 0
        sample = torch.addcmul(mean, std.to(mean.dtype), noise)
        # d sample / d variance = noise / (2 std); 0 where a zero row, padding or dead units leave no variance
        slope = torch.addcdiv(std.new_zeros(()), noise.to(std.dtype), std, value=0.5)
        return sample, slope.masked_fill_(std == 0, 0.0)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.set_materialize_grads(False)  # or the slope's gradient would be written out as zeros
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(inputs[1], output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, Tensor | None, None]:
        variance, slope = ctx.saved_tensors
        if graph_wanted():
            slope = _Slope.apply(slope, variance)
        return grad, None if grad is None else grad.to(slope.dtype) * slope, None


class _Square(torch.autograd.Function):
    """x², with the gradient in one pass less than autograd's own."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(inputs[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return (grad * ctx.saved_tensors[0]).mul_(2)


def square(x: Tensor) -> Tensor:
    """x², elementwise, for the inputs of a variance."""
    return _Square.apply(x)


def add_noise(mean: Tensor, variance: Tensor, generator: torch.Generator | None = None) -> Tensor:
    r"""A sample of N(mean, variance), elementwise: :math:`\gamma + \sqrt{\delta}\,\zeta` (Kingma et al. 2015, eq. 6).

    The gradient with respect to the variance is ζ / (2√δ) (eq. 8), and 0 where δ = 0: there is no epsilon that would
    vanish in half precision.

    Args:
        mean: γ.
        variance: δ ≥ 0, of the same shape; may be of a wider type than the mean.
        generator: source of the noise; torch's default one if None.

    Shape:
        Any shape, and the same shape out.

    Example:
        >>> import torch
        >>> from vardrop.weights.noise import add_noise
        >>> add_noise(torch.ones(3), torch.zeros(3))
        tensor([1., 1., 1.])
    """
    return with_noise(mean, variance, normal_like(mean, generator))


def with_noise(mean: Tensor, variance: Tensor, noise: Tensor) -> Tensor:
    """:func:`add_noise` with a ζ that is given."""
    return _AddNoise.apply(mean, variance, noise)[0]
