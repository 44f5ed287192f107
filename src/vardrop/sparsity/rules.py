"""Operations of a traced graph, by what they do to channels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from vardrop.layers.base import Drop
from vardrop.sparsity.channels import Blocks, Channels, Each, Mix, Rule

_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
_CONVS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_TRANSPOSED: dict[type[nn.Module], int] = {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_SAME = (  # the value of a constant stays what it is
    nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout,
    nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d,
    nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d, nn.Upsample,
)  # fmt: skip
_AVERAGES = (nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d)
_ACTIVATIONS = (
    nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.CELU, nn.SELU, nn.GELU, nn.SiLU, nn.Mish, nn.Softplus, nn.Softsign,
    nn.Tanh, nn.Tanhshrink, nn.Sigmoid, nn.LogSigmoid, nn.Hardtanh, nn.Hardsigmoid, nn.Hardswish, nn.Hardshrink,
    nn.Softshrink, nn.Threshold,
)  # fmt: skip
_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

# Functions and methods by name, for torch.relu, F.relu and x.relu() are one.
_SAME_NAMES = set("dropout contiguous detach clone max_pool1d max_pool2d max_pool3d interpolate".split())
_SAME_NAMES |= {f"adaptive_{kind}_pool{n}d" for kind in ("avg", "max") for n in (1, 2, 3)}
_ELEMENTWISE = set(
    "relu relu6 leaky_relu elu celu selu gelu silu mish softplus softsign tanh sigmoid logsigmoid hardtanh hardsigmoid "
    "hardswish relu_ tanh_ sigmoid_ abs neg exp sqrt square sin cos clamp clip pow".split()
)
_JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "add": operator.add, "iadd": operator.add, "add_": operator.add, "sub": operator.sub, "isub": operator.sub,
    "mul": operator.mul, "imul": operator.mul, "mul_": operator.mul, "truediv": operator.truediv,
    "div": operator.truediv, "maximum": torch.maximum, "minimum": torch.minimum,
}  # fmt: skip
_IN_PLACE = {"iadd", "isub", "imul", "add_", "mul_", "relu_", "tanh_", "sigmoid_"}


class Unknown(Exception):  # noqa: N818 - it never leaves this package
    """Why an operation couples all of its channels, in words."""


def name_of(node: fx.Node) -> str:
    """The operation of a function or method node."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


