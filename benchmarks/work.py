"""How much of a network's work is left in a smaller one: of its products, and of everything else that it computes."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution"}
PASSES = 5
FEW = 32  # examples to count numbers for: attention is torch's own for both networks then


class Operations(NamedTuple):
    """What the operations of forward passes do.

    Attributes:
        products: the part of their time that goes into matrix products and convolutions.
        written: numbers that all others write.
    """

    products: float
    written: int


class _Watch(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seconds = {True: 0.0, False: 0.0}  # of products, and of others
        self.written = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        start = time.perf_counter()
        out = func(*args, **(kwargs or {}))
        is_product = func._schema.name.partition("::")[2] in _PRODUCTS
        self.seconds[is_product] += time.perf_counter() - start
        returned = func._schema.returns
        alias = returned[0].alias_info if returned else None
        is_view = alias is not None and not alias.is_write
        first = out[0] if isinstance(out, list | tuple) and out else out
        if not is_view and not is_product and isinstance(first, Tensor):
            self.written += first.numel()
        return out


def operations(net: nn.Module, x: Tensor) -> Operations:
    """Watch a network in evaluation, with its fused layers and its attention in their parts."""
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
            net(x)
            with _Watch() as watch:
                for _ in range(PASSES):
                    net(x)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return Operations(watch.seconds[True] / sum(watch.seconds.values()), watch.written // PASSES)


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
    products = operations(dense, x).products
    before, after = (operations(net, x[:FEW]).written for net in (dense, small))
    return products * multiply_adds + (1 - products) * after / before
