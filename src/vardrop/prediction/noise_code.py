"""What the code of a module does with ``self.training``: noise, or something else.

A flag may be switched on by itself only where nothing but noise hangs on it. Whether it does is read from the source of
``forward`` and of the methods that it can reach, once for every class.
"""

from __future__ import annotations

import ast
import functools
import inspect
import re
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
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


@dataclass(frozen=True)
class Use:
    """One place that reads ``self.training``.

    Attributes:
        kind: ``"noise"`` hangs on it, ``"functional"`` dropout of torch does, or something ``"else"``.
        text: the line, for a person.
        rates: where the rates of the noise stand on the module.
        number: a rate that is written into the code.
        guards: conditions on the module that are tested with it: where one is false, nothing hangs on the flag.
    """

    kind: Literal["noise", "functional", "else"]
    text: str
    rates: tuple[Chain, ...] = ()
    number: float | None = None
    guards: tuple[types.CodeType, ...] = ()

    def is_active(self, module: nn.Module) -> bool:
        """Whether the flag decides anything here, for this module."""
        for guard in self.guards:
            try:
                if not eval(guard, {"__builtins__": {}, "self": module}):  # noqa: S307 - the module's own code
                    return False
            except Exception:  # noqa: BLE001, S112 - it reads what is there only in a forward
                continue
        return True

    def rate(self, module: nn.Module) -> float | None:
        """The largest rate of the noise, None where none can be read."""
        found = [] if self.number is None else [self.number]
        for chain in self.rates:
            value = functools.reduce(lambda thing, name: getattr(thing, name, None), chain, module)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.append(float(value))
        return max(found, default=None)


@functools.lru_cache(maxsize=4096)
def uses_of_training(kind: type[nn.Module]) -> tuple[Use, ...] | None:
    """All places in the code of a class where ``self.training`` decides something; None if it cannot be read.

    Args:
        kind: a module class.
    """
    uses: list[Use] = []
    for function in _reachable(kind):
        if "training" not in _names(function.__code__):
            continue
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        except (OSError, TypeError, SyntaxError):
            return None
        definition = tree.body[0]
        if not isinstance(definition, ast.FunctionDef):
            return None
        uses += _uses(definition, function)
    return tuple(dict.fromkeys(uses))


def _reachable(kind: type[nn.Module]) -> Iterator[types.FunctionType]:
    """``forward`` and the methods and properties that it names, and they name, of all bases up to ``nn.Module``."""
    bases = [base for base in kind.__mro__ if base not in nn.Module.__mro__]
    todo, known = ["forward", "__call__"], {"forward", "__call__"}
    while todo:
        name = todo.pop()
        for base in bases:
            for function in _functions(vars(base).get(name)):
                yield function
                new = {other for other in _names(function.__code__) if any(other in vars(base) for base in bases)}
                todo += new - known
                known |= new


def _functions(thing: Any) -> Iterator[types.FunctionType]:
    """The Python functions behind a class attribute, also inside of decorators."""
    thing = getattr(thing, "fget", None) or getattr(thing, "__func__", None) or getattr(thing, "func", None) or thing
    if not callable(thing):
        return
    thing = inspect.unwrap(thing)
    if isinstance(thing, types.FunctionType):
        yield thing
        for cell in thing.__closure__ or ():
            if isinstance(getattr(cell, "cell_contents", None), types.FunctionType):
                yield cell.cell_contents


def _names(code: types.CodeType) -> set[str]:
    """The global and attribute names in a code object and in those inside of it."""
    inner = (constant for constant in code.co_consts if isinstance(constant, types.CodeType))
    return set(code.co_names).union(*map(_names, inner))


def _uses(definition: ast.FunctionDef, function: types.FunctionType) -> Iterator[Use]:
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


