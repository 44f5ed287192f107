"""A physically smaller network with the same function."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from vardrop.convert import restore_
from vardrop.given import as_arguments, check_module
from vardrop.sparsity.attention import compact_attention, narrower, printed
from vardrop.sparsity.channels import Each, Mix, Rule, settle
from vardrop.sparsity.compaction import Compaction
from vardrop.sparsity.coordinates import PlainNorms
from vardrop.sparsity.encoder import put_back, write_out
from vardrop.sparsity.folding import fold_batch_norms
from vardrop.sparsity.layout import channels_last
from vardrop.sparsity.norms import smaller_norm
from vardrop.sparsity.rebuild import cut_own, kept_of, note_kept, replace, smaller, why_left, why_whole
from vardrop.sparsity.rules import Reader
from vardrop.sparsity.same import check_same, difference, multiply_adds
from vardrop.sparsity.spelled import spell_back, spell_out
from vardrop.sparsity.stream import Attend, Norm, Own
from vardrop.sparsity.tracing import (
    Inputs,
    Shapes,
    Tracer,
    arguments,
    fixed_modules,
    fixed_paths,
    portable,
    traced,
    unused,
)

INFERENCE_MULTIPLE = 4  # of channels: onnxruntime puts those of a convolution into blocks, if it can count them so


class _Wishes(NamedTuple):
    """What the user asks for, as :func:`compact` has it."""

    select_inputs: bool
    for_inference: bool
    round_to: int


def compact(
    model: nn.Module,
    example_input: Tensor | Sequence[Any],
    select_inputs: bool = True,
    for_inference: bool = False,
    round_to: int | None = None,
) -> nn.Module:
    """Take dead units out of a sparse network: a smaller, plain module with the same function in evaluation.

    Neurons, channels and attention heads go that nothing reads, or that are constants; the constants are folded into
    the biases behind them. This goes through Linear, convolutions, norms, classes that inherit from these and call
    torch's functions themselves, activations, pooling, padding, flatten, dropout, sums, equal parts and concatenation,
    attention, and residual streams, whose constants stay as numbers in the statistics of layer and group norms.
    Whatever else there is keeps all of its channels, and ``compaction.left`` of the result says what that cost. The
    outputs are compared with the model's, on the example and on random inputs, before anything is returned.

    The network is traced by ``torch.fx``. Parts whose code cannot be traced stay as they are, and what is inside of
    them is treated on its own. The model's own class is kept, unless sizes are written into its code
    (``x.view(-1, 800)``): then a ``torch.fx.GraphModule`` is returned, without the dropout of functions. Layers
    that inherit from torch's keep their class too, unless their norm has to count constants that have gone.

    Args:
        model: a module that :func:`vardrop.sparsify_` has been at, converted or restored; it is not changed.
        example_input: a tensor, or all positional arguments of the model in a tuple.
        select_inputs: whether a layer that uses at most half of its inputs may get a selection in front of it, where
            the others cannot be removed (input pixels, features of a flatten).
        for_inference: whether the network will only be evaluated, so that it may be faster still. A ``BatchNorm`` goes
            into the convolution or linear layer in front of it; the ``LayerNorm`` of a stream that got narrower is a
            plain one, of a stream in other coordinates; on a processor, convolutions of two dimensions have their
            channels last in memory, where the code does not depend on that. Outputs in evaluation are the same; but
            training would be another, channels of such a stream are mixtures of the old ones, and single zeros and
            digits of the weights around it are gone.
        round_to: dead channels stay, so that those that a convolution reads, where 16 or more are left, are a multiple
            of this; 4 if it is left out and ``for_inference``, else 1. onnxruntime takes 1.4 times as long for 49 of
            64 channels as for all of them, and 0.8 times as long for 48.

    Returns:
        A new module, in the same mode, whose ``compaction`` prints what was done.

    Raises:
        TypeError: if ``model`` is no module, or ``example_input`` neither a tensor nor a sequence.
        ValueError: if the model does not run on the example, or ``round_to`` is below 1.
        RuntimeError: if the smaller network computes something else; it is not returned then.

    Example:
        >>> import torch, vardrop as vd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> with torch.no_grad():
        ...     net[0].weight[1] = 0.0  # a constant
        ...     net[2].weight[:, 2] = 0.0  # nothing reads it
        >>> small = vd.compact(net, torch.randn(1, 4))
        >>> small
        Sequential(
          (0): Linear(in_features=4, out_features=1, bias=True)
          (1): ReLU()
          (2): Linear(in_features=1, out_features=2, bias=True)
        )
        >>> small.compaction.parameters
        (23, 9)
    """
    check_module(model, "compact")
    if round_to is None:
        round_to = INFERENCE_MULTIPLE if for_inference else 1
    if round_to < 1:
        raise ValueError(f"vardrop.compact: round_to must be 1 (channels are not rounded) or more, got {round_to}")
    wishes = _Wishes(select_inputs, for_inference, round_to)
    inputs = as_arguments(example_input, "compact")
    dense = plain_copy(model)
    try:
        with torch.no_grad():
            dense(*inputs)
    except Exception as error:
        raise ValueError(
            f"vardrop.compact: example_input must be what the model takes, got one that it fails on ({error}); several "
            "arguments go in a tuple"
        ) from error
    small = copy.deepcopy(dense)
    report = Compaction()
    reasons = fixed_modules(small)
    compact_attention(small, report.changed, report.left, report.kept, reasons)
    small, spelled = spell_out(small, reasons)
    small, written = write_out(small, reasons)
    small = put_back(_all_parts(small, inputs, report, reasons, wishes), written)
    small, names = spell_back(small, spelled)
    report.rename(names)
    if for_inference:
        _order(small, inputs, report)
    check_same(dense, small, inputs)
    report.parameters = tuple(sum(p.numel() for p in each.parameters()) for each in (dense, small))  # type: ignore[assignment]
    report.multiply_adds = multiply_adds(dense, inputs), multiply_adds(small, inputs)
    _copy_modes(model, small)
    small.compaction = report  # type: ignore[assignment]
    return small


def plain_copy(model: nn.Module) -> nn.Module:
    """A copy of a model, restored and in evaluation."""
    dense = copy.deepcopy(model)
    restore_(dense)
    return dense.eval()


def _copy_modes(model: nn.Module, small: nn.Module) -> None:
    """Training or evaluation, as the modules of the same names are."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in small.named_modules():
        while name not in modes:
            name = name.rpartition(".")[0]
        module.training = modes[name]


