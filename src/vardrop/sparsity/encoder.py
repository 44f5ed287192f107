"""Transformer encoders written out, so that their code can be traced and their width can differ from layer to layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from vardrop.sparsity.attention import CompactAttention
from vardrop.sparsity.rebuild import replace


class EncoderLayer(nn.Module):
    """What ``nn.TransformerEncoderLayer`` computes, without conditions on the data and without its fused path.

    Args:
        layer: whose modules it uses, under the same names.
    """

    self_attn: nn.Module
    linear1: nn.Module
    linear2: nn.Module
    norm1: nn.Module
    norm2: nn.Module
    dropout: nn.Module
    dropout1: nn.Module
    dropout2: nn.Module
    activation: Callable[[Tensor], Tensor]

    def __init__(self, layer: nn.TransformerEncoderLayer) -> None:
        super().__init__()
        for name, module in layer.named_children():
            self.add_module(name, module)
        if not isinstance(layer.activation, nn.Module):
            self.activation = layer.activation
        self.norm_first = layer.norm_first
        self.train(layer.training)

    def forward(
        self,
        src: Tensor,
        src_mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> Tensor:
        """As of ``nn.TransformerEncoderLayer``; that a mask is causal is a hint that is not used."""
        x, masks = src, (src_mask, src_key_padding_mask)
        if self.norm_first:
            x = x + self._attend(self.norm1(x), *masks)
            return x + self._feed(self.norm2(x))
        x = self.norm1(x + self._attend(x, *masks))
        return self.norm2(x + self._feed(x))

    def _attend(self, x: Tensor, mask: Tensor | None, padding: Tensor | None) -> Tensor:
        out = self.self_attn(x, x, x, attn_mask=mask, key_padding_mask=padding, need_weights=False)[0]
        return self.dropout1(out)

    def _feed(self, x: Tensor) -> Tensor:
        return self.dropout2(self.linear2(self.dropout(self.activation(self.linear1(x)))))


class Encoder(nn.Module):
    """What ``nn.TransformerEncoder`` computes.

    Args:
        encoder: whose modules it uses, under the same names.
    """

    def __init__(self, encoder: nn.TransformerEncoder) -> None:
        super().__init__()
        self.layers, self.norm = encoder.layers, encoder.norm
        self.train(encoder.training)

    def forward(
        self,
        src: Tensor,
        mask: Tensor | None = None,
        src_key_padding_mask: Tensor | None = None,
        is_causal: bool | None = None,
    ) -> Tensor:
        """As of ``nn.TransformerEncoder``; that a mask is causal is a hint that is not used."""
        for layer in self.layers:
            src = layer(src, src_mask=mask, src_key_padding_mask=src_key_padding_mask)
        return src if self.norm is None else self.norm(src)


Written = dict[int, tuple[nn.Module, nn.Module]]
_WRITTEN_OUT: dict[type[nn.Module], Any] = {nn.TransformerEncoderLayer: EncoderLayer, nn.TransformerEncoder: Encoder}


def write_out(model: nn.Module, fixed: dict[int, str]) -> tuple[nn.Module, Written]:
    """A model with our encoders in the place of torch's, and both by the identity of ours."""
    written: Written = {}
    for module in reversed(list(model.modules())):  # children come before their parents
        if type(module) not in _WRITTEN_OUT or id(module) in fixed:
            continue
        layers = module.layers if isinstance(module, nn.TransformerEncoder) else []
        if any(type(layer) is not EncoderLayer for layer in layers):  # they may want other arguments
            continue
        ours = _WRITTEN_OUT[type(module)](module)
        written[id(ours)] = ours, module
        replace(model, module, ours)
        model = ours if model is module else model
    return model, written


def put_back(model: nn.Module, written: Written) -> nn.Module:
    """Torch's encoders again where nothing but heads and hidden units went."""
    for module in reversed(list(model.modules())):
        if id(module) not in written or not _fits(module):
            continue
        _, old = written[id(module)]
        for name, child in module.named_children():
            setattr(old, name, child)
        replace(model, module, old)
        model = old if model is module else model
    return model


def _fits(module: Any) -> bool:
    """Whether torch's code can run what is inside of ours."""
    if isinstance(module, Encoder):
        layers = all(type(layer) is nn.TransformerEncoderLayer for layer in module.layers)
        return layers and (module.norm is None or isinstance(module.norm, nn.LayerNorm | nn.RMSNorm))
    width = module.self_attn.embed_dim
    attention = module.self_attn
    if isinstance(attention, CompactAttention):
        whole = {*attention.in_features, attention.out_proj.out_features} == {width}
    else:
        whole = type(attention) is nn.MultiheadAttention
    linear = isinstance(module.linear1, nn.Linear) and isinstance(module.linear2, nn.Linear)
    norms = all(isinstance(each, nn.LayerNorm) and each.normalized_shape == (width,) for each in _norms(module))
    return whole and linear and norms and module.linear1.in_features == module.linear2.out_features == width


def _norms(layer: Any) -> tuple[nn.Module, nn.Module]:
    return layer.norm1, layer.norm2
