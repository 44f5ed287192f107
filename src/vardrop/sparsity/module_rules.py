"""Modules, by what they do to channels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from vardrop.layers.base import Drop
from vardrop.sparsity.attention import CompactAttention, all_parts
from vardrop.sparsity.channels import Channels, Convolve, Each, Mix, Rule
from vardrop.sparsity.facts import Facts, Unknown, is_padded, name_of
from vardrop.sparsity.stream import Norm, Own

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: dict[type[nn.Module], int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_SAME = (  # the value of a constant stays what it is
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
)  # fmt: skip
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_PADS = (
    nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d, nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d, nn.ReflectionPad1d,
    nn.ReflectionPad2d, nn.ReflectionPad3d, nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d,
    nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d,
)  # fmt: skip
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink,
    nn.Softshrink, nn.Threshold,
)  # fmt: skip
_INSTANCE_NORMS: dict[type[nn.Module], int] = {nn.InstanceNorm1d: 1, nn.InstanceNorm2d: 2, nn.InstanceNorm3d: 3}


class ModuleRules(Facts):
    """The rules of ``call_module`` nodes."""

    def _module(self, node: fx.Node, module: Any) -> Rule:
        kind, source = type(module), node.args[0] if node.args else None
        if str(node.target) in self.fixed:
            raise Unknown(self.fixed[str(node.target)])
        if kind in (nn.MultiheadAttention, CompactAttention):
            return self._attention(node, module)
        if len(node.args) != 1 or node.kwargs or not isinstance(source, fx.Node) or "shape" not in source.meta:
            raise Unknown("is not known here with other arguments than one tensor")
        if kind is nn.Linear:
            return self._linear(node, module)
        if kind in _CONVS:
            return self._conv(node, module, _CONVS[kind])
        if kind in _TRANSPOSED:
            return self._transposed(node, module, _TRANSPOSED[kind])
        if kind in _BATCH_NORMS:
            return self._batch_norm(node, module)
        if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            return self._flatten(node, source)
        if isinstance(module, Drop) and not list(module.children()) and not module.training:
            return self._each(node, source, lambda value: value)
        if kind in _SAME and not getattr(module, "return_indices", False):
            self._check_positions(node, kind.__name__)
            return self._each(node, source, lambda value: value)
        if kind in _ACTIVATIONS or (kind is nn.PReLU and module.num_parameters == 1):
            self._check_in_place(node, getattr(module, "inplace", False))
            return self._each(node, source, lambda value: _apply(module, value))
        if kind is nn.PReLU:
            slope = module.weight.detach().double().cpu()
            return self._each(node, self._along(source, 1), lambda value: torch.where(value > 0, value, slope * value))
        if kind in _AVERAGES:
            self._check_positions(node, kind.__name__)
            return self._average(node, source, module.padding, module.count_include_pad)
        if kind is nn.GLU:
            return self._gate(node, source, module.dim)
        if kind in _PADS:
            return self._pad(node, module.padding, getattr(module, "value", None))
        if kind in (nn.LayerNorm, nn.RMSNorm):
            return self._layer_norm(node, module)
        if kind is nn.GroupNorm:
            return Norm(node, self.channels(source, 1), 1, module)
        if kind in _INSTANCE_NORMS:
            return self._instance_norm(node, module, _INSTANCE_NORMS[kind])
        if kind is nn.Embedding and module.max_norm is None:
            return Own(node, len(node.meta["shape"]) - 1, module.weight, 1)
        raise Unknown("is not known here")

    def _along(self, source: Any, dim: int) -> Any:
        self.channels(source, dim)
        return source

    def _linear(self, node: fx.Node, module: Any) -> Rule:
        weight = module.weight.detach().double().cpu()
        source = self._counted(node, 1)
        return Mix(node, source, len(node.meta["shape"]) - 1, weight != 0, weight, _bias(module), torch.tensor([True]))

    def _conv(self, node: fx.Node, module: Any, spatial: int) -> Rule:
        weight = module.weight.detach().double().cpu().flatten(2)
        source = self._counted(node, 1 + spatial)
        padded = is_padded(module.padding) and module.padding_mode == "zeros" and module.padding != "valid"
        exact = source.value == 0 if padded else torch.tensor([True])
        used, gain = (weight != 0).any(2), weight.sum(2)
        if module.groups == 1:
            return Convolve(node, source, source.dim, used, gain, _bias(module), exact)
        if module.groups == module.in_channels == module.out_channels:  # depthwise
            dead = ~used[:, 0]
            constant = dead | (source.constant & exact)
            rule = Each(node, [source], source.dim, constant, _bias(module) + gain[:, 0] * source.value)
            rule.out.value = torch.where(constant, rule.out.value, 0.0)  # type: ignore[union-attr]
            return rule
        raise Unknown(f"has {module.groups} groups of several channels, which must stay of one size")

    def _transposed(self, node: fx.Node, module: Any, spatial: int) -> Rule:
        if module.groups != 1:
            raise Unknown(f"has {module.groups} groups, which must stay of one size")
        weight = module.weight.detach().double().cpu().flatten(2).transpose(0, 1)
        source = self._counted(node, 1 + spatial)
        used = (weight != 0).any(2)
        return Mix(node, source, source.dim, used, torch.zeros_like(weight[..., 0]), _bias(module), source.value == 0)

    def _batch_norm(self, node: fx.Node, module: Any) -> Rule:
        if module.running_mean is None or module.running_var is None:
            raise Unknown("has no running statistics, and so takes those of the batch")
        return self._running(node, module, self.channels(node.args[0], 1))

    def _running(self, node: fx.Node, module: Any, source: Channels) -> Rule:
        mean, variance = (x.detach().double().cpu() for x in (module.running_mean, module.running_var))
        scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        if module.affine:
            scale, shift = (x.detach().double().cpu() for x in (module.weight, module.bias))
        constant = source.constant | (scale == 0)
        value = (source.value - mean) / (variance + module.eps).sqrt() * scale + shift
        return Each(node, [source], source.dim, constant, torch.where(constant, value, 0.0))

    def _instance_norm(self, node: fx.Node, module: Any, spatial: int) -> Rule:
        """Over the positions of a channel, at which a constant is its own mean."""
        source = self._counted(node, 1 + spatial)
        if module.running_mean is not None:
            return self._running(node, module, source)
        constant, value = source.constant, torch.zeros_like(source.value)
        if module.affine:
            constant = constant | (module.weight.detach() == 0).cpu()
            value = module.bias.detach().double().cpu()
        return Each(node, [source], source.dim, constant, torch.where(constant, value, 0.0))

    def _layer_norm(self, node: fx.Node, module: Any) -> Rule:
        if len(module.normalized_shape) > 1:
            raise Unknown("takes mean and variance over positions too, with a weight for each")
        source = self._counted(node, 1)
        return Norm(node, source, source.dim, module)

    def _attention(self, node: fx.Node, module: Any) -> Rule:
        """Inputs and outputs of attention; a rule is made when its output is taken from the tuple."""
        given = dict(zip(("query", "key", "value"), node.args, strict=False)) | node.kwargs
        reason = self.fixed.get(f"{node.target}.out_proj")
        if reason:
            raise Unknown(reason)
        if any(name_of(user) != "getitem" or (user.args[1] != 0 and user.users) for user in node.users):
            raise Unknown("gives its attention weights too")
        if getattr(module, "bias_k", None) is not None or getattr(module, "add_zero_attn", False):
            raise Unknown("has keys of its own (add_bias_kv, add_zero_attn)")
        inputs = [given.get(name) for name in ("query", "key", "value")]
        if not all(isinstance(each, fx.Node) and "shape" in each.meta for each in inputs):
            raise Unknown("is not known here with other arguments than tensors")
        if any(each in self.facts for each in node.all_input_nodes if each not in inputs):
            raise Unknown("has a mask that is computed from channels")
        sources = [self.channels(each, len(each.meta["shape"]) - 1) for each in inputs]  # type: ignore[union-attr]
        self.attended[node] = sources, *all_parts(module)
        return Rule(node, [])


def _bias(module: Any) -> Tensor:
    outputs = getattr(module, "out_features", None) or module.out_channels
    return torch.zeros(outputs, dtype=torch.float64) if module.bias is None else module.bias.detach().double().cpu()


def _apply(module: nn.Module, value: Tensor) -> Tensor:
    parameter = next(module.parameters(), None)
    if parameter is not None:  # PReLU with one slope for all
        return F.prelu(value, parameter.detach().double().cpu())
    return module(value)
