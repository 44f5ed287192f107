"""Buffers as they were: remembered before the noise is on, and put back if anything has changed them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Kept(NamedTuple):
    """A buffer: where it is, the tensor itself, its version then, and a copy."""

    module: nn.Module
    shown: str
    key: str
    buffer: Tensor
    version: int | None
    copy: Tensor


def remember(names: Mapping[nn.Module, str]) -> list[Kept]:
    """Copies of all buffers of some modules.

    Args:
        names: the modules, and what they are called.
    """
    copies: dict[int, Tensor] = {}
    kept = []
    for module, shown in names.items():
        for key, buffer in module._buffers.items():
            if isinstance(buffer, nn.parameter.UninitializedBuffer):
                raise RuntimeError(
                    f"vardrop.stochastic: a model must know its shapes, got the lazy {shown!r}; run a forward first"
                )
            if buffer is not None:
                copy = copies.setdefault(id(buffer), buffer.detach().clone())
                kept.append(Kept(module, shown, key, buffer, _version(buffer), copy))
    return kept


def put_back(kept: Iterable[Kept]) -> list[str]:
    """Undo every change of the buffers, and say in which modules there was one.

    A buffer that has another device, type or shape now has been moved on purpose, and is left alone.

    Args:
        kept: what :func:`remember` gave.
    """
    changed: dict[str, None] = {}
    for module, shown, key, buffer, version, copy in kept:
        now = module._buffers[key] if key in module._buffers else None  # noqa: SIM401 - TorchScript's dict has no get
        if now is not None and (now.device, now.dtype, now.shape) != (buffer.device, buffer.dtype, buffer.shape):
            continue
        if (version is None or _version(buffer) != version) and not _same(buffer, copy):
            changed[shown] = None
            with torch.inference_mode(buffer.is_inference()), torch.no_grad():
                buffer.copy_(copy)
        if now is not buffer and not (isinstance(module, torch.jit.ScriptModule) and now is not None):
            changed[shown] = None  # a script hands out another object at every look
            module._buffers[key] = buffer
    return list(changed)


def _version(buffer: Tensor) -> int | None:
    """How often a tensor was written to; None where nobody counts."""
    return None if buffer.is_inference() else buffer._version


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors have the same bits."""
    if one.is_meta:
        return True
    if one.layout is not torch.strided or one.is_quantized:
        return False
    return torch.equal(one.contiguous().reshape(-1).view(torch.uint8), other.contiguous().reshape(-1).view(torch.uint8))
