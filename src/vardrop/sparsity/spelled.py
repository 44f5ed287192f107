"""Layers of other libraries that call a function of torch on weights of their own, with torch's module inside.

A class that inherits from a layer of torch and writes its ``forward`` anew (a batch norm with an activation, a layer
norm over the channels of an image) computes what torch's module does, and something around it. Written so, it can be
treated like any network.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from vardrop.sparsity.rebuild import replace, selecting
from vardrop.sparsity.tracing import portable, traced

Spelled = dict[str, nn.Module]  # path -> the layer that was there
_INSIDE = "of_torch"  # the name of torch's module in what is written out
_NORM = {"eps": 1e-5}
_CONV = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
# torch's module: its function, the function's arguments behind the input, those that are settings of the module
_CALLS: dict[type[nn.Module], tuple[Any, tuple[str, ...], dict[str, Any]]] = {
    nn.Linear: (F.linear, ("weight", "bias"), {}),
    nn.Conv1d: (F.conv1d, ("weight", "bias", *_CONV), _CONV),
    nn.Conv2d: (F.conv2d, ("weight", "bias", *_CONV), _CONV),
    nn.Conv3d: (F.conv3d, ("weight", "bias", *_CONV), _CONV),
    nn.LayerNorm: (F.layer_norm, ("normalized_shape", "weight", "bias", "eps"), _NORM),
    nn.GroupNorm: (F.group_norm, ("num_groups", "weight", "bias", "eps"), _NORM),
    nn.RMSNorm: (F.rms_norm, ("normalized_shape", "weight", "eps"), {"eps": None}),
}
_RUNNING = ("running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
_CALLS |= dict.fromkeys((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d), (F.batch_norm, _RUNNING, _NORM))
_TENSORS = ("weight", "bias", "running_mean", "running_var")
_SIZES = (
    "num_features", "normalized_shape", "num_channels", "in_features", "out_features", "in_channels", "out_channels",
    "groups",
)  # fmt: skip


def spell_out(model: nn.Module, fixed: dict[int, str]) -> tuple[nn.Module, Spelled]:
    """A model in which torch's modules are in the place of functions that such layers call."""
    spelled: Spelled = {}
    for path, module in reversed(list(model.named_modules())):  # children come before their parents
        kind = next((each for each in type(module).__mro__ if each in _CALLS), None)
        if kind is None or type(module) is kind or id(module) in fixed:
            continue
        ours = _written(module, kind)
        if ours is not None:
            spelled[path] = module
            replace(model, module, ours)
            model = ours if model is module else model
    return model, spelled


def spell_back(model: nn.Module, spelled: Spelled) -> tuple[nn.Module, dict[str, str]]:
    """The layers' own classes again, where torch's module is one still; and path of a module -> of its layer."""
    names = {}
    for path, old in spelled.items():
        module = model.get_submodule(path)
        whole = not hasattr(module, _INSIDE)  # there was nothing but torch's module
        names[f"{path}.{_INSIDE}".strip(".")] = path
        index, plain = selecting(getattr(module, _INSIDE, module))
        if not isinstance(old, type(plain)) or not (whole or index is None) or not _takes_over(old, plain):
            continue
        for name, child in () if whole else module.named_children():
            if name != _INSIDE:
                setattr(old, name, child)
        here = plain if whole else module
        replace(model, here, old)
        model = old if model is here else model
    return model, names


def _takes_over(old: Any, plain: nn.Module) -> bool:
    """Give a layer the tensors and the sizes of torch's module; whether its code computes the same with them."""
    if type(plain) not in _CALLS:
        return False
    settings = _CALLS[type(plain)][2]
    for name in (*_TENSORS, *_SIZES, *settings):
        if hasattr(old, name):
            setattr(old, name, getattr(plain, name))
    again = _written(old, type(plain))
    inside = getattr(again, _INSIDE, again)
    return again is not None and all(getattr(inside, name) == getattr(plain, name) for name in settings)


def _written(module: nn.Module, kind: type[nn.Module]) -> nn.Module | None:
    """A layer with torch's module in it, or that alone if there is nothing else; None if it does something else."""
    function, names, settings = _CALLS[kind]
    graph = traced(module, set())
    if graph is None:
        return None
    _drop_checks(graph)
    calls = [node for node in graph.nodes if node.op == "call_function" and node.target is function]
    own = {node for node in graph.nodes if node.op == "get_attr"}
    if len(calls) != 1 or any(set(node.users) != set(calls) for node in own):
        return None
    (call,) = calls
    given = dict(zip(("input", *names), call.args, strict=False)) | call.kwargs
    source = given.pop("input", None)
    if not isinstance(source, fx.Node) or source in own or not _is_plain(module, kind, given):
        return None
    plain = _plain(module, kind, {name: given.get(name, default) for name, default in settings.items()})
    if all(node.op in ("placeholder", "output") or node is call or node in own for node in graph.nodes):
        return plain
    module.add_module(_INSIDE, plain)
    with graph.inserting_before(call):
        call.replace_all_uses_with(graph.call_module(_INSIDE, (source,)))
    graph.erase_node(call)
    for node in own:
        graph.erase_node(node)
    written = portable(module, graph)
    del module._modules[_INSIDE]
    return written.train(module.training)


def _drop_checks(graph: fx.Graph) -> None:
    """Erase assertions, and what only they look at."""
    dead = [node for node in graph.nodes if node.target is torch._assert]
    while dead:
        node = dead.pop()
        if not node.users and node.op in ("call_function", "call_method"):
            inputs = node.all_input_nodes
            graph.erase_node(node)
            dead += inputs


def _is_plain(module: Any, kind: type[nn.Module], given: dict[str, Any]) -> bool:
    """Whether the function gets the layer's tensors by their names, and its sizes."""
    for name in _TENSORS:
        value, tensor = given.get(name), getattr(module, name, None)
        if isinstance(value, fx.Node) != (tensor is not None) or (value is not None and str(value.target) != name):
            return False
    sizes = {name: given[name] for name in ("normalized_shape", "num_groups") if name in given}
    if any(value != getattr(module, name) for name, value in sizes.items()):
        return False
    others = {name: value for name, value in given.items() if name not in _TENSORS}
    return not given.get("training") and not any(isinstance(value, fx.Node) for value in others.values())


def _plain(module: nn.Module, kind: type[nn.Module], settings: dict[str, Any]) -> nn.Module:
    """Torch's module with the same tensors."""
    plain: Any = kind.__new__(kind)
    nn.Module.__init__(plain)
    plain.__dict__ |= {name: value for name, value in vars(module).items() if not name.startswith("_")} | settings
    plain._parameters, plain._buffers = dict(module._parameters), dict(module._buffers)
    if "padding" in settings:  # what the function does at the border
        plain.padding_mode = "zeros"
    return plain
