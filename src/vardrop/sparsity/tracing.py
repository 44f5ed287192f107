"""Networks as graphs: which parts can be traced, what they are called with, what must stay as it is."""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.utils import parametrize

from vardrop.sparsity.attention import CompactAttention
from vardrop.sparsity.norms import CompactGroupNorm, CompactLayerNorm
from vardrop.sparsity.rebuild import Select

Inputs = tuple[Any, ...]
_LEAVES = (CompactAttention, CompactLayerNorm, CompactGroupNorm, Select)


def fixed_modules(model: nn.Module) -> dict[int, str]:
    """Modules that must stay as they are, by identity, and why."""
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    reasons: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            shared = [each for each in owners.get(id(parameter), []) if each != name]
            if shared:
                reasons[id(module)] = f"shares a parameter with {', '.join(shared)}"
        if module._forward_hooks or module._forward_pre_hooks:
            reasons[id(module)] = "has hooks, which may depend on its size"
        if parametrize.is_parametrized(module):
            reasons[id(module)] = "is parametrised"
    return reasons


class Tracer(fx.Tracer):
    """Modules of torch are leaves, and so are ours, and those that cannot be traced."""

    proxy_buffer_attributes = True

    def __init__(self, opaque: set[int]) -> None:
        super().__init__()
        self.opaque = opaque

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        ours = type(m).__module__.startswith("vardrop.layers") or isinstance(m, _LEAVES)
        return ours or id(m) in self.opaque or super().is_leaf_module(m, module_qualified_name)


def traced(module: nn.Module, opaque: set[int]) -> fx.Graph | None:
    """The graph of a module, or None if its code cannot be traced; with its options at their defaults, if need be."""
    return _trace(module, opaque, {}) or _trace(module, opaque, _options(module))


def _trace(module: nn.Module, opaque: set[int], concrete: dict[str, Any]) -> fx.Graph | None:
    try:
        with _as_before(module):
            return Tracer(opaque).trace(module, concrete)
    except Exception:  # code of any kind ran with symbols for tensors
        return None


@contextlib.contextmanager
def _as_before(module: nn.Module) -> Iterator[None]:
    """Undo what code notes in its modules while it is traced, for these are symbols, in caches too."""
    attributes = [(vars(each), dict(vars(each))) for each in module.modules()]
    caches = [
        (value, copy.copy(value))
        for _, before in attributes
        for name, value in before.items()
        if not name.startswith("_") and type(value) in (dict, list, set)
    ]
    try:
        yield
    finally:
        for now, before in attributes:
            constants = {name: value for name, value in now.items() if name.startswith("_tensor_constant")}
            now.clear()
            now.update(before | constants)  # those the graph reads
        for cache, content in caches:
            cache.clear()
            cache.extend(content) if isinstance(cache, list) else cache.update(content)


def _options(module: nn.Module) -> dict[str, Any]:
    """The arguments of a module that are switches and numbers, with their defaults."""
    given = inspect.signature(module.forward).parameters
    kinds = (bool, int, float, str, type(None))
    return {name: each.default for name, each in given.items() if isinstance(each.default, kinds)}


def portable(module: nn.Module, graph: fx.Graph) -> fx.GraphModule:
    """A graph as a module, without our tracer, so that it pickles for all."""
    fresh = fx.Graph()
    fresh.output(fresh.graph_copy(graph, {}))
    for node in fresh.nodes:
        node.type = None  # annotations that are strings do not pickle
    return fx.GraphModule(module, fresh, type(module).__name__)


def arguments(model: nn.Module, inputs: Inputs, parts: list[nn.Module]) -> dict[int, list[Inputs]]:
    """What each part is called with when the model runs."""
    calls: dict[int, list[Inputs]] = {id(part): [] for part in parts}

    def note(module: nn.Module, args: Inputs, kwargs: dict[str, Any]) -> None:
        calls[id(module)].append(args if not kwargs else ())

    handles = [part.register_forward_pre_hook(note, with_kwargs=True) for part in parts]
    try:
        with torch.no_grad():
            model(*inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


class Shapes(fx.Interpreter):
    """Runs a graph and notes the shapes of its tensors."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        n.meta.pop("shape", None)
        if isinstance(result, Tensor):
            n.meta["shape"] = tuple(result.shape)
        return result


def unused(graph: fx.Graph, modules: dict[str, nn.Module]) -> list[str]:
    """Modules with parameters that the graph has nothing of."""
    used = {str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")}
    used |= {target.rpartition(".")[0] for target in used}
    called = {id(modules[path]) for path in used if path in modules}
    return [
        path
        for path, module in modules.items()
        if any(p is not None for p in module._parameters.values())
        and id(module) not in called
        and not any(path.startswith(f"{each}.") for each in used if each)
    ]


def fixed_paths(graph: fx.Graph, modules: dict[str, nn.Module], fixed: dict[int, str]) -> dict[str, str]:
    """Path -> reason for modules whose weights must stay: called twice, or read by something else than their call."""
    calls: dict[int, int] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            module = modules[str(node.target)]
            calls[id(module)] = calls.get(id(module), 0) + 1
    reasons = {}
    for path, module in modules.items():
        if id(module) in fixed:
            reasons[path] = fixed[id(module)]
        elif calls.get(id(module), 0) > 1 and next(module.parameters(), None) is not None:
            reasons[path] = "is called more than once"
    for node in graph.nodes:
        if node.op == "get_attr":
            owner = str(node.target).rpartition(".")[0]
            if owner in modules and (
                id(modules[owner]) in calls or type(modules[owner]).__module__.startswith("torch.")
            ):
                reasons[owner] = "has a parameter that is read elsewhere"
    return reasons
