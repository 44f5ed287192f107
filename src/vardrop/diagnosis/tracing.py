"""Which noise reaches which BatchNorm, from one pass: every torch function and every layer is a node of a graph.

Nothing is parsed and nothing symbolic runs, so control flow, dictionaries and other people's containers are no
obstacle. What happens inside of a module without children is one node.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from vardrop.prediction.structure import named

_DROPOUTS = (
    F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout,
    torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout,
)  # fmt: skip
_ATTENTIONS = (F.scaled_dot_product_attention, F.multi_head_attention_forward)
_RANDOM = (
    torch.rand, torch.rand_like, torch.randn, torch.randn_like, torch.randint, torch.bernoulli, torch.normal,
    Tensor.bernoulli, Tensor.bernoulli_, Tensor.uniform_, Tensor.normal_, Tensor.new_empty,
)  # fmt: skip


@dataclass
class Node:
    """One call.

    Attributes:
        name: of the module, or of the function.
        owner: the innermost module whose code it belongs to, dotted.
        parents: the nodes whose results went in.
        module: the module if it is a call of one without children.
        rate: of the dropout that a function carries out.
        active: whether that dropout has its own flag on.
        shape: of the first tensor that went in.
        correlation: of neighbouring units of that tensor, where it goes into a dropout and has two or more dimensions
            of space.
    """

    name: str
    owner: str
    parents: tuple[int, ...]
    module: nn.Module | None = None
    rate: float | None = None
    active: bool = False
    shape: tuple[int, ...] = ()
    correlation: float | None = None


@dataclass
class Trace:
    """The nodes of a pass in the order in which they ended.

    Attributes:
        nodes: all of them.
        calls: modules without children -> their nodes; others that were asked for -> nodes of what goes into them.
        noises: dropout functions that ran, also inside of modules: owner, function, rate, and whether it was on.
        outputs: the nodes that gave the main tensor of the model's output.
    """

    nodes: list[Node] = field(default_factory=list)
    calls: dict[nn.Module, list[int]] = field(default_factory=dict)
    noises: list[tuple[str, str, float, bool]] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)

    def upstream(self, node: int) -> set[int]:
        """The nodes that something of a node depends on."""
        seen: set[int] = set()
        todo = list(self.nodes[node].parents)
        while todo:
            this = todo.pop()
            if this not in seen:
                seen.add(this)
                todo += self.nodes[this].parents
        return seen

    def noise_upstream(self, node: int, sources: dict[str, str]) -> list[str]:
        """The sources of noise that reach a node, in the order in which they run.

        Args:
            node: where they arrive.
            sources: name of the module -> kind of its noise.
        """
        found = (self.source(this, sources) for this in sorted(self.upstream(node)))
        return list(dict.fromkeys(name for name in found if name is not None))

    def source(self, node: int, sources: dict[str, str]) -> str | None:
        """The source of noise that a node is, if it is one."""
        this = self.nodes[node]
        if this.owner not in sources:
            return None
        random = this.module is not None or bool(this.rate) or this.name in _RANDOM_NAMES
        return this.owner if random or sources[this.owner] == "random weight" else None


class _Recorder(TorchFunctionMode):
    def __init__(self, trace: Trace) -> None:
        super().__init__()
        self.trace = trace
        self.made_by = WeakIdKeyDictionary()
        self.owners: list[str] = [""]
        self.leaves = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if len(self.owners) == 1:  # not inside of the model
            return func(*args, **kwargs)
        rate, active = _noise_of(func, args, kwargs)
        if rate:
            name = getattr(func, "__name__", str(func))
            self.trace.noises.append((self.owners[-1], name, rate, active))
        if self.leaves:
            return func(*args, **kwargs)
        into = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        node = self._node(getattr(func, "__name__", str(func)), into, drops=bool(rate))
        node.rate, node.active = rate, active
        out = func(*args, **kwargs)
        self._made(node, out)
        return out

    def _node(self, name: str, into: list[Tensor], drops: bool) -> Node:
        parents = dict.fromkeys(self.made_by[x] for x in into if x in self.made_by)
        node = Node(name, self.owners[-1], tuple(parents))
        if into:
            node.shape = tuple(into[0].shape)
            node.correlation = neighbours(into[0]) if drops else None
        return node

    def _made(self, node: Node, out: Any) -> int | None:
        tensors = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not tensors:
            return None
        self.trace.nodes.append(node)
        index = len(self.trace.nodes) - 1
        for x in tensors:
            self.made_by[x] = index
        return index

    def enter(self, name: str, module: nn.Module, args: Any, kwargs: Any, leaf: bool, asked: bool) -> Node | None:
        self.owners.append(name)
        if not leaf and not asked:
            return None
        into = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        if not leaf:
            self.trace.nodes.append(self._node(type(module).__name__, into, drops=False))
            self.trace.calls.setdefault(module, []).append(len(self.trace.nodes) - 1)
            return None
        node = self._node(type(module).__name__, into, drops="drop" in type(module).__name__.lower())
        node.module = module
        self.leaves += 1
        return node

    def leave(self, module: nn.Module, node: Node | None, out: Any) -> None:
        self.owners.pop()
        if node is None:
            return
        self.leaves -= 1
        index = self._made(node, out)
        if index is not None:
            self.trace.calls.setdefault(module, []).append(index)


_RANDOM_NAMES = {function.__name__ for function in _RANDOM}


@contextmanager
def tracing(model: nn.Module, asked: Container[nn.Module] = ()) -> Iterator[Trace]:
    """Record the pass that is made inside the block.

    Args:
        model: whose modules are told apart.
        asked: modules whose inputs are wanted even if they have children.
    """
    trace = Trace()
    recorder = _Recorder(trace)
    open_calls: list[Node | None] = []
    handles = []
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        leaf = not any(True for _ in module.children())

        def before(m: nn.Module, args: Any, kwargs: Any, name: str = name, leaf: bool = leaf) -> None:
            open_calls.append(recorder.enter(name, m, args, kwargs, leaf, m in asked))

        def after(m: nn.Module, args: Any, out: Any) -> None:
            if open_calls:
                recorder.leave(m, open_calls.pop(), out)
                if m is model:
                    trace.outputs = [recorder.made_by[x] for x in _main(out) if x in recorder.made_by]

        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(after))
    try:
        with recorder:
            yield trace
    finally:
        for handle in handles:
            handle.remove()


def neighbours(x: Tensor) -> float | None:
    """Correlation of units that lie beside each other in a map ``[N, channels, height, width]``, or in a volume.

    Channels are centred, and count by their variance. None where there is no map, or too little of one.

    Args:
        x: what may be a feature map.

    Example:
        >>> import torch
        >>> from vardrop.diagnosis.tracing import neighbours
        >>> noise = torch.randn(8, 2, 16, 16, generator=torch.Generator().manual_seed(0))
        >>> smooth = torch.nn.functional.avg_pool2d(noise, 4, stride=1)  # 3/4 of a window is its neighbour's too
        >>> abs(neighbours(noise)) < 0.1, abs(neighbours(smooth) - 0.75) < 0.1
        (True, True)
    """
    space = x.shape[2:]
    if x.ndim not in (4, 5) or min(space) < 2 or not x.is_floating_point() or x.numel() < _FEW:
        return None
    x = x.detach().float()
    x = x - x.mean((0, *range(2, x.ndim)), keepdim=True)
    products, squares = 0.0, 0.0
    for axis in range(2, x.ndim):
        one, other = x.narrow(axis, 0, x.shape[axis] - 1), x.narrow(axis, 1, x.shape[axis] - 1)
        products += float((one * other).sum())
        squares += 0.5 * float(one.square().sum() + other.square().sum())
    return products / squares if squares > 0 else None


_FEW = 512  # units of which a correlation says little


def _noise_of(func: Any, args: Any, kwargs: Any) -> tuple[float | None, bool]:
    """The rate of a function that drops, and whether it is on."""
    if func in _DROPOUTS:
        p = kwargs.get("p", args[1] if len(args) > 1 else 0.0)
        flag = kwargs.get("training", kwargs.get("train", args[2] if len(args) > 2 else True))
        return float(p), bool(flag)
    if func is F.scaled_dot_product_attention:
        return float(args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)), True
    if func is F.multi_head_attention_forward:
        p = kwargs.get("dropout_p", args[10] if len(args) > 10 else 0.0)
        return float(p), bool(kwargs.get("training", True))
    return None, False


def _main(output: Any) -> list[Tensor]:
    """The tensor that a model's answer is, if that is known."""
    try:
        name, found = named(output, None)
    except ValueError:
        return []
    return [found[name]]
