"""What hangs on a flag in the source of one function, told from its syntax tree."""

from __future__ import annotations

import ast
import re
import types
from collections.abc import Callable, Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch.nn import functional as F

FUNCTIONAL = frozenset(
    {F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout, torch.dropout}
)
_NORMS = frozenset({F.batch_norm, F.instance_norm, torch.batch_norm, torch.instance_norm})
_NOISE = re.compile(
    r"drop(?!ped)|noise|noisy|jitter|stochastic|^rand|bernoulli|gumbel|rrelu|^r?sample$|^(normal|uniform|exponential)_?$",
    re.IGNORECASE,
)
_SHAPES = re.compile(r"patch_?drop|token_?drop|drop_?tokens|keep_ind", re.IGNORECASE)
_ELSE = re.compile(r"aux|loss|target|label|checkpoint|criterion|running_|momentum|num_batches", re.IGNORECASE)
_RATE = re.compile(r"drop|^p$|prob|rate$", re.IGNORECASE)

Chain = tuple[str, ...]  # attributes from self on: ("attn_drop", "p")


class Found(NamedTuple):
    """One place that reads the flag.

    Attributes:
        kind: ``"noise"`` hangs on it, ``"functional"`` dropout of torch does, or something ``"else"``.
        text: the code, for a person.
        rates: where the rates that are read there stand on the module.
        number: a rate that is written into the code.
        guards: conditions on the module that are tested with it: where one is false, nothing hangs on the flag.
        mixed: whether there are words of noise in what is something else.
    """

    kind: Literal["noise", "functional", "else"]
    text: str
    rates: tuple[Chain, ...] = ()
    number: float | None = None
    guards: tuple[types.CodeType, ...] = ()
    mixed: bool = False


def uses(definition: ast.FunctionDef, function: types.FunctionType) -> Iterator[Found]:
    """All places in a method where its module's flag decides something.

    Args:
        definition: the syntax tree of the method.
        function: the method itself, whose names are looked up.
    """
    arguments = [*definition.args.posonlyargs, *definition.args.args]
    if not arguments:
        return
    own = arguments[0].arg
    parents = {child: node for node in ast.walk(definition) for child in ast.iter_child_nodes(node)}

    def is_flag(node: ast.AST) -> bool:
        return isinstance(node, ast.Attribute) and node.attr == "training" and _is_name(node.value, own)

    reads = [node for node in ast.walk(definition) if is_flag(node)]
    called: set[str] = set()
    for read in list(reads):
        parent = parents[read]
        if isinstance(parent, ast.Assign) and len(parent.targets) == 1 and isinstance(parent.targets[0], ast.Name):
            called.add(parent.targets[0].id)
            reads.remove(read)
    reads += [
        node
        for node in ast.walk(definition)
        if isinstance(node, ast.Name) and node.id in called and isinstance(node.ctx, ast.Load)
    ]
    for read in reads:
        use = _judge(read, parents, own, function)
        if use is not None:
            yield use


def _judge(read: ast.AST, parents: dict[ast.AST, ast.AST], own: str, function: types.FunctionType) -> Found | None:
    """What hangs on one reading of the flag; None if nothing does."""
    condition = read
    guards: tuple[types.CodeType, ...] = ()
    while isinstance(parents[condition], ast.BoolOp | ast.UnaryOp | ast.Compare):
        condition, inner = parents[condition], condition
        if isinstance(condition, ast.BoolOp):
            guards += _guards(condition, inner, own)
    parent = parents[condition]
    if isinstance(parent, ast.keyword):
        parent = parents[parent]
    if isinstance(parent, ast.Call):
        return _judge_call(parent, own, function)
    around: list[ast.AST]
    words: set[str] = set()
    if isinstance(parent, ast.IfExp) and parent.test is condition:
        around, words = [parent], _destination(parent, parents)
    elif isinstance(parent, ast.If) and parent.test is condition:
        around = [parent.test, *parent.body, *(parent.orelse or _rest(parent, parents))]
        words = _words([parent.test])
    elif isinstance(parent, ast.Assert | ast.Raise):
        return None
    else:
        around = [_statement(parent, parents)]
    text = ast.unparse(parent.test if isinstance(parent, ast.If) else parent)
    told = words | _words(around)
    is_noise = has_words = any(map(_NOISE.search, told)) and not any(map(_SHAPES.search, told))
    if is_noise and isinstance(parent, ast.If):
        plain = not any(map(_ELSE.search, _words([parent, *around])))
        is_noise = plain and not _changes(around, own) and _returns_alike(parent, around)
    if isinstance(parent, ast.If):
        text = f"if {text}"
    rates = _chains(around if has_words else [condition], own)
    return Found("noise" if is_noise else "else", text, rates, guards=guards, mixed=has_words and not is_noise)