def _judge(
    read: ast.AST, parents: dict[ast.AST, ast.AST], own: str, function: types.FunctionType
) -> Use | None:
    """What hangs on one reading of the flag; None if nothing does."""
    condition = read
    while isinstance(parents[condition], ast.BoolOp | ast.UnaryOp | ast.Compare):
        condition = parents[condition]
    parent = parents[condition]
    guards = _guards(condition, read, own)
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
    is_noise = any(map(_NOISE.search, told)) and not any(map(_SHAPES.search, told))
    if is_noise and isinstance(parent, ast.If):
        plain = not any(map(_ELSE.search, _words([parent, *around])))
        is_noise = plain and not _writes(around, own) and _returns_alike(parent, around)
    return Use("noise" if is_noise else "else", f"if {text}" if isinstance(parent, ast.If) else text,
               _chains(around, own) if is_noise else (), guards=guards)  # fmt: skip


def _judge_call(call: ast.Call, own: str, function: types.FunctionType) -> Use | None:
    """A call that is handed the flag."""
    called = _resolve(call.func, function)
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if called in _NORMS or name == "train":  # the first are kept in evaluation, the second passes the flag on
        return None
    text, words = ast.unparse(call), {name}
    if called in FUNCTIONAL:
        p = next((word.value for word in call.keywords if word.arg == "p"), call.args[1] if len(call.args) > 1 else None)
        if p is None or isinstance(p, ast.Constant):
            return Use("functional", text, number=0.5 if p is None else float(p.value))  # type: ignore[arg-type]
        return Use("functional", text, _chains([p], own, every=True))
    is_noise = any(map(_NOISE.search, words)) and not any(map(_SHAPES.search, words))
    return Use("noise" if is_noise else "else", text, _chains([call], own) if is_noise else ())


def _resolve(node: ast.expr, function: types.FunctionType) -> Callable[..., Any] | None:
    """The function that a call's dotted name stands for."""
    if isinstance(node, ast.Attribute):
        return getattr(_resolve(node.value, function), node.attr, None)
    found = function.__globals__.get(node.id) if isinstance(node, ast.Name) else None
    return found if getattr(found, "__hash__", None) else None


def _guards(condition: ast.AST, read: ast.AST, own: str) -> tuple[types.CodeType, ...]:
    """The other parts of a conjunction with the flag that depend on the module alone."""
    if not (isinstance(condition, ast.BoolOp) and isinstance(condition.op, ast.And)):
        return ()
    parts = [part for part in condition.values if read not in ast.walk(part)]
    allowed = (ast.Attribute, ast.Name, ast.Constant, ast.Compare, ast.UnaryOp, ast.cmpop, ast.unaryop, ast.Load)
    alone = [
        part
        for part in parts
        if all(isinstance(node, allowed) for node in ast.walk(part))
        and {node.id for node in ast.walk(part) if isinstance(node, ast.Name)} == {own}
    ]
    return tuple(compile(_renamed(part, own), "<guard>", "eval") for part in alone)


def _renamed(part: ast.expr, own: str) -> str:
    return f"(lambda {own}: {ast.unparse(part)})(self)"


def _destination(node: ast.AST, parents: dict[ast.AST, ast.AST]) -> set[str]:
    """What the value of an expression is called where it goes: an argument, a variable, a key."""
    parent = parents[node]
    if isinstance(parent, ast.keyword):
        return {parent.arg or ""}
    if isinstance(parent, ast.Assign):
        return _words(parent.targets)
    if isinstance(parent, ast.Dict):
        return {str(k.value) for k, v in zip(parent.keys, parent.values, strict=True) if v is node and isinstance(k, ast.Constant)}
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


def _writes(nodes: list[ast.AST], own: str) -> bool:
    """Whether code changes the module: sets an attribute, or calls an in-place method of one."""
    for node in (inner for outer in nodes for inner in ast.walk(outer)):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _is_name(node.value, own):
            return True
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr.endswith("_"):
            if _chain(node.func.value, own):
                return True
    return False


def _returns_alike(branch: ast.If, around: list[ast.AST]) -> bool:
    """Whether both branches return tuples of one length, or neither returns one."""
    returned = [node.value for outer in [*branch.body, *around] for node in ast.walk(outer) if isinstance(node, ast.Return)]
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
