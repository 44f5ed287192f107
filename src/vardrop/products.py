"""Matrix products by the faster of the two kernels that torch has for them on a CPU.

torch multiplies float32 matrices by MKL, which on AMD processors with AVX-512 reaches half the speed of oneDNN, the
library behind torch's convolutions (100 × 1000 by 1000 × 1000, two threads: 170 against 386 GFLOP/s). Noise is paid for
in such products, so those of random weights and those that all passes of a prediction share go to oneDNN where it is
known to be faster; everywhere else they are torch's own. The digits differ by rounding.
``torch.backends.mkldnn.enabled = False`` keeps to MKL.
"""

from __future__ import annotations

import functools
import platform
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch.nn import functional as F

from vardrop.second_order import graph_wanted

_WORTH = 1 << 23  # multiply-adds. oneDNN takes half a millisecond for the first product of a shape, and shapes may vary


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, as ``torch.nn.functional.linear``, with gradients of every order.

    Under vmap, without gradients, the examples of all passes that share W are rows of one product.

    Args:
        x: ``[..., in]``.
        weight: ``[out, in]``, in any order in memory.
        bias: ``[out]``, or None.

    Returns:
        ``[..., out]``.

    Example:
        >>> import torch
        >>> from vardrop.products import linear
        >>> x, weight = torch.randn(1000, 70), torch.randn(80, 70, requires_grad=True)
        >>> torch.allclose(linear(x, weight), x @ weight.t(), atol=1e-4)
        True
    """
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return F.linear(x, weight, bias)
    if not torch.is_grad_enabled():
        passes = _passes(x, weight, bias)
        if passes is None:
            return product(x, weight, bias)
        return functorch._add_batch_dim(product(passes, weight, bias), 0, functorch.maybe_get_level(x))
    if not _is_faster(x, weight, bias):
        return F.linear(x, weight, bias)
    y: Tensor = _Linear.apply(x, weight, bias)
    return y


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same where nothing is to be differentiated.

    Example:
        >>> import torch
        >>> from vardrop.products import product
        >>> product(torch.ones(2, 3), torch.ones(1, 3))
        tensor([[3.],
                [3.]])
    """
    if not torch.is_grad_enabled() and _is_faster(x, weight, bias):
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return found
    return F.linear(x, weight, bias)


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.save_for_forward(x, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        times = linear if graph_wanted() else product
        rows, grad = x.reshape(-1, x.shape[-1]), gradients[0].reshape(-1, len(weight))
        return (
            times(grad, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None,
            times(grad.t(), rows.t()) if ctx.needs_input_grad[1] else None,
            grad.sum(0) if ctx.needs_input_grad[2] else None,
        )

    @staticmethod
    def jvp(ctx: Any, *tangents: Tensor | None) -> Tensor:
        x, weight = ctx.saved_tensors
        by_x, by_weight, by_bias = tangents
        y = torch.zeros((), dtype=x.dtype) if by_x is None else F.linear(by_x, weight)
        y = y if by_weight is None else y + F.linear(x, by_weight)
        return y if by_bias is None else y + by_bias.expand(*x.shape[:-1], -1)


def _passes(x: Tensor, *shared: Tensor | None) -> Tensor | None:
    """All passes of x, with their axis in front; None if x has none, or if not one vmap alone is going on."""
    if not isinstance(x, Tensor) or not functorch.is_batchedtensor(x):
        return None
    if not x.ndim or functorch.maybe_current_level() != 1:
        return None
    if not all(_is_plain(operand) for operand in shared if operand is not None):
        return None
    return functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), 0)


def _is_faster(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether oneDNN can multiply these, and does it faster: on a processor where this was seen."""
    return (
        all(_is_plain(operand) for operand in (x, weight, bias) if operand is not None)
        and _fit(x, weight, bias)  # or oneDNN ends the process, where torch has words
        and x.numel() * len(weight) >= _WORTH
        and _is_known()
        and torch.backends.mkldnn.is_available()
        and torch._C._get_mkldnn_enabled()
        and torch._C._len_torch_dispatch_stack() == 0  # who counts or fakes operations may not know this one
        and not torch.is_autocast_enabled("cpu")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


@functools.cache
def _is_known() -> bool:
    """Whether this is a processor on which oneDNN was seen to be faster: AMD's, with AVX-512."""
    try:
        maker = Path("/proc/cpuinfo").read_text()  # Linux
    except OSError:
        maker = platform.processor()
    return "AuthenticAMD" in maker and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _fit(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether these are the shapes of a linear layer."""
    return weight.ndim == 2 and x.shape[-1:] == weight.shape[1:] and (bias is None or bias.shape == weight.shape[:1])


def _is_plain(x: Tensor) -> bool:
    """Whether x is float32 in the CPU's memory, and of no special class, compiler or transform."""
    return (
        type(x) in (Tensor, nn.Parameter)
        and x.dtype == torch.float32
        and x.device.type == "cpu"
        and x.layout == torch.strided
        and not functorch.is_functorch_wrapped_tensor(x)
    )
