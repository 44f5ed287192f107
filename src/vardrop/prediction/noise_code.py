"""What the code of a module does with ``self.training``: noise, or something else.

A flag may be switched on by itself only where nothing but noise hangs on it. Whether it does is read from the source of
``forward`` and of the methods that it can reach, once for every class.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
import types
import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn

from vardrop.prediction import noise_syntax
from vardrop.prediction.noise_syntax import Found


class Use(Found):
    """One place that reads ``self.training``, and what it means for a module of the class."""

    def is_active(self, module: nn.Module) -> bool:
        """Whether the flag decides anything here, for this module."""
        for guard in self.guards:
            try:
                if not eval(guard, {"__builtins__": {}, "self": module}):  # noqa: S307 - the module's own code
                    return False
            except Exception:  # noqa: S112 - it reads what is there only in a forward
                continue
        return True

    def rate(self, module: nn.Module) -> float | None:
        """The largest rate, None where none can be read."""
        found = [] if self.number is None else [self.number]
        for chain in self.rates:
            value: Any = module
            for name in chain:
                value = getattr(value, name, None)
            if isinstance(value, int | float) and not isinstance(value, bool):
                found.append(float(value))
        return max(found, default=None)


_READ: weakref.WeakKeyDictionary[type[nn.Module], tuple[Use, ...] | None] = weakref.WeakKeyDictionary()


def uses_of_training(kind: type[nn.Module]) -> tuple[Use, ...] | None:
    """All places in the code of a class where ``self.training`` decides something; None if it cannot be read.

    Args:
        kind: a module class.
    """
    if kind not in _READ:
        _READ[kind] = _read(kind)
    return _READ[kind]


def _read(kind: type[nn.Module]) -> tuple[Use, ...] | None:
    uses: list[Use] = []
    for function in _reachable(kind):
        if "training" not in _names(function.__code__):
            continue
        try:
            definition = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
        except (OSError, TypeError, SyntaxError):
            return None
        if not isinstance(definition, ast.FunctionDef):  # a lambda, among other things
            return None
        uses += [Use(*found) for found in noise_syntax.uses(definition, function)]
    return tuple(dict.fromkeys(uses))


def _reachable(kind: type[nn.Module]) -> Iterator[types.FunctionType]:
    """``forward`` and the methods and properties that it names, and they name, of all bases that are not torch's."""
    bases = [base for base in kind.__mro__ if base is not object and not base.__module__.startswith("torch.nn.")]
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
