"""BatchNorm in evaluation is a scale and a shift for every channel: they go into the layer in front of it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from vardrop.sparsity.channels import Each
from vardrop.sparsity.rebuild import replace, selecting
from vardrop.sparsity.rules import Reader

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def fold_batch_norms(module: nn.Module, reader: Reader) -> dict[str, str]:
    """Fold what can be folded of a traced module, in place; path -> why, of the norms that stay."""
    left = {}
    for rule in reader.rules:
        path = str(rule.node.target)
        norm: Any = module.get_submodule(path) if rule.node.op == "call_module" else None
        if type(norm) not in _BATCH_NORMS:
            continue
        reason = _fold(module, reader, rule.node.args[0], norm) if isinstance(rule, Each) else rule.why
        if reason:
            left[path] = f"is not folded: {reason}"
        else:
            replace(module, norm, nn.Identity().train(norm.training))
    return left


def _fold(module: nn.Module, reader: Reader, source: Any, norm: Any) -> str:
    """Fold a norm into the layer that it normalises; why not, if that cannot be."""
    _, layer = selecting(module.get_submodule(str(source.target)) if source.op == "call_module" else None)
    if type(layer) not in _LAYERS or (isinstance(layer, _TRANSPOSED) and layer.groups > 1):
        return "it is not behind a convolution or a linear layer"
    path = str(source.target)
    if path in reader.fixed:
        return f"{path} {reader.fixed[path]}"
    if len(source.users) > 1:
        return f"{path} is read by others too"
    if isinstance(layer, nn.Linear):
        fused: Any = fuse_linear_bn_eval(layer, norm)
    else:
        fused = fuse_conv_bn_eval(layer, norm, isinstance(layer, _TRANSPOSED))
    fused.bias.requires_grad_(layer.weight.requires_grad)
    replace(module, layer, fused)
    return ""