def _all_parts(
    model: nn.Module, inputs: Inputs, report: Compaction, fixed: dict[int, str], wishes: _Wishes
) -> nn.Module:
    """Treat the model as a whole if its code can be traced, else its largest parts that can."""
    opaque: set[int] = set()
    tracer = Tracer(set())
    for name, module in reversed(list(model.named_modules())):  # children come before their parents
        if list(module.children()) and not tracer.is_leaf_module(module, name) and traced(module, opaque) is None:
            opaque.add(id(module))
            shown = name or type(module).__name__
            report.left[shown] = "its code cannot be traced by torch.fx; only what is inside of it was treated"
    parts: list[tuple[str, nn.Module]] = []

    def collect(name: str, module: nn.Module) -> None:
        if id(module) not in opaque:
            parts.append((name, module))
            return
        for child_name, child in module.named_children():
            if list(child.children()):
                collect(f"{name}.{child_name}".lstrip("."), child)

    collect("", model)
    calls = arguments(model, inputs, [module for _, module in parts])
    for name, part in parts:
        given = calls[id(part)]
        if len(given) != 1:
            report.left[name] = f"is called {len(given)} times"
            continue
        new = compact_part(part, given[0], report, fixed, wishes, name, opaque)
        if part is model:
            return new
        if new is not part:
            replace(model, part, new)
    return model


