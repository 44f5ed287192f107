"""Transformer layers with fewer hidden units."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.sparsity.rebuild import Kept


def feed_forward(layer: Any, name: str, changed: dict[str, tuple[str, str]], kept: Kept, fixed: dict[int, str]) -> None:
    """Hidden units of the two linear layers of a transformer layer, with the activation between them."""
    first, second = layer.linear1, layer.linear2
    if any(type(x) is not nn.Linear or id(x) in fixed for x in (first, second)) or id(layer) in fixed:
        return
    activation: Callable[[Tensor], Tensor] = layer.activation
    with torch.no_grad():
        bias = torch.zeros(first.out_features).to(first.weight) if first.bias is None else first.bias.detach()
        value = activation(bias).double().cpu()
    constant = (first.weight.detach() == 0).all(1).cpu() & value.isfinite()
    weight = second.weight.detach().double().cpu()
    keep = ~constant & (weight != 0).any(0)
    if keep.all():
        return
    if not keep.any():
        keep[0] = True
    before = first.out_features
    folded = weight[:, constant & ~keep] @ value[constant & ~keep]
    rows = keep.nonzero().flatten().to(first.weight.device)
    with torch.no_grad():
        first.weight = nn.Parameter(first.weight[rows].clone(), first.weight.requires_grad)
        if first.bias is not None:
            first.bias = nn.Parameter(first.bias[rows].clone(), first.bias.requires_grad)
        second.weight = nn.Parameter(second.weight[:, rows].clone(), second.weight.requires_grad)
        if second.bias is not None:
            second.bias = nn.Parameter(second.bias + folded.to(second.bias), second.bias.requires_grad)
        elif folded.any():
            second.bias = nn.Parameter(folded.to(second.weight))
    first.out_features = second.in_features = len(rows)
    inside = keep.nonzero().flatten()
    kept[f"{name}.linear1".lstrip(".")] = inside, torch.arange(first.in_features)
    kept[f"{name}.linear2".lstrip(".")] = torch.arange(second.out_features), inside
    changed[f"{name}.linear1".lstrip(".")] = (f"{before} hidden units", f"{len(rows)} hidden units")
