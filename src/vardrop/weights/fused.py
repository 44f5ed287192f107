"""The local reparameterization trick for F.linear and type B noise as one function with its gradient by hand.

It computes what `estimators.local` and the posterior's variance compute together, in fewer passes over the weights and
over the activations; `tests/test_fused.py` holds the two against each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vardrop.products import product
from vardrop.projection import bounded, keep_inward
from vardrop.second_order import graph_wanted
from vardrop.weights.noise import with_noise


class _LocalLinear(torch.autograd.Function):
    """y = x θᵀ + b + √δ ζ with δ = x² (α θ²)ᵀ (eq. 10); x ``[M, K]``, θ ``[L, K]``, ζ and y ``[M, L]``."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, theta: Tensor, log_alpha: Tensor, bias: Tensor | None, noise: Tensor, bound: float
    ) -> Tensor:
        alpha = log_alpha.clamp(max=bound).exp_()
        slope = alpha.mul_(theta) if alpha.shape == theta.shape else alpha * theta  # α θ
        variance = slope * theta
        y = product(x, theta, bias)
        std = product(x * x, variance).sqrt_()
        y.addcmul_(std, noise)
        by_variance = torch.addcdiv(std.new_zeros(()), noise, std, value=0.5).masked_fill_(std == 0, 0.0)
        ctx.save_for_backward(x, theta, log_alpha, slope, variance, by_variance)
        ctx.bound = bound
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, theta, log_alpha, slope, variance, by_variance = ctx.saved_tensors
        if graph_wanted():
            return _plain_gradients(ctx, grad)
        by_delta = grad * by_variance
        by_x = by_theta = by_log_alpha = by_bias = None
        if ctx.needs_input_grad[0]:
            by_x = product(grad, theta.t()).addcmul_(product(by_delta, variance.t()), x, value=2)
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            half = product(by_delta.t(), (x * x).t()).mul_(slope)  # dL/dδ's share of dL/dθ, halved
            if ctx.needs_input_grad[2]:
                by_log_alpha = keep_inward((half * theta).sum_to_size(log_alpha.shape), log_alpha, ctx.bound)
            by_theta = product(grad.t(), x.t()).add_(half, alpha=2)
        if ctx.needs_input_grad[3]:
            by_bias = grad.sum(0)
        return by_x, by_theta, by_log_alpha, by_bias, None, None


def _plain_gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """The same by autograd, from the plain formula, so that they can be differentiated again."""
    x, theta, log_alpha, _, variance, by_variance = ctx.saved_tensors
    with torch.no_grad():  # ζ, but for where there is no variance and it has no effect
        noise = 2 * by_variance * ((x * x) @ variance.t()).sqrt()
    with torch.enable_grad():
        weights = bounded(log_alpha, ctx.bound).exp() * theta * theta
        y = with_noise(x @ theta.t(), (x * x) @ weights.t(), noise)
    needed = ctx.needs_input_grad[:3]
    into = [tensor for tensor, need in zip((x, theta, log_alpha), needed, strict=True) if need]
    found = iter(torch.autograd.grad(y, into, grad, create_graph=True) if into else ())
    gradients = [next(found) if need else None for need in needed]
    return *gradients, grad.sum(0) if ctx.needs_input_grad[3] else None, None, None


def can_fuse(x: Tensor, theta: Tensor, log_alpha: Tensor) -> bool:
    """Whether the fused form applies: plain eager tensors of one wide type. A compiler fuses by itself."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
        and not torch.is_autocast_enabled(x.device.type)
        and x.dtype == theta.dtype == log_alpha.dtype
        and x.dtype in (torch.float32, torch.float64)
        and x.ndim >= 1
    )


def local_linear(
    x: Tensor, theta: Tensor, log_alpha: Tensor, bias: Tensor | None, bound: float, generator: torch.Generator | None
) -> Tensor:
    """``F.linear(x, w, bias)`` for w ~ N(θ, αθ²), sampled at the output; ``log_alpha`` broadcasts with ``theta``."""
    flat = x.reshape(-1, x.shape[-1])
    shape = (*x.shape[:-1], len(theta))
    noise = torch.randn(shape, dtype=x.dtype, device=x.device, generator=generator).view(-1, len(theta))
    y = _LocalLinear.apply(flat, theta, log_alpha, bias, noise, bound)
    return y if x.ndim == 2 else y.view(shape)  # FSDP does not like modules that return views