def _smaller(module: Any, rule: Rule, select: bool, like: Tensor) -> nn.Module | None:
    """What a module becomes, with tensors like another; None if it stays as it is."""
    if isinstance(rule, Norm):
        return smaller_norm(module, rule, next(module.parameters(), like))
    if isinstance(rule, Attend):
        return narrower(module, rule)
    return smaller(module, rule, select) if isinstance(rule, Mix | Each | Own) else None


def _order(small: nn.Module, inputs: Inputs, report: Compaction) -> None:
    """The order in memory that is the fastest, if it can be had."""
    reason = channels_last(small, inputs)
    if reason is None:
        report.changed["memory"] = "channels first", "channels last"
    elif reason:
        report.left["memory"] = f"channels stay first: {reason}"


def _fold_norms(module: nn.Module, reader: Reader, report: Compaction, name: str) -> None:
    """Take norms out of a traced module, or make them plain, once its modules are smaller."""
    plain = PlainNorms(module, reader)
    plain.run()
    for path, why in (fold_batch_norms(module, reader) | plain.left).items():
        report.left[f"{name}.{path}".strip(".")] = why
    for path in plain.mixed:  # its channels are none of the old ones
        report.kept.pop(f"{name}.{path}".strip("."), None)


def compact_part(
    module: nn.Module,
    inputs: Inputs,
    report: Compaction,
    fixed: dict[int, str],
    wishes: _Wishes,
    name: str = "",
    opaque: set[int] | None = None,
) -> nn.Module:
    """Compact one module whose code can be traced, in place; a graph module if its code has sizes in it."""
    graph = traced(module, opaque or set())
    shown = name or type(module).__name__
    if graph is None:
        return module
    graph_module = fx.GraphModule(module, graph)
    try:
        with torch.no_grad():
            Shapes(graph_module).run(*inputs)
    except Exception as error:
        first_line, *_ = str(error).splitlines() or [type(error).__name__]
        report.left[shown] = f"does not run as torch.fx traced it ({first_line})"
        return module
    off, allowed = difference(module, graph_module, inputs)
    if off > allowed:
        report.left[shown] = "computes something else as torch.fx traced it: its code asks what kind of input it gets"
        return module
    modules = dict(module.named_modules(remove_duplicate=False))
    reader = Reader(graph, modules, fixed_paths(graph, modules, fixed))
    settle(reader.rules, list(reader.facts.values()), wishes.round_to)
    like = next(module.parameters(), torch.empty(()))
    before: dict[str, tuple[str, str]] = {}
    for rule in reader.rules:
        if rule.call.op != "call_module" or rule.out is None:
            continue
        path = str(rule.call.target)
        where = f"{name}.{path}".strip(".")
        old = modules[path]
        before[path] = str(old), printed(old)
        new = _smaller(old, rule, wishes.select_inputs, like)
        if new is not None:
            replace(module, old, new)
            if isinstance(rule, Mix):
                note_kept(report.kept, where, *kept_of(rule, wishes.select_inputs))
        why = why_left(rule.out) if isinstance(rule, Mix | Norm | Attend | Own) else None
        if why:
            report.left[where] = why
    for node, rule in reader.own.items():
        cut_own(modules, str(node.target), rule)
    if wishes.for_inference:
        _fold_norms(module, reader, report, name)
    for path, (old_text, old_print) in before.items():
        new = module.get_submodule(path)
        if str(new) != old_text:
            report.changed[f"{name}.{path}".strip(".")] = old_print, printed(new)
    for path, reason in reader.fixed.items():
        why = why_whole(modules[path], reason)
        if why:
            report.left[f"{name}.{path}".strip(".")] = why
    for path in unused(graph, modules):
        where = f"{name}.{path}".strip(".")
        report.left[where] = "is not called in evaluation; what calls it in training may find fewer channels"
    cut = [node for node in reader.flattens if not reader.facts[node].keep.all()]
    if not cut:
        return module
    for node in cut:
        with graph.inserting_before(node):
            flat = graph.call_function(torch.flatten, (node.args[0], 1))
        node.replace_all_uses_with(flat)
        graph.erase_node(node)
    return portable(module, graph)
