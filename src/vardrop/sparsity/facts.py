"""The facts of a graph while it is read, and the rules that many operations share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from vardrop.sparsity.channels import Blocks, Channels, Each, Parts, Rule
from vardrop.sparsity.stream import Own


class Unknown(Exception):  # noqa: N818 - it never leaves this package
    """Why an operation couples all of its channels, in words."""


def name_of(node: fx.Node) -> str:
    """The operation of a function or method node."""
    return node.target if isinstance(node.target, str) else getattr(node.target, "__name__", str(node.target))


_SAME_MEMORY = set("view view_as reshape flatten unflatten permute transpose t squeeze unsqueeze".split())
_SAME_MEMORY |= {"contiguous", "getitem", "chunk", "detach"}


def _aliases(node: Any) -> list[fx.Node]:
    """A node and those that it may be a view of."""
    found = []
    while isinstance(node, fx.Node):
        found.append(node)
        if node.op not in ("call_function", "call_method") or name_of(node) not in _SAME_MEMORY:
            break
        node = node.args[0] if node.args else None
    return found


class Facts:
    """What is known of the channels of the tensors of a graph so far.

    Args:
        modules: of the network, by path.
        fixed: path -> reason, for modules that must stay as they are.
    """

    def __init__(self, modules: dict[str, nn.Module], fixed: dict[str, str]) -> None:
        self.modules, self.fixed = modules, fixed
        self.facts: dict[fx.Node, Channels] = {}
        self.flattens: list[fx.Node] = []  # whose sizes are numbers in the code
        self.chunked: dict[fx.Node, tuple[Channels, int]] = {}  # calls of chunk: of what, and how many
        self.attended: dict[fx.Node, Any] = {}  # calls of attention, and what their rules need
        self.own: dict[fx.Node, Own] = {}  # parameters and buffers that are joined with tensors

    def channels(self, node: Any, dim: int) -> Channels:
        """The facts of a tensor along an axis; nothing is known of one that is met first."""
        if node not in self.facts:
            self.facts[node] = Channels.variable(node, dim)
            self.facts[node].pin("comes from outside, or from an operation that is not known")
        if self.facts[node].dim != dim:
            raise Unknown(f"works along axis {dim}, where the channels do not lie")
        return self.facts[node]

    def take_own(self, node: fx.Node, back: int, size: int) -> None:
        """Learn of a parameter or buffer that nothing else reads, if it has the channels at an axis from the end."""
        path, _, name = str(node.target).rpartition(".")
        if node.op != "get_attr" or len(node.users) > 1 or path in self.fixed:
            return
        if sum(other.op == "get_attr" and other.target == node.target for other in node.graph.nodes) > 1:
            return
        tensor = getattr(self.modules[path], name)
        if tensor.is_floating_point() and tensor.ndim >= -back and tensor.shape[back] == size:
            axis = tensor.ndim + back
            self.own[node] = Own(node, axis, tensor, axis)
            self.facts[node] = self.own[node].out

    def _counted(self, node: fx.Node, back: int) -> Channels:
        """The facts of the input along an axis counted from the end."""
        source: Any = node.args[0]
        return self.channels(source, len(source.meta["shape"]) - back)

    def _check_in_place(self, node: fx.Node, in_place: bool) -> None:
        changed = _aliases(node.args[0]) if in_place and node.args else []
        if all(len(alias.users) == 1 for alias in changed):
            return
        reason = "changes in place what is used elsewhere too"
        for alias in changed:
            if alias in self.facts:  # who reads it later does not find what was known of it
                known = self.facts[alias]
                known.pin(reason)
                self.facts[alias] = Channels.variable(alias, known.dim)
                self.facts[alias].pin(reason)
        raise Unknown(reason)

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

    def _gate(self, node: fx.Node, source: Any, dim: int) -> Rule:
        """One half of the channels times the sigmoid of the other."""
        axes = len(source.meta["shape"])
        channels = self.channels(source, dim % axes)
        (value, gate), (still, gate_still) = (x.view(2, -1) for x in (channels.value, channels.constant))
        constant = (still & gate_still) | (still & (value == 0))
        return Parts(node, channels, channels.dim, 2, (0, 1), constant, value * gate.sigmoid())

    def _average(self, node: fx.Node, source: Any, padding: Any, counted: bool) -> Rule:
        rule = self._each(node, source, lambda value: value)
        if rule.out is not None and counted and is_padded(padding):
            rule.out.constant &= rule.out.value == 0
        return rule

    def _pad(self, node: fx.Node, sizes: Any, edge: float | None) -> Rule:
        """More positions, of a value or (None) of those that there are."""
        source: Any = node.args[0]
        if not isinstance(sizes, list | tuple) or not all(isinstance(size, int) for size in sizes):
            raise Unknown("pads by a size that is computed")
        if source in self.facts and len(sizes) // 2 >= len(source.meta["shape"]) - self.facts[source].dim:
            raise Unknown("works along the channels")
        rule = self._each(node, source, lambda value: value)
        if rule.out is not None and edge is not None:
            rule.out.constant &= rule.out.value == edge
        return rule

    def _flatten(self, node: fx.Node, source: Any) -> Rule:
        return Blocks(node, [self.channels(source, 1)], 1, math.prod(source.meta["shape"][2:]))


def is_padded(padding: Any) -> bool:
    """Whether there is padding, as torch spells it."""
    return padding == "same" or (any(padding) if isinstance(padding, list | tuple) else padding not in (0, "valid"))
