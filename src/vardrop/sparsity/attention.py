"""Attention with fewer heads."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vardrop.sparsity.channels import Channels
from vardrop.sparsity.feed_forward import feed_forward
from vardrop.sparsity.mixing import mix
from vardrop.sparsity.rebuild import Kept, replace
from vardrop.sparsity.stream import Attend

Part = tuple[Tensor, Tensor | None]  # weight and bias of a projection
_LAYERS = (nn.TransformerEncoderLayer, nn.TransformerDecoderLayer)


class CompactAttention(nn.Module):
    """Multi-head attention whose heads need not fill the width of the model; what :func:`compact` puts in.

    Takes the arguments of ``nn.MultiheadAttention`` and returns its output, without the attention weights, which would
    be those of all heads.

    Args:
        attention: the module to take the weights from.
        heads: which of its heads stay.
        bias: of the output projection.
    """

    def __init__(self, attention: nn.MultiheadAttention, heads: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self.all_heads, self.heads = attention.num_heads, heads.tolist()
        self.embed_dim, self.head_dim = attention.embed_dim, attention.head_dim
        self.num_heads, self.batch_first, self.dropout = len(self.heads), attention.batch_first, attention.dropout
        self._qkv_same_embed_dim, self.in_proj_bias = False, None  # transformer layers ask, for their fused path
        rows = _entries(heads, attention.head_dim)
        parts = zip(*projections(attention), strict=True)
        self.project([(w[rows], None if b is None else b[rows]) for w, b in parts], _trainable(attention))
        self.out_proj = _linear(
            attention.out_proj.weight.detach()[:, rows], bias, attention.out_proj.weight.requires_grad
        )
        self.train(attention.training)

    in_proj: nn.Linear | nn.ModuleList
    out_proj: nn.Linear

    def project(self, parts: list[Part], trainable: list[bool]) -> None:
        """Take weight and bias of query, key and value: as one layer if they read equally many channels, else three."""
        if len({weight.shape[1] for weight, _ in parts}) > 1:
            self.in_proj = nn.ModuleList(_linear(*part, some) for part, some in zip(parts, trainable, strict=True))
            return
        biases = [weight.new_zeros(len(weight)) if bias is None else bias for weight, bias in parts]
        bias = None if all(bias is None for _, bias in parts) else torch.cat(biases)
        self.in_proj = _linear(torch.cat([weight for weight, _ in parts]), bias, any(trainable))

    def parts(self) -> list[Part]:
        """Weight and bias of query, key and value."""
        if isinstance(self.in_proj, nn.ModuleList):
            return [(layer.weight, layer.bias) for layer in self.in_proj]  # type: ignore[misc]
        shift = self.in_proj.bias
        biases: list[Tensor | None] = [None] * 3 if shift is None else list(shift.chunk(3))
        return list(zip(self.in_proj.weight.chunk(3), biases, strict=True))

    @property
    def in_features(self) -> tuple[int, ...]:
        """How many channels query, key and value have."""
        return tuple(weight.shape[1] for weight, _ in self.parts())

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        batched = query.ndim == 3
        q, k, v = self._projected(query, key, value, batched)
        mask = self._mask(attn_mask, key_padding_mask, q)
        out: Tensor = self.out_proj(mix(q, k, v, mask, self.dropout if self.training else 0.0))
        if not batched:
            return out.squeeze(0), None
        return out if self.batch_first else out.transpose(0, 1), None

    def _projected(self, query: Tensor, key: Tensor, value: Tensor, batched: bool) -> tuple[Tensor, ...]:
        """Query, key and value, each ``[batch, heads, positions, head_dim]``."""
        inputs = (query, key, value)

        def apart(x: Tensor, parts: int) -> tuple[Tensor, ...]:
            x = x.unsqueeze(0) if not batched else x if self.batch_first else x.transpose(0, 1)
            return x.unflatten(-1, (parts, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4).unbind()

        if isinstance(self.in_proj, nn.ModuleList):
            return tuple(apart(layer(x), 1)[0] for layer, x in zip(self.in_proj, inputs, strict=True))
        if query is key and query is value:  # attention to oneself: one product
            return apart(self.in_proj(query), 3)
        hooks = self.in_proj._forward_hooks or self.in_proj._forward_pre_hooks
        if type(self.in_proj) is not nn.Linear or hooks:  # whatever it has become, it is what projects
            return tuple(apart(self.in_proj(x), 3)[i] for i, x in enumerate(inputs))
        each = zip(inputs, self.parts(), strict=True)
        return tuple(apart(F.linear(x, weight, bias), 1)[0] for x, (weight, bias) in each)

    def _mask(self, attention: Tensor | None, padding: Tensor | None, q: Tensor) -> Tensor | None:
        """Both masks as one that is added to the scores, ``[batch, heads, queries, keys]`` or less."""
        mask = None
        if attention is not None:
            mask = _added(attention, q)
            if mask.ndim == 3:
                mask = mask.unflatten(0, (-1, self.all_heads))[:, self.heads]
        if padding is not None:
            padding = _added(padding, q)
            padding = padding[:, None, None, :] if padding.ndim == 2 else padding
            mask = padding if mask is None else mask + padding
        return mask

    def extra_repr(self) -> str:
        return f"heads={self.num_heads} of {self.all_heads}, head_dim={self.head_dim}"


def _linear(weight: Tensor, bias: Tensor | None, trainable: bool) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.clone(), trainable)
    if bias is not None:
        layer.bias = nn.Parameter(bias.clone(), trainable)
    return layer


def _trainable(attention: nn.MultiheadAttention | CompactAttention) -> list[bool]:
    """Whether query, key and value are trained."""
    if isinstance(attention, CompactAttention):
        return [weight.requires_grad for weight, _ in attention.parts()]
    if attention.in_proj_weight is not None:
        return [attention.in_proj_weight.requires_grad] * 3
    return [getattr(attention, f"{name}_proj_weight").requires_grad for name in "qkv"]


def _added(mask: Tensor, q: Tensor) -> Tensor:
    return q.new_zeros(mask.shape).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask.to(q)


def _entries(heads: Tensor, width: int) -> Tensor:
    """The rows of a projection that belong to some heads."""
    return (heads[:, None] * width + torch.arange(width, device=heads.device)).flatten()


def projections(attention: nn.MultiheadAttention) -> tuple[list[Tensor], list[Tensor | None]]:
    """Weights and biases of query, key and value."""
    shift = attention.in_proj_bias
    biases: list[Tensor | None] = [None] * 3 if shift is None else list(shift.detach().chunk(3))
    if attention.in_proj_weight is not None:
        return list(attention.in_proj_weight.detach().chunk(3)), biases
    return [getattr(attention, f"{name}_proj_weight").detach() for name in "qkv"], biases


def all_parts(attention: nn.MultiheadAttention | CompactAttention) -> tuple[list[Tensor], tuple[Tensor, Tensor]]:
    """Weights of query, key and value, and weight and bias of the output, in float64."""
    if isinstance(attention, CompactAttention):
        weights = [weight for weight, _ in attention.parts()]
    else:
        weights = projections(attention)[0]
    out = attention.out_proj
    bias = out.weight.new_zeros(len(out.weight)) if out.bias is None else out.bias
    first, second, *others = (tensor.detach().double().cpu() for tensor in (out.weight, bias, *weights))
    return others, (first, second)


def narrower(attention: nn.MultiheadAttention | CompactAttention, rule: Attend) -> CompactAttention | None:
    """Attention without inputs and outputs that have gone; None if all have stayed."""
    if rule.out.keep.all() and all(channels.keep.all() for channels in rule.sources):
        return None
    if isinstance(attention, CompactAttention):
        small = copy.deepcopy(attention)
    else:
        heads = torch.arange(attention.num_heads, device=attention.out_proj.weight.device)
        shift = attention.out_proj.bias
        small = CompactAttention(attention, heads, None if shift is None else shift.detach())
    parts, trainable = zip(small.parts(), rule.sources, strict=True), _trainable(small)
    with torch.no_grad():
        small.project([_reading_less(*part, channels) for part, channels in parts], trainable)
    out, rows = small.out_proj, rule.out.keep.to(small.out_proj.weight.device)
    bias = None if out.bias is None else out.bias.detach()[rows]
    small.out_proj = _linear(out.weight.detach()[rows], bias, out.weight.requires_grad)
    return small


def _reading_less(weight: Tensor, bias: Tensor | None, channels: Channels) -> Part:
    """A projection of the channels that are left, with what the constants among the others have given."""
    gone = (channels.constant & ~channels.keep).nonzero().flatten()
    shift = weight[:, gone.to(weight.device)].double() @ channels.value[gone].to(weight.device)
    if bias is not None or shift.any():
        bias = (shift if bias is None else bias.double() + shift).to(weight)
    return weight[:, channels.keep.to(weight.device)], bias


def printed(module: nn.Module) -> str:
    """A module in a line; attention without its projections."""
    if isinstance(module, CompactAttention):
        channels = f"{module.in_features[0]} -> {module.out_proj.out_features} channels"
        return f"CompactAttention({module.extra_repr()}, {channels})"
    if isinstance(module, nn.MultiheadAttention):
        return f"MultiheadAttention(heads={module.num_heads}, {module.embed_dim} channels)"
    return " ".join(str(module).split())


def compact_attention(
    model: nn.Module,
    changed: dict[str, tuple[str, str]],
    left: dict[str, str],
    kept: Kept,
    fixed: dict[int, str],
) -> None:
    """Remove dead heads and dead hidden units of transformer layers, in place."""
    for name, module in list(model.named_modules()):
        if type(module) in _LAYERS:
            feed_forward(module, name, changed, kept, fixed)
        if type(module) is nn.MultiheadAttention:
            small = _fewer_heads(module, name, left, fixed)
            if small is not None:
                replace(model, module, small)
                changed[name] = (f"{module.num_heads} heads", f"{small.num_heads} heads")
        elif type(module) is CompactAttention:
            width = module.head_dim
            dead = (module.out_proj.weight.detach() == 0).view(-1, module.num_heads, width).all(2).all(0)
            if dead.any():
                reason = "it is compact already; compact the network that it came from"
                left[name] = f"{int(dead.sum())} of {module.num_heads} heads could go, but {reason}"
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder) and any(isinstance(m, CompactAttention) for m in module.modules()):
            module.use_nested_tensor = False


def _fewer_heads(
    attention: nn.MultiheadAttention, name: str, left: dict[str, str], fixed: dict[int, str]
) -> CompactAttention | None:
    """Without the heads that nothing reads, or whose values are constants: the weights of attention sum to 1."""
    heads, width = attention.num_heads, attention.head_dim
    out = attention.out_proj
    unread = (out.weight.detach() == 0).view(out.out_features, heads, width).all(2).all(0)
    weights, biases = projections(attention)
    constant = (weights[2] == 0).all(1).view(heads, width).all(1)
    dead = unread | constant
    if not dead.any():
        return None
    reason = fixed.get(id(attention)) or fixed.get(id(out))
    if attention.bias_k is not None or attention.add_zero_attn:
        reason = "keys of its own (add_bias_kv, add_zero_attn)"
    if type(out) is not NonDynamicallyQuantizableLinear and type(out) is not nn.Linear:
        reason = f"an output projection of class {type(out).__name__}"
    if reason:
        left[name] = f"{int(dead.sum())} of {heads} heads could go, but it has {reason}".replace("it has has", "it has")
        return None
    if dead.all():
        dead[0] = False
    gone = _entries((dead & constant).nonzero().flatten(), width)
    shift = None if out.bias is None else out.bias.detach()
    if biases[2] is not None and len(gone):
        folded = out.weight.detach()[:, gone].double() @ biases[2][gone].double()
        shift = (folded if shift is None else shift.double() + folded).to(out.weight)
    return CompactAttention(attention, (~dead).nonzero().flatten(), shift)
