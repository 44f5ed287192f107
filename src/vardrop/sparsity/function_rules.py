"""Functions and methods, by what they do to channels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from vardrop.sparsity.channels import Blocks, Each, Parts, Rule
from vardrop.sparsity.facts import Facts, Unknown, name_of
from vardrop.sparsity.stream import Attend

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
_IN_PLACE = {"iadd", "isub", "imul", "itruediv", "setitem"}


class FunctionRules(Facts):
    """The rules of ``call_function`` and ``call_method`` nodes."""

    def _function(self, node: fx.Node) -> Rule:
        name, first = name_of(node), node.args[0] if node.args else None
        if name == "getattr" or name in ("size", "dim"):
            return self._size(node, name)
        if name == "chunk":
            return self._chunk(node)
        if name == "getitem" and isinstance(first, fx.Node) and first in self.chunked:
            return self._part(node, first)
        if "shape" not in node.meta:
            if name == "getitem" and first not in self.facts:
                return Rule(node, [])
            raise Unknown("is not known here")
        if isinstance(first, fx.Node) and first in self.attended and name == "getitem" and node.args[1] == 0:
            return Attend(node, first, *self.attended[first])
        if not node.args:
            raise Unknown("is not known here with other arguments than one tensor")
        writes = name in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        self._check_in_place(node, writes or bool(node.kwargs.get("inplace")))
        if name in _JOINS:
            return self._join(node, _JOINS[name])
        others = [each for each in node.all_input_nodes if each is not first]
        if name in ("transpose", "permute", "unsqueeze", "getitem"):
            return self._rearrange(node, name)
        if name in ("view", "reshape", "flatten"):
            return self._view(node, name)
        if name in ("cat", "concat", "concatenate"):
            return self._cat(node)
        if name == "glu":
            return self._gate(node, first, _given(node, "dim").get("dim", -1))
        if name == "pad":
            given = _given(node, "pad", "mode", "value")
            edge = (given.get("value") or 0.0) if given.get("mode", "constant") == "constant" else None
            return self._pad(node, given.get("pad"), edge)
        if others:
            raise Unknown("takes more than one tensor, in a way that is not known here")
        self._check_positions(node, name)
        if name in _SAME_NAMES and not node.kwargs.get("return_indices"):
            return self._each(node, first, lambda value: value)
        if name.startswith("avg_pool"):
            given = _given(node, "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad")
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
        shape, back = node.meta["shape"], self.facts[known[0]].dim - len(known[0].meta["shape"])
        dim = len(shape) + back
        for each in tensors:
            if each not in self.facts:
                self.take_own(each, back, shape[dim])
        shapes: list[Any] = [each.meta.get("shape", ()) for each in tensors if each not in self.own]
        others = [x for x in node.args if not isinstance(x, fx.Node | int | float)]
        if others or any(len(each) < -back or each[back] != shape[dim] for each in shapes):
            raise Unknown("joins something else than numbers and tensors of the same channels")
        inputs = [
            self.facts[each] if each in self.own else self.channels(each, len(each.meta["shape"]) + back)
            for each in tensors
        ]
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
            given = _given(node, "start_dim", "end_dim")
            if given.get("start_dim", 0) != 1 or given.get("end_dim", -1) != -1:
                raise Unknown("flattens other axes than those after the first")
            return self._flatten(node, source)
        if len(sizes) == 1 and isinstance(sizes[0], list | tuple):
            sizes = list(sizes[0])
        if self._take_vector(source) and [size for size in sizes if size != 1] == [-1]:
            return self._each(node, source, lambda value: value, sizes.index(-1))
        if len(sizes) != 2 or (isinstance(sizes[0], int) and sizes[0] != -1) or not isinstance(sizes[1], int):
            raise Unknown("rearranges the channels")
        shape: tuple[int, ...] = source.meta["shape"] if isinstance(source, fx.Node) and "shape" in source.meta else ()
        if len(shape) < 2 or node.meta["shape"] != (shape[0], math.prod(shape[1:])):
            raise Unknown("rearranges the channels")
        rule = self._flatten(node, source)
        if sizes[1] != -1:
            self.flattens.append(node)
        return rule

    def _take_vector(self, source: Any) -> bool:
        """Learn of a parameter or buffer of one axis, a number for every channel; whether it is one."""
        is_vector = isinstance(source, fx.Node) and source.op == "get_attr" and len(source.meta["shape"]) == 1
        if is_vector and source not in self.facts:
            self.take_own(source, -1, source.meta["shape"][0])
        return is_vector

    def _rearrange(self, node: fx.Node, name: str) -> Rule:
        """Axes in another order, or more of them, of size 1."""
        source: Any = node.args[0]
        given: list[Any] = list(node.args[1:])
        self._take_vector(source)
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
            order = self._indexed(index, order, self.facts[source].dim)
        return self._each(node, source, lambda value: value, order.index(self.facts[source].dim))

    def _indexed(self, index: tuple[Any, ...], order: list[Any], rank: int) -> list[Any]:
        """The axes that are left of a tensor with an index: a number takes one away, None makes one."""
        rest, after = iter(order), []
        for each in index:
            axis = None if each is None else next(rest)
            if each is None or each == slice(None):
                after.append(axis)
            elif axis == rank or not isinstance(each, int | slice):
                raise Unknown("takes a part of the tensor")
            elif isinstance(each, slice):
                after.append(axis)
        return after + list(rest)

    def _chunk(self, node: fx.Node) -> Rule:
        """Into a tuple of parts; a rule is made when one is taken from it."""
        source: Any = node.args[0]
        given = _given(node, "chunks", "dim")
        parts, dim = given.get("chunks"), given.get("dim", 0)
        if source not in self.facts:
            return Rule(node, [])
        channels, axes = self.facts[source], len(source.meta["shape"])
        if any(name_of(user) != "getitem" or not isinstance(user.args[1], int) for user in node.users):
            raise Unknown("is not known here")
        if (
            not isinstance(parts, int)
            or not isinstance(dim, int)
            or (dim % axes == channels.dim and channels.size % parts)
        ):
            raise Unknown("is not known here for parts of different sizes")
        self.chunked[node] = channels, parts if dim % axes == channels.dim else 1
        return Rule(node, [])

    def _part(self, node: fx.Node, chunk: fx.Node) -> Rule:
        channels, parts = self.chunked[chunk]
        place: Any = node.args[1] if parts > 1 else 0
        constant, value = (x.view(parts, -1)[place] for x in (channels.constant, channels.value))
        return Parts(node, channels, channels.dim, parts, [place], constant, value)

    def _mean(self, node: fx.Node) -> Rule:
        """Over positions."""
        source = node.args[0]
        given = _given(node, "dim", "keepdim")
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


def _given(node: fx.Node, *names: str) -> dict[str, Any]:
    """The arguments of a call behind its first, by name."""
    return dict(zip(names, node.args[1:], strict=False)) | node.kwargs


def _call(node: fx.Node, value: Tensor) -> Tensor:
    arguments = (value, *node.args[1:])
    if node.op == "call_method":
        return getattr(value, str(node.target))(*node.args[1:], **node.kwargs)
    return node.target(*arguments, **node.kwargs)  # type: ignore[operator]
