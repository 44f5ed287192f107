"""What every layer weighs, before and after: weights, multiply-adds, bytes in each format."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vardrop.pruning.network_file import tensor_bytes
from vardrop.sparsity.compact import plain_copy


def layer_rows(
    network: nn.Module, small: nn.Module, x: Tensor, csr: Any, compressed: dict[str, int] | None
) -> list[Any]:
    """A row for every layer with weights.

    Args:
        network: the sparse one, whose layers have the names.
        small: the compact one.
        x: some examples, ``[N, ...]``.
        csr: a safetensors file of ``network`` with compressed sparse rows.
        compressed: bytes of the tensors of ``network`` in the compressed file, by name, if there is one.

    Returns:
        For every layer its ``name`` and ``kind``; ``weights``, and ``removed`` of them; ``parameters`` (with biases)
        and ``multiply_adds`` for one example, each before and after compaction; and ``bytes`` of the sparse layer:
        ``float32``, ``csr`` and ``compressed``.
    """
    dense = plain_copy(network)
    stored = tensor_bytes(csr)
    work, less = _multiply_adds(dense, x), _multiply_adds(small, x)
    after = dict(small.named_modules())
    rows = []
    for name, module in dense.named_modules():
        weight = getattr(module, "weight", None)
        if not isinstance(weight, nn.Parameter) or weight.ndim < 2:
            continue
        numbers = sum(p.numel() for p in module.parameters())
        rows.append(
            {
                "name": name,
                "kind": _kind(module),
                "compact": _kind(after[name]),
                "weights": weight.numel(),
                "removed": int((weight == 0).sum()),
                "parameters": [numbers, sum(p.numel() for p in after[name].parameters())],
                "multiply_adds": [work[name], less[name]],
                "bytes": {
                    "float32": 4 * numbers,
                    "csr": _of(name, stored),
                    "compressed": None if compressed is None else _of(name, compressed),
                },
            }
        )
    return rows


def _of(name: str, sizes: dict[str, int]) -> int:
    return sum(size for tensor, size in sizes.items() if tensor.startswith(f"{name}."))


def _kind(module: nn.Module) -> str:
    """A layer in words: its class and its sizes."""
    if isinstance(module, nn.Sequential):  # a selection of inputs in front of a layer
        return f"{len(module[0].index)} inputs, {_kind(module[1])}"  # type: ignore[arg-type]
    if isinstance(module, nn.Linear):
        return f"Linear {module.in_features} → {module.out_features}"
    if isinstance(module, nn.Conv2d):
        size = " × ".join(map(str, module.kernel_size))
        return f"Conv {size}, {module.in_channels} → {module.out_channels}"
    return type(module).__name__


def _multiply_adds(model: nn.Module, x: Tensor) -> dict[str, int]:
    """For one example, by the name of the module, with everything inside of it."""
    from torch.utils.flop_counter import FlopCounterMode  # here, for it is slow to import

    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    root = type(model).__name__
    found = {name.removeprefix(f"{root}."): sum(c.values()) for name, c in counter.get_flop_counts().items()}
    return {name: found.get(name, 0) // (2 * len(x)) for name, _ in model.named_modules()}
