"""How many passes at once: as many as keep the activations in a cache, within the memory that is allowed."""

from __future__ import annotations

import math
import weakref
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# One noisy tensor of a chunk should be no larger. A processor's caches hold a few of them; beyond, a chunk is slower
# than its passes one by one. An accelerator wants work in large pieces.
_CACHE = 4 << 20
_ACCELERATOR = 256 << 20
_GROWTH = 8  # times the inputs, that tensors inside of a model are taken for until they have been seen
_TOO_MANY = 4  # times the passes that fit: they are given up
_ROOM = 0.9  # of the memory that is allowed, for what grows a little faster than the passes


def is_batched(x: Any) -> bool:
    """Whether x differs from pass to pass, inside of vmap."""
    return isinstance(x, Tensor) and torch._C._functorch.is_batchedtensor(x)


def for_cache(largest: int, device: torch.device) -> int:
    """Passes at once by the size of the tensors alone, never by the clock: a seed has one answer.

    Args:
        largest: bytes of one pass of the largest noisy tensor.
        device: where they are made.
    """
    room = _CACHE if device.type == "cpu" else _ACCELERATOR
    return max(1, room // max(1, largest))


def at_first(inputs: list[Tensor]) -> int:
    """Passes at once by the inputs alone: for a small batch a pass to find out would cost a third of all others."""
    size = sum(tensor.numel() * tensor.itemsize for tensor in inputs)
    return for_cache(_GROWTH * size, inputs[0].device) if size else 1


def too_many(count: int, largest: int, device: torch.device) -> bool:
    """Whether so many passes are far more than fit, so that it is worth to begin again; arguments of for_cache."""
    return count > _TOO_MANY * for_cache(largest, device)


def for_memory(allowed: int, held: int, needed: int, count: int) -> int:
    """Passes at once so that their tensors fit.

    Args:
        allowed: bytes, for all there is beside the results.
        held: bytes that stay whatever the chunk.
        needed: the most bytes at one time, ``held`` among them, of a chunk ...
        count: ... of so many passes.
    """
    each = (needed - held) / count  # and so what does not grow with the passes counts as if it did
    return max(1, math.floor(_ROOM * (allowed - held) / each)) if each > 0 else count * 64


def even(left: int, size: int) -> int:
    """The size of the next chunk so that the chunks of what is left are equal, and at most ``size``."""
    return math.ceil(left / math.ceil(left / size))


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside of it held at one time.

    Args:
        before: bytes that count too, from before.

    Attributes:
        now: bytes held.
        most: at one time.
        most_since: the same since the last :meth:`mark`.
    """

    def __init__(self, before: int = 0) -> None:
        super().__init__()
        self.now = self.most = self.most_since = before
        self._known: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {leaf.untyped_storage()._cdata for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if not isinstance(leaf, Tensor):
                continue
            storage = leaf.untyped_storage()
            if storage._cdata not in given and storage not in self._known:
                self._known.add(storage)
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, storage.nbytes())
        self.most, self.most_since = max(self.most, self.now), max(self.most_since, self.now)
        return out

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would load its compiler, for seconds, only to keep it away from here

    def mark(self) -> None:
        """From here on counts ``most_since``."""
        self.most_since = self.now

    def _freed(self, size: int) -> None:
        self.now -= size
