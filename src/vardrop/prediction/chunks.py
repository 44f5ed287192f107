"""How many passes at once: as many as keep the activations in a cache, within the memory that is allowed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# One noisy tensor of a chunk should be no larger. A processor's caches hold a few of them; beyond, a chunk is slower
# than its passes one by one. An accelerator wants work in large pieces.
_CACHE = 4 << 20
_ACCELERATOR = 256 << 20


def is_batched(x: Any) -> bool:
    """Whether x differs from pass to pass, inside of vmap."""
    return isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x)


class Largest(TorchFunctionMode):
    """The bytes of the largest tensor of a pass that noise has reached: what a chunk multiplies."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if is_batched(out):
            self.bytes = max(self.bytes, out.numel() * out.itemsize)
        return out


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside of it held at one time."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.bytes = 0
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        before = {
            tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if isinstance(tensor, Tensor)
        }
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in before:
                storage = tensor.untyped_storage()
                if storage not in self._known:
                    self._known.add(storage)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self._freed, storage.nbytes())
        self.bytes = max(self.bytes, self.now)
        return out

    def _freed(self, size: int) -> None:
        self.now -= size


def choose(samples: int, largest: int, device: torch.device | None) -> int:
    """Passes at once: a function of sizes alone, never of the clock, so that a seed has one answer.

    Args:
        samples: all there are to make.
        largest: bytes of the largest noisy tensor of one pass.
        device: where they are made.
    """
    room = _CACHE if device is None or device.type == "cpu" else _ACCELERATOR
    return max(1, min(samples, room // max(1, largest)))
