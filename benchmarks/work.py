"""How much of a network's work is left in a smaller one: of its products, and of everything else that it computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = set(
    "mm addmm bmm baddbmm linear _addmm_activation convolution mkldnn_convolution _slow_conv2d_forward".split()
)
PASSES = 5


class _Written(TorchDispatchMode):
    """Counts the numbers that operations other than products write."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        is_view = alias is not None and not alias.is_write
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not is_view and isinstance(first, Tensor) and func._schema.name.partition("::")[2] not in _PRODUCTS:
            self.count += first.numel()
        return out


def written(net: nn.Module, x: Tensor) -> int:
    """Numbers that a network writes in evaluation, but those of products and convolutions."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), _Written() as counter:
            net(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.count


def share_of_products(net: nn.Module, x: Tensor) -> float:
    """The part of the time of a forward pass that goes into products and convolutions."""
    with torch.inference_mode():
        net(x)
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            for _ in range(PASSES):
                net(x)
    every = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
    return sum(time for key, time in every.items() if key.partition("::")[2] in _PRODUCTS) / sum(every.values())


def left(dense: nn.Module, small: nn.Module, x: Tensor, multiply_adds: float) -> float:
    """The share of the work that is left: of multiply-adds in products, of the numbers that are written in the rest.

    Each is weighted by the time that the dense network spends on it, so that this is what its time would fall to if
    every operation took time in proportion to its own work. Multiply-adds alone miss pooling, norms, activations and
    softmax, whose work falls with the width, where that of a product falls with its square.

    Args:
        dense: the network before.
        small: and after.
        x: a batch.
        multiply_adds: the share of them that is left.
    """
    products = share_of_products(dense, x)
    return products * multiply_adds + (1 - products) * written(small, x) / written(dense, x)
