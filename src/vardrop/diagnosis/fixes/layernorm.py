"""Normalisation by the example instead of the batch, which has no running statistics that could shift."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.diagnosis.batchnorms import batchnorms
from vardrop.diagnosis.fixes.plan import Changes, Offender, places
from vardrop.diagnosis.passes import Passes

_KINDS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_GROUPS, _CHANNELS = 32, 8  # of maps: at most so many groups, at least so many channels in each


def layernorm(model: nn.Module, found: Sequence[Offender]) -> Changes:
    """Put a ``GroupNorm`` in the place of every BatchNorm: of one group for vectors, which is LayerNorm.

    Args:
        model: is changed; :func:`fit` sets scales and offsets.
        found: is not looked at; a network is either normalised by batches or not.
    """
    changes = Changes()
    for module, name in batchnorms(model).items():
        held = list(places(model, module))
        if type(module) not in _KINDS or not held:
            changes.left[name] = f"is a {type(module).__name__}, which is left as it is"
            continue
        channels = int(module.num_features)  # type: ignore[arg-type]
        groups = 1 if isinstance(module, nn.BatchNorm1d) else groups_of(channels)
        reference = next(module.parameters(), module.running_var)
        norm = nn.GroupNorm(groups, channels, eps=float(module.eps))  # type: ignore[arg-type]
        if isinstance(reference, Tensor):
            norm = norm.to(reference.device, reference.dtype)
        for holder, child in held:
            setattr(holder, child, norm.train(module.training))
        changes.changed[name] = f"GroupNorm({groups}, {channels})"
    return changes


def groups_of(channels: int) -> int:
    """How many groups the channels of a map make: a channel by itself would lose its mean, which is what it says.

    Args:
        channels: of the map.

    Example:
        >>> from vardrop.diagnosis.fixes.layernorm import groups_of
        >>> [groups_of(channels) for channels in (3, 16, 64, 512)]
        [1, 2, 8, 32]
    """
    return math.gcd(_GROUPS, channels // _CHANNELS) if channels % _CHANNELS == 0 else 1


def fit(student: Passes, teacher: Passes, names: Sequence[str]) -> None:
    r"""Choose scales and offsets so that the new layers answer as the old ones did, by least squares, in turn.

    Each layer is fitted on what arrives once those before it are fitted, against what its BatchNorm answered in
    evaluation: :math:`\min_{\gamma, \beta} E[(\gamma z + \beta - y)^2]` for every channel.

    Args:
        student: the model with the new layers.
        teacher: the model with its BatchNorms, with statistics that fit evaluation.
        names: of the layers, in the order in which they run.
    """
    for name in names:
        norm = student.model.get_submodule(name)
        if not isinstance(norm, nn.GroupNorm):
            continue
        with torch.no_grad():
            norm.weight.fill_(1.0)
            norm.bias.zero_()
            sums = torch.zeros(5, norm.num_channels, dtype=torch.float64)
            for index in range(len(student.batches)):
                z, y = _output(student, name, index), _output(teacher, name, index)
                for a, b in zip(z, y, strict=True):
                    sums += torch.stack([x.cpu().double().sum(1) for x in (torch.ones_like(a), a, b, a * a, a * b)])
            count, sz, sy, szz, szy = sums
            if not (count > 0).all():
                continue  # it does not run
            variance = (szz / count - (sz / count).square()).clamp_min(1e-12)
            scale = (szy / count - sz * sy / count.square()) / variance
            norm.weight.copy_(scale)
            norm.bias.copy_(sy / count - scale * sz / count)


def _output(passes: Passes, name: str, index: int) -> list[Tensor]:
    """What a layer answers to one batch, ``[channels, values]`` for each call."""
    kept: list[Tensor] = []

    def after(module: nn.Module, args: Any, output: Tensor) -> None:
        kept.append(output.detach().transpose(0, 1).flatten(1).clone())

    handle = passes.model.get_submodule(name).register_forward_hook(after)
    try:
        with passes.borrowed():
            passes.run(index)
    finally:
        handle.remove()
    return kept
