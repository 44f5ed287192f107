"""The smaller modules: what stays of their weights, and biases that have taken in the constants."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.sparsity.channels import Channels, Mix, Rule
from vardrop.sparsity.stream import Own

Kept = dict[str, tuple[Tensor, Tensor]]  # name of a layer -> indices of its outputs and of its inputs that stay
WORTHWHILE = 0.5  # a selection in front of a layer pays if at most so many of its inputs are used


class Select(nn.Module):
    """Some channels of a tensor: those that the layer behind has weights for.

    Args:
        index: which ones.
        dim: the axis of channels, from the end.
    """

    index: Tensor

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index)

    def forward(self, x: Tensor) -> Tensor:
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        return f"{len(self.index)} channels, dim={self.dim}"


def selecting(module: Any) -> tuple[Tensor | None, Any]:
    """Which of its inputs a layer gets, if there is a selection in front of it, and the layer."""
    if isinstance(module, nn.Sequential) and len(module) == 2 and isinstance(module[0], Select):
        return module[0].index.cpu(), module[1]
    return None, module


def smaller(module: nn.Module, rule: Rule, select: bool) -> nn.Module | None:
    """What a module becomes; None if it stays as it is."""
    if isinstance(rule, Mix):
        return _mix(module, rule, select)
    if isinstance(rule, Own):
        return _table(module, rule)
    (source,) = rule.inputs
    if source.keep.all():
        return None
    small: Any = copy.deepcopy(module)
    for name in ("weight", "bias", "running_mean", "running_var"):
        if getattr(small, name, None) is not None:
            _cut(small, name, [source.keep])
    for name in (
        "num_features",
        "num_parameters",
        "in_channels",
        "out_channels",
        "groups",
    ):  # the last three: depthwise
        if hasattr(small, name) and getattr(small, name) == source.size:
            setattr(small, name, int(source.keep.sum()))
    return small


def _table(module: nn.Module, rule: Own) -> nn.Module | None:
    """A table of embeddings with fewer columns."""
    if rule.out.keep.all():
        return None
    small: Any = copy.deepcopy(module)
    _cut(small, "weight", [torch.ones(len(small.weight), dtype=torch.bool), rule.out.keep])
    small.embedding_dim = int(rule.out.keep.sum())
    return small


def cut_own(modules: dict[str, nn.Module], target: str, rule: Own) -> None:
    """Keep some channels of a parameter or buffer, in place."""
    path, _, name = target.rpartition(".")
    if not rule.out.keep.all():
        tensor = getattr(modules[path], name)
        every = [torch.ones(size, dtype=torch.bool) for size in tensor.shape]
        every[rule.axis] = rule.out.keep
        _cut(modules[path], name, every)


def _used(rule: Mix) -> Tensor:
    """Which inputs a layer has weights for; at least one."""
    read = (rule.used[rule.out.keep] & ~rule.folds).any(0)
    used = read & rule.source.keep
    if rule.carrier is not None and (read & rule.stuck).any():
        used[rule.carrier] = rule.source.keep[rule.carrier]
    if not used.any():
        used[rule.source.keep.nonzero()[0]] = True  # one input, of weights that are zero or folded
    return used


def kept_of(rule: Mix, select: bool) -> tuple[Tensor, Tensor]:
    """Which outputs and which inputs stay of a layer, as masks."""
    used, source = _used(rule), rule.source
    selects = select and int(used.sum()) <= WORTHWHILE * int(source.keep.sum())
    return rule.out.keep, used if selects else source.keep


def note_kept(kept: Kept, name: str, outputs: Tensor, inputs: Tensor) -> None:
    """Note which outputs and inputs of a layer stay, as masks; it may have been made smaller before."""
    indices = outputs.nonzero().flatten(), inputs.nonzero().flatten()
    if name in kept:
        before = kept[name]
        indices = before[0][indices[0]], before[1][indices[1]]
    kept[name] = indices


def _mix(module: Any, rule: Mix, select: bool) -> nn.Module | None:
    source, out = rule.source, rule.out
    _, inputs = kept_of(rule, select)
    if inputs.all() and out.keep.all():
        return None
    select = not bool((inputs == source.keep).all())
    small = copy.deepcopy(module)
    transposed = isinstance(module, nn.modules.conv._ConvTransposeNd)
    _carry(small, rule, 0 if transposed else 1)
    _cut(small, "weight", [inputs, out.keep] if transposed else [out.keep, inputs])
    gone = source.constant & ~inputs
    bias = rule.folded(gone)[out.keep].to(module.weight)
    if module.bias is not None or bias.any():
        trained = module.weight.requires_grad if module.bias is None else module.bias.requires_grad
        small.bias = nn.Parameter(bias, requires_grad=trained)
    names = ("in_features", "out_features") if isinstance(module, nn.Linear) else ("in_channels", "out_channels")
    for name, which in zip(names, (inputs, out.keep), strict=True):
        setattr(small, name, int(which.sum()))
    if not select:
        return small
    back = source.dim - len(source.node.meta["shape"])
    index = inputs[source.keep].nonzero().flatten().to(module.weight.device)
    return nn.Sequential(Select(index, back), small).train(module.training)


def _carry(layer: Any, rule: Mix, axis: int) -> None:
    """Let one input have the weights of others that have gone, which are constants at the same border."""
    share = rule.carried()
    if rule.carrier is None or not share.any():
        return
    weight = layer.weight.detach()
    added = torch.tensordot(weight.double().movedim(axis, -1), share.to(weight.device), 1)
    with torch.no_grad():
        layer.weight.select(axis, rule.carrier).add_(added.to(weight.dtype))


def _cut(module: nn.Module, name: str, masks: list[Tensor]) -> None:
    """Keep some entries of a parameter or buffer along its first axes."""
    tensor: Any = getattr(module, name)
    cut = tensor.detach()
    for axis, mask in enumerate(masks):
        if axis >= cut.ndim or cut.shape[axis] == 1 != len(mask):
            break  # one weight for all channels, or the second axis of a depthwise kernel
        cut = cut.index_select(axis, mask.nonzero().flatten().to(cut.device))
    cut = cut.clone()
    setattr(module, name, nn.Parameter(cut, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else cut)


def replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put a module in the place of another, under all of its names."""
    for parent in list(model.modules()):
        for name, child in list(parent._modules.items()):
            if child is old:
                parent._modules[name] = new


def why_left(channels: Channels) -> str | None:
    """What keeps channels that could go, in a sentence; None if there are none."""
    left = int((channels.removable & channels.keep).sum())
    if not left:
        return None
    reasons = [why for why in channels.why if why]
    if not reasons and channels.keep.sum() == 1:
        return None  # the last one of a layer
    told = "; ".join(reasons) if reasons else "they go with channels that stay"
    return f"{left} of {channels.size} output channels could go, but {told}"


def why_whole(module: nn.Module, reason: str) -> str | None:
    """Why a layer stays as it is that has rows or columns of zeros, in a sentence; None if it has none."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or weight.ndim < 2:
        return None
    zeros = weight.detach() == 0
    rows, columns = zeros.flatten(1).all(1), zeros.transpose(0, 1).flatten(1).all(1)
    if not rows.any() and not columns.any():
        return None
    return (
        f"{reason}: stays whole, though {int(rows.sum())} of {len(rows)} rows and {int(columns.sum())} of "
        f"{len(columns)} columns of its weight are zeros"
    )