class Reader:
    """Makes the rule of every node of a graph, in order.

    Args:
        graph: a traced module's, with ``meta["shape"]`` for the tensors.
        modules: by path.
        fixed: path -> reason, for modules that must stay as they are.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module], fixed: dict[str, str]) -> None:
        self.modules, self.fixed = modules, fixed
        self.facts: dict[fx.Node, Channels] = {}
        self.rules: list[Rule] = []
        self.flattens: list[fx.Node] = []  # whose sizes are numbers in the code
        for node in graph.nodes:
            self._read(node)

    def channels(self, node: Any, dim: int) -> Channels:
        """The facts of a tensor along an axis; nothing is known of one that is met first."""
        if node not in self.facts:
            self.facts[node] = Channels.variable(node, dim)
            self.facts[node].pin("comes from outside, or from an operation that is not known")
        if self.facts[node].dim != dim:
            raise Unknown(f"works along axis {dim}, where the channels do not lie")
        return self.facts[node]

    def _read(self, node: fx.Node) -> None:
        if node.op in ("placeholder", "get_attr"):
            return
        try:
            rule = self._rule(node)
        except Unknown as reason:
            what = "they are outputs of the network" if node.op == "output" else f"{self._shown(node)} {reason}"
            rule = Rule(node, [self.facts[each] for each in node.all_input_nodes if each in self.facts], what)
        self.rules.append(rule)
        if rule.out is not None:
            self.facts[node] = rule.out

    def _shown(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{node.target} ({type(self.modules[str(node.target)]).__name__})"
        return f"{name_of(node)}()"

    def _rule(self, node: fx.Node) -> Rule:
        if node.op == "output":
            raise Unknown("")
        if node.op == "call_module":
            return self._module(node, self.modules[str(node.target)])
        return self._function(node)

    # ------------------------------------------------------------------------------------------------------ modules

    def _module(self, node: fx.Node, module: Any) -> Rule:
        kind, source = type(module), node.args[0] if node.args else None
        if str(node.target) in self.fixed:
            raise Unknown(self.fixed[str(node.target)])
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
        if isinstance(module, _NORMS):
            raise Unknown("takes mean and variance over channels, to which constant ones count too")
        raise Unknown("is not known here")

    def _along(self, source: Any, dim: int) -> Any:
        self.channels(source, dim)
        return source

    def _counted(self, node: fx.Node, back: int) -> Channels:
        """The facts of the input along an axis counted from the end."""
        source: Any = node.args[0]
        return self.channels(source, len(source.meta["shape"]) - back)

    def _check_in_place(self, node: fx.Node, in_place: bool) -> None:
        first = node.args[0]
        if in_place and isinstance(first, fx.Node) and len(first.users) > 1:
            raise Unknown("changes in place what is used elsewhere too")

    def _check_positions(self, node: fx.Node, name: str) -> None:
        """Pooling acts on the last axes: refuse it where these are the channels."""
        source: Any = node.args[0]
        if source in self.facts and ("pool" in name.lower() or name in ("Upsample", "interpolate")):
            axes = len(source.meta["shape"])
            first = axes - int(name[-2]) if name[-2].isdigit() else 2
            if self.facts[source].dim >= first:
                raise Unknown("works along the channels")

    def _each(self, node: fx.Node, source: Any, function: Callable[[Tensor], Tensor], dim: int | None = None) -> Rule:
        """One tensor in, its channels stay apart and constant."""
        if source not in self.facts:
            return Rule(node, [])
        channels = self.facts[source]
        with torch.no_grad():
            value = function(channels.value.clone())
        dim = channels.dim if dim is None else dim
        if node.meta["shape"][dim] != channels.size:
            raise Unknown("works along the channels")
        constant = channels.constant & value.isfinite()
        return Each(node, [channels], dim, constant, torch.where(constant, value, 0.0))

    def _average(self, node: fx.Node, source: Any, padding: Any, counted: bool) -> Rule:
        rule = self._each(node, source, lambda value: value)
        if rule.out is not None and counted and _any(padding):
            rule.out.constant &= rule.out.value == 0
        return rule

    def _linear(self, node: fx.Node, module: Any) -> Rule:
        weight = module.weight.detach().double().cpu()
        source = self._counted(node, 1)
        return Mix(node, source, len(node.meta["shape"]) - 1, weight != 0, weight, _bias(module), torch.tensor([True]))

    def _conv(self, node: fx.Node, module: Any, spatial: int) -> Rule:
        weight = module.weight.detach().double().cpu().flatten(2)
        source = self._counted(node, 1 + spatial)
        padded = _any(module.padding) and module.padding_mode == "zeros" and module.padding != "valid"
        exact = source.value == 0 if padded else torch.tensor([True])
        used, gain = (weight != 0).any(2), weight.sum(2)
        if module.groups == 1:
            return Mix(node, source, source.dim, used, gain, _bias(module), exact)
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
        source = self.channels(node.args[0], 1)
        if module.running_mean is None or module.running_var is None:
            raise Unknown("has no running statistics, and so takes those of the batch")
        mean, variance = (x.detach().double().cpu() for x in (module.running_mean, module.running_var))
        scale, shift = torch.ones_like(mean), torch.zeros_like(mean)
        if module.affine:
            scale, shift = (x.detach().double().cpu() for x in (module.weight, module.bias))
        constant = source.constant | (scale == 0)
        value = (source.value - mean) / (variance + module.eps).sqrt() * scale + shift
        return Each(node, [source], 1, constant, torch.where(constant, value, 0.0))

    def _flatten(self, node: fx.Node, source: Any) -> Rule:
        return Blocks(node, [self.channels(source, 1)], 1, math.prod(source.meta["shape"][2:]))

    # ---------------------------------------------------------------------------------------------------- functions

    def _function(self, node: fx.Node) -> Rule:
        name, first = name_of(node), node.args[0] if node.args else None
        if name == "getattr" or name in ("size", "dim"):
            return self._size(node, name)
        if "shape" not in node.meta:
            if name == "getitem" and first not in self.facts:
                return Rule(node, [])
            raise Unknown("is not known here")
        if not node.args:
            raise Unknown("is not known here with other arguments than one tensor")
        self._check_in_place(node, name in _IN_PLACE or bool(node.kwargs.get("inplace")))
        if name in _JOINS:
            return self._join(node, _JOINS[name])
        others = [each for each in node.all_input_nodes if each is not first]
        if name in ("transpose", "permute", "unsqueeze", "getitem"):
            return self._rearrange(node, name)
        if name in ("view", "reshape", "flatten"):
            return self._view(node, name)
        if name in ("cat", "concat", "concatenate"):
            return self._cat(node)
        if others:
            raise Unknown("takes more than one tensor, in a way that is not known here")
        self._check_positions(node, name)
        if name in _SAME_NAMES and not node.kwargs.get("return_indices"):
            return self._each(node, first, lambda value: value)
        if name.startswith("avg_pool"):
            given = dict(zip(("padding", "ceil_mode", "count_include_pad"), node.args[3:], strict=False)) | node.kwargs
            return self._average(node, first, given.get("padding", 0), bool(given.get("count_include_pad", True)))
        if name in _ELEMENTWISE:
            return self._each(node, first, lambda value: _call(node, value))
        if name in ("mean", "amax"):
            return self._mean(node)
        raise Unknown("is not known here")

    def _size(self, node: fx.Node, name: str) -> Rule:
        """A size that is asked for is none of our business, unless it is that of the channels."""
        source = node.args[0]
        if not isinstance(source, fx.Node) or source not in self.facts or name == "dim":
            return Rule(node, [])
        if name == "getattr" and node.args[1] not in ("shape", "device", "dtype", "ndim"):
            raise Unknown("is not known here")
        if name == "getattr" and node.args[1] != "shape":
            return Rule(node, [])
        axes, rank = len(source.meta["shape"]), self.facts[source].dim
        asked = [node.args[1]] if len(node.args) > 1 and name == "size" else None
        if asked is None:
            asked = [user.args[1] if name_of(user) == "getitem" else None for user in node.users]
        if any(not isinstance(axis, int) or axis % axes == rank for axis in asked):
            raise Unknown("asks for the number of channels")
        return Rule(node, [])

    def _join(self, node: fx.Node, function: Callable[[Any, Any], Any]) -> Rule:
        if len(node.args) != 2 or node.kwargs:
            raise Unknown("has more than two arguments")
        tensors = [each for each in node.args if isinstance(each, fx.Node)]
        known = [each for each in tensors if each in self.facts]
        if not known:
            return Rule(node, [])
        dim, shape = self.facts[known[0]].dim, node.meta["shape"]
        shapes: list[Any] = [each.meta.get("shape", ()) for each in tensors]
        others = [x for x in node.args if not isinstance(x, fx.Node | int | float)]
        if others or any(len(each) != len(shape) or each[dim] != shape[dim] for each in shapes):
            raise Unknown("joins something else than numbers and tensors of the same channels")
        inputs = [self.channels(each, dim) for each in tensors]
        values = [self.facts[each].value if isinstance(each, fx.Node) else each for each in node.args]
        value = torch.as_tensor(function(*values))
        constant = torch.stack([channels.constant for channels in inputs]).all(0)
        if function is operator.mul:  # nothing times 0
            constant |= torch.stack([channels.constant & (channels.value == 0) for channels in inputs]).any(0)
        constant &= value.isfinite()
        distinct = list({id(channels): channels for channels in inputs}.values())
        return Each(node, distinct, dim, constant, torch.where(constant, value, 0.0))

    def _cat(self, node: fx.Node) -> Rule:
        tensors = node.args[0]
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", node.kwargs.get("axis", 0))
        if not isinstance(tensors, list | tuple) or not isinstance(dim, int):
            raise Unknown("is not known here")
        dim %= len(node.meta["shape"])
        known = [self.facts[each] for each in tensors if isinstance(each, fx.Node) and each in self.facts]
        if known and known[0].dim != dim:  # along positions: channel by channel
            inputs = [self.channels(each, known[0].dim) for each in tensors]
            values, constants = (torch.stack([getattr(x, name) for x in inputs]) for name in ("value", "constant"))
            constant = constants.all(0) & (values == values[0]).all(0)
            distinct = list({id(channels): channels for channels in inputs}.values())
            return Each(node, distinct, known[0].dim, constant, torch.where(constant, values[0], 0.0))
        return Blocks(node, [self.channels(each, dim) for each in tensors], dim, 1)

    def _view(self, node: fx.Node, name: str) -> Rule:
        source: Any = node.args[0]
        sizes: list[Any] = list(node.args[1:])
        if name == "flatten":
            given = dict(zip(("start_dim", "end_dim"), sizes, strict=False)) | node.kwargs
            if given.get("start_dim", 0) != 1 or given.get("end_dim", -1) != -1:
                raise Unknown("flattens other axes than those after the first")
            return self._flatten(node, source)
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = list(sizes[0])
        if len(sizes) != 2 or (isinstance(sizes[0], int) and sizes[0] != -1) or not isinstance(sizes[1], int):
            raise Unknown("rearranges the channels")
        shape: tuple[int, ...] = source.meta["shape"] if isinstance(source, fx.Node) and "shape" in source.meta else ()
        if len(shape) < 2 or node.meta["shape"] != (shape[0], math.prod(shape[1:])):
            raise Unknown("rearranges the channels")
        rule = self._flatten(node, source)
        if sizes[1] != -1:
            self.flattens.append(node)
        return rule

    def _rearrange(self, node: fx.Node, name: str) -> Rule:
        """Axes in another order, or more of them, of size 1."""
        source: Any = node.args[0]
        given: list[Any] = list(node.args[1:])
        if source not in self.facts:
            return Rule(node, [])
        order: list[Any] = list(range(len(source.meta["shape"])))
        if node.kwargs:
            raise Unknown("is not known here")
        if name == "transpose":
            first, second = (axis % len(order) for axis in given)
            order[first], order[second] = order[second], order[first]
        elif name == "permute":
            axes: Any = given[0] if isinstance(given[0], list | tuple) else given
            order = [axis % len(order) for axis in axes]
        elif name == "unsqueeze":
            order.insert(given[0] % (len(order) + 1), None)
        else:
            index: Any = given[0] if isinstance(given[0], tuple) else (given[0],)
            if any(each is not None and each != slice(None) for each in index):
                raise Unknown("takes a part of the tensor")
            rest = iter(order)
            order = [None if each is None else next(rest) for each in index] + list(rest)
        return self._each(node, source, lambda value: value, order.index(self.facts[source].dim))

    def _mean(self, node: fx.Node) -> Rule:
        """Over positions."""
        source = node.args[0]
        given: dict[str, Any] = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
        dims = given.get("dim")
        dims = [dims] if isinstance(dims, int) else dims
        if not isinstance(source, fx.Node) or source not in self.facts:
            return Rule(node, [])
        if not isinstance(dims, list | tuple):
            raise Unknown("takes all axes together")
        axes, rank = len(source.meta["shape"]), self.facts[source].dim
        gone = {axis % axes for axis in dims}
        if rank in gone:
            raise Unknown("is taken over the channels")
        after = rank if given.get("keepdim") else rank - sum(axis < rank for axis in gone)
        return self._each(node, source, lambda value: value, after)


def _any(padding: Any) -> bool:
    return padding == "same" or (any(padding) if isinstance(padding, list | tuple) else padding not in (0, "valid"))


def _bias(module: Any) -> Tensor:
    outputs = getattr(module, "out_features", None) or module.out_channels
    return torch.zeros(outputs, dtype=torch.float64) if module.bias is None else module.bias.detach().double().cpu()


def _apply(module: nn.Module, value: Tensor) -> Tensor:
    parameter = next(module.parameters(), None)
    if parameter is not None:  # PReLU with one slope for all
        return F.prelu(value, parameter.detach().double().cpu())
    return module(value)


def _call(node: fx.Node, value: Tensor) -> Tensor:
    arguments = (value, *node.args[1:])
    if node.op == "call_method":
        return getattr(value, str(node.target))(*node.args[1:], **node.kwargs)
    return node.target(*arguments, **node.kwargs)  # type: ignore[operator]
