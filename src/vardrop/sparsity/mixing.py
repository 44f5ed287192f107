"""What attention mixes: values by the softmax of scores, fused or head by head."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

_VECTOR = 16  # numbers that AVX-512 takes at once
_FUSED_FROM = 64  # keys, from which the fused kernel is the faster one anyway
_WIDEST = 32  # channels of a head
_FEWEST = 64  # examples, below which calls cost more than they save


def mix(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0) -> Tensor:
    r"""Attention of every head (Vaswani et al. 2017, equation 1), the outputs of an example's heads side by side.

    .. math:: \text{softmax}(q k^\top / \sqrt d + \text{mask})\, v

    Torch's fused kernel takes the exponentials one by one where the number of keys is no multiple of a vector: 28 keys
    take 2.2 times as long as 32. For short sequences a product of all examples for every head is faster then.

    Args:
        q: ``[batch, heads, queries, d]``.
        k: ``[batch, heads, keys, d]``.
        v: ``[batch, heads, keys, d]``.
        mask: what is added to the scores, ``[batch, heads, queries, keys]`` or less.
        dropout: rate of the scores' softmax.

    Returns:
        ``[batch, queries, heads * d]``.

    Example:
        >>> import torch
        >>> from vardrop.sparsity.mixing import mix
        >>> q, k, v = torch.randn(3, 5, 2, 7, 4)
        >>> mix(q, k, v).shape
        torch.Size([5, 7, 8])
    """
    if mask is None and dropout == 0 and _is_faster_by_head(q, k, v):
        return torch.cat([_head(*parts) for parts in zip(q.unbind(1), k.unbind(1), v.unbind(1), strict=True)], -1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout).transpose(1, 2).flatten(2)


def _is_faster_by_head(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Where it was measured to be so; not in graphs that are kept for other sizes, nor where gradients are wanted."""
    if torch.compiler.is_compiling() or torch._C._get_tracing_state() is not None:
        return False
    if torch.is_grad_enabled() or torch._C._functorch.peek_interpreter_stack() is not None:
        return False
    if any(type(tensor) is not Tensor or tensor.dtype != torch.float32 or not tensor.is_cpu for tensor in (q, k, v)):
        return False
    keys, width = k.shape[-2:]
    short = _VECTOR < keys < _FUSED_FROM and keys % _VECTOR >= _VECTOR // 2
    return short and width <= _WIDEST and len(q) >= _FEWEST and torch.backends.cpu.get_cpu_capability() == "AVX512"


def _head(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=q.shape[-1] ** -0.5)
    return torch.bmm(scores.softmax(-1), v)
