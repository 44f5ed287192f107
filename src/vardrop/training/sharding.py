"""Tensors that FSDP may have sharded: their local part, and the whole."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def is_sharded(x: Tensor) -> bool:
    """Whether this is a DTensor; the class is not imported, which costs a second."""
    return type(x).__name__ == "DTensor"


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """The part of every tensor that this process holds, sharing its memory."""
    return [x.detach().to_local() if is_sharded(x) else x.detach() for x in tensors]  # type: ignore[attr-defined]


def whole(x: Tensor) -> Tensor:
    """All of a tensor; where it is sharded every process has to ask for it at the same time."""
    return x.detach().full_tensor() if is_sharded(x) else x.detach()  # type: ignore[attr-defined]


@torch.no_grad()
def assign_(target: Tensor, value: Tensor) -> None:
    """Fill a tensor, sharded or not, from the whole of another."""
    if is_sharded(target):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(target.device, target.dtype)
        value = distribute_tensor(value, target.device_mesh, target.placements)  # type: ignore[attr-defined]
    target.copy_(value)