def _judge_call(call: ast.Call, own: str, function: types.FunctionType) -> Found | None:
    """A call that is handed the flag."""
    called = _resolve(call.func, function)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if called in _NORMS or name == "train":  # the first are kept in evaluation, the second passes the flag on
        return None
    text, words = ast.unparse(call), {name, *(word.arg or "" for word in call.keywords)}
    if called in FUNCTIONAL:
        p = next(
            (word.value for word in call.keywords if word.arg == "p"), call.args[1] if len(call.args) > 1 else None
        )
        if p is None or isinstance(p, ast.Constant):
            return Found("functional", text, number=0.5 if p is None else float(p.value))  # type: ignore[arg-type]
        return Found("functional", text, _chains([p], own, every=True))
    is_noise = any(map(_NOISE.search, words)) and not any(map(_SHAPES.search, words))
    return Found("noise" if is_noise else "else", text, _chains([call], own))


def _resolve(node: ast.expr, function: types.FunctionType) -> Callable[..., Any] | None:
    """The function that a call's dotted name stands for."""
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, function), node.attr, None)
    found = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
    return found if getattr(found, "__hash__", None) else None


def _guards(condition: ast.BoolOp, read: ast.AST, own: str) -> tuple[types.CodeType, ...]:
    """The parts beside the flag in "and" and "or" that depend on the module alone, as conditions for it to matter."""
    allowed = (ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.UnaryOp, ast.cmpop, ast.unaryop, ast.Load)
    alone = [
        ast.unparse(part)
        for part in condition.values
        if part is not read
        and all(isinstance(node, allowed) for node in ast.walk(part))
        and {node.id for node in ast.walk(part) if isinstance(node, ast.Name)} == {own}
    ]
    turn = "" if isinstance(condition.op, ast.And) else "not "
    return tuple(compile(f"(lambda {own}: {turn}({part}))(self)", "<guard>", "eval") for part in alone)


def _destination(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> set[str]:
    """What the value of an expression is called where it goes: an argument, a variable, a key."""
    parent = parents[node]
    if isinstance(parent, ast.keyword):
        return {parent.arg or ""}
    if isinstance(parent, ast.Assign):
        return _words(parent.targets)
    if isinstance(parent, ast.Dict):
        return {
            str(k.value)
            for k, v in zip(parent.keys, parent.values, strict=True)
            if v is node and isinstance(k, ast.Constant)
        }
    if isinstance(parent, ast.Call):
        name = parent.func.attr if isinstance(parent.func, ast.Attribute) else getattr(parent.func, "id", "")
        return {"dropout_p"} if name == "scaled_dot_product_attention" else {name}
    return set()


def _rest(branch: ast.If, parents: dict[ast.AST, ast.AST]) -> list[ast.stmt]:
    """What runs after a branch that returns, which is its other branch."""
    if not isinstance(branch.body[-1], ast.Return | ast.Continue):
        return []
    for block in ("body", "orelse"):
        statements = getattr(parents[branch], block, None)
        if isinstance(statements, list) and branch in statements:
            return statements[statements.index(branch) + 1 :]
    return []


def _statement(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> ast.AST:
    while not isinstance(node, ast.stmt):
        node = parents[node]
    return node


def _words(nodes: list[Any]) -> set[str]:
    """All identifiers in some code."""
    words: set[str] = set()
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Name):
            words.add(node.id)
        elif isinstance(node, ast.Attribute):
            words.add(node.attr)
        elif isinstance(node, ast.keyword) and node.arg:
            words.add(node.arg)
    return words


def _changes(nodes: list[ast.AST], own: str) -> bool:
    """Whether code changes the module (sets an attribute, calls an in-place method of one), or refuses its input."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Raise | ast.Assert):
            return True
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, own):
            return True
        method = node.func if isinstance(node, ast.Call) else None
        if isinstance(method, ast.Attribute) and method.attr.endswith("_") and _chain(method.value, own):
            return True
    return False


def _returns_alike(branch: ast.If, around: list[ast.AST]) -> bool:
    """Whether both branches return tuples of one length, or neither returns one."""
    returned = [
        node.value for outer in [*branch.body, *around] for node in ast.walk(outer) if isinstance(node, ast.Return)
    ]
    return len({len(value.elts) if isinstance(value, ast.Tuple) else 0 for value in returned}) < 2


def _chains(nodes: list[Any], own: str, every: bool = False) -> tuple[Chain, ...]:
    """The attributes of the module in some code that are rates by their names, or all of them."""
    found = {_chain(node, own) for outer in nodes for node in ast.walk(outer)}
    return tuple(sorted(chain for chain in found if chain and (every or _RATE.search(chain[-1]))))


def _chain(node: ast.AST, own: str) -> Chain:
    """``self.a.b`` as ("a", "b"); empty for what is none."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return tuple(reversed(names)) if _is_name(node, own) else ()


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name
