"""Channels last: the order in memory in which a processor's convolutions and pooling are fastest."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vardrop.sparsity.facts import name_of
from vardrop.sparsity.same import tensors
from vardrop.sparsity.tracing import Inputs, traced

_ASKS = set("view view_as as_strided stride is_contiguous data_ptr storage untyped_storage storage_offset".split())


def channels_last(model: nn.Module, inputs: Inputs) -> str | None:
    """Put the kernels of two-dimensional convolutions into that order, in place, and with them what they compute.

    Args:
        model: in evaluation.
        inputs: positional arguments.

    Returns:
        Why it was not done, in words; an empty string if there is nothing to do; None if it was done.
    """
    convolutions = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.ConvTranspose2d)]
    if not convolutions:
        return ""
    if any(module.weight.device.type != "cpu" for module in convolutions):
        return "it is faster on processors only"
    graph = traced(model, set())
    if graph is None:
        return "its code cannot be traced by torch.fx, and may depend on the order in memory"
    for node in graph.nodes:
        if node.op in ("call_method", "call_function") and name_of(node) in _ASKS:
            return f"its code calls {name_of(node)}(), which depends on the order in memory"
        leaf: Any = model.get_submodule(str(node.target)) if node.op == "call_module" else None
        if leaf is not None and not type(leaf).__module__.startswith(("torch.", "vardrop.")):
            return f"the code of {node.target} ({type(leaf).__name__}) may depend on the order in memory"
    with torch.no_grad():
        if any(output.ndim == 4 for output in tensors(model(*inputs))):
            return "its outputs are maps, and what reads them may depend on the order in memory"
    for module in convolutions:  # not the model, which may have tensors of five axes too
        module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return None
