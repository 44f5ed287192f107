"""Bounds on a parameter as projections: what points back inside may pass."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def outward(grad: Tensor, x: Tensor, bound: float, out: Tensor) -> Tensor:
    """The part of a gradient that would lead descent out of x ≤ bound: its negative entries where x is at the bound.

    Written without a mask, which costs many times what these two operations do.
    """
    torch.ops.aten.threshold_backward.grad_input(grad, x, bound - 1e-6, grad_input=out)  # grad there, 0 elsewhere
    return out.clamp_(max=0)


def keep_inward(grad: Tensor, x: Tensor, bound: float) -> Tensor:
    """A gradient without its outward part."""
    if bound == math.inf:
        return grad
    at_bound = torch.ops.aten.threshold_backward(grad, x, bound - 1e-6)
    return grad - at_bound.clamp(max=0)  # vmap has no rule for clamp_


class _Bounded(torch.autograd.Function):
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
        return keep_inward(grad, ctx.saved_tensors[0], ctx.bound), None


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
        >>> from vardrop.projection import bounded
        >>> x = torch.tensor([2.0], requires_grad=True)
        >>> (3 * bounded(x, 1.0)).backward()
        >>> x.grad
        tensor([3.])
    """
    return x if bound == math.inf else _Bounded.apply(x, bound)
