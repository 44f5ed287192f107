"""Rules of what residual streams run through: norms over the channels, attention, and tensors of the network's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from vardrop.half import rms_norm_eps
from vardrop.sparsity.channels import Channels, Rule


class Norm(Rule):
    """Mean and variance over the channels of a group: every output depends on all channels of its group that vary.

    A constant takes part in the statistics as a number, so it may go from the input. Outputs and inputs go
    independently of each other.

    Args:
        node: the call.
        source: facts of the input.
        dim: the axis of channels of the output.
        module: ``nn.LayerNorm``, ``nn.RMSNorm`` or ``nn.GroupNorm``.
    """

    def __init__(self, node: Node, source: Channels, dim: int, module: Any) -> None:
        super().__init__(node, [source])
        self.source = source
        groups = module.num_groups if isinstance(module, nn.GroupNorm) else 1
        self.group = torch.arange(source.size) // (source.size // groups)
        scale, shift = torch.ones_like(source.value), torch.zeros_like(source.value)
        if module.weight is not None:
            scale = module.weight.detach().double().cpu()
        if getattr(module, "bias", None) is not None:
            shift = module.bias.detach().double().cpu()
        values = source.value.view(groups, -1)
        mean = torch.zeros_like(values[:, :1]) if isinstance(module, nn.RMSNorm) else values.mean(1, keepdim=True)
        weight = next(module.parameters(), torch.empty(()))
        eps = rms_norm_eps(weight.dtype) if module.eps is None else module.eps
        centred = (values - mean) * ((values - mean).square().mean(1, keepdim=True) + eps).rsqrt()
        still = source.constant.view(groups, -1).all(1)[self.group]
        constant = still | (scale == 0)
        value = torch.where(still, centred.flatten() * scale, 0.0) + shift
        self.out: Channels = Channels(node, dim, constant, torch.where(constant, value, 0.0))

    def backward(self) -> None:
        read = self.group[self.out.needed & ~self.out.constant]
        self.source.needed |= torch.isin(self.group, read)


class Attend(Rule):
    """Attention: each output channel is a sum over those of the values, with weights that depend on queries and keys.

    Args:
        node: the output, in the graph.
        call: the call of the module, which returns a tuple.
        sources: facts of queries, keys and values, often three times the same.
        weights: of the three projections, ``[out, in]``.
        output: weight and bias of the output projection.
    """

    def __init__(
        self, node: Node, call: Node, sources: list[Channels], weights: list[Tensor], output: tuple[Tensor, Tensor]
    ) -> None:
        distinct = list({id(channels): channels for channels in sources}.values())
        super().__init__(node, distinct)
        self.call, self.sources = call, sources
        self.used = [(weight != 0).any(0).cpu() for weight in weights]
        weight, bias = output
        constant = (weight == 0).all(1)
        self.out: Channels = Channels(node, len(node.meta["shape"]) - 1, constant, torch.where(constant, bias, 0.0))

    def backward(self) -> None:
        if (self.out.needed & ~self.out.constant).any():
            for channels, used in zip(self.sources, self.used, strict=True):
                channels.needed |= used


class Own(Rule):
    """A parameter, a buffer or a table of embeddings: a channel is a constant if it is one everywhere.

    Args:
        node: the tensor, in the graph.
        dim: its axis of channels.
        table: the tensor that the values are from.
        axis: the axis of channels of that.
    """

    def __init__(self, node: Node, dim: int, table: Tensor, axis: int) -> None:
        super().__init__(node, [])
        self.axis = axis
        rows = table.detach().double().cpu().movedim(axis, -1).reshape(-1, table.shape[axis])
        constant = (rows == rows[0]).all(0)
        self.out: Channels = Channels(node, dim, constant, torch.where(constant, rows[0], 0.0))
