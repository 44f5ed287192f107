"""A random weight: what a converted layer hands to its own, unchanged forward in place of a parameter."""

from __future__ import annotations

import functools
import types as python_types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vardrop.weights import estimators
from vardrop.weights.linear_ops import DESCRIBE, LinearOp

_DESCRIBES_MEAN = frozenset(
    "shape dtype device layout ndim requires_grad is_cuda is_cpu is_sparse is_quantized is_complex is_floating_point "
    "is_leaf is_nested is_meta itemsize nbytes size dim numel nelement ndimension element_size stride is_contiguous "
    "get_device".split()
)
CASTS = frozenset("detach contiguous to float double half bfloat16 type_as cpu cuda clone".split())
TRANSPOSES = frozenset("t adjoint transpose swapaxes swapdims".split())
CUTS = frozenset("chunk split tensor_split narrow".split())
_RESHAPES = frozenset("permute movedim unbind select view view_as reshape flatten unflatten squeeze unsqueeze".split())
_VIEWS = CASTS | TRANSPOSES | CUTS | _RESHAPES | {"__getitem__"}  # `expand` is none: its copies are one draw


def _run_body(function: Any) -> Callable[..., Any]:
    """A copy of a torch function written in Python that does not stop to ask for overrides.

    Its body then runs as it stands and meets random weights one operation at a time.
    """
    asked = {name: lambda *_: False for name in function.__globals__ if name.startswith("has_torch_function")}
    copy = python_types.FunctionType(
        function.__code__, {**function.__globals__, **asked}, function.__name__, function.__defaults__
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy


_BODIES: dict[Any, Callable[..., Any]] = {F.multi_head_attention_forward: _run_body(F.multi_head_attention_forward)}


class RandomWeight:
    """A weight that is a random variable, with the mean ``loc``; it stands where a tensor is expected.

    * An operation that is linear in the weight is carried out by the estimator in force (:class:`vardrop.estimator`).
    * Views (``chunk``, ``t``, indexing, ...) give random weights again, and are views of its sample too.
    * Anything else gets a sample, never silently the mean. A random weight keeps it, so that ``w - w.mean()`` sees one
      weight; a layer hands out a new random weight whenever its attribute is read.
    * Operations that would change it in place are refused: there is nothing to change.
    """

    loc: Tensor
    _drawn: Tensor | None = None

    def drawn(self) -> Tensor:
        """The one sample that everything shares which is not linear in the weight: the mean under ``"none"``."""
        setting = estimators.current()
        if setting.name == "none":
            return self.loc
        if self._drawn is None:
            self._drawn = self._first_draw(setting.generator)
        return self._drawn

    def _first_draw(self, generator: torch.Generator | None) -> Tensor:
        """The sample that :meth:`drawn` keeps."""
        return self.sample(generator)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """A new draw of the whole weight."""
        raise NotImplementedError

    def _carry_out(self, op: LinearOp) -> Tensor:
        """The operation, by the estimator in force."""
        raise NotImplementedError

    def _view(self, name: str, view: Callable[[Tensor], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The view as random weights of the same kind, or None where it cannot be one."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        describe = DESCRIBE.get(func)
        if describe is not None and kwargs.get("out") is None:
            op = describe(*args, **kwargs)
            if op is not None and isinstance(op.weight, RandomWeight) and _plain(op.inputs) and _plain((op.bias,)):
                wrong = next((x.dtype for x in op.inputs if not (op.indexed or x.is_floating_point())), None)
                if wrong is not None:
                    raise TypeError(
                        f"vardrop: {func.__name__} with a random weight needs floating-point inputs, got {wrong}; "
                        "convert them with .float()"
                    )
                return op.weight._carry_out(op)
        if func in _BODIES:
            return _BODIES[func](*args, **kwargs)
        if isinstance(kwargs.get("out"), RandomWeight):
            _refuse("an operation with out=")
        first = args[0] if args else kwargs.get("tensor")  # as torch.nn.init calls it
        if not _plain(tuple(first) if isinstance(first, list | tuple) else (first,)):
            name = getattr(func, "__name__", "")
            if name.endswith("_") and not name.endswith("__"):
                _refuse(name)
        if isinstance(first, RandomWeight):
            if name == "__getitem__" and _are_rows(args[1]) and first.ndim == 2:
                rows = args[1].where(args[1] >= 0, args[1] + len(first))
                return F.embedding(rows, first)  # type: ignore[arg-type]
            if name in _VIEWS:
                view = args[0]._view(name, lambda t: func(t, *args[1:], **kwargs), args[1:], kwargs)
                if view is not None:
                    return view
        return func(*_drawn(args), **_drawn(kwargs))

    def __getattr__(self, name: str) -> Any:
        if name in _DESCRIBES_MEAN:
            return getattr(self.loc, name)
        if name in ("T", "mT"):
            return self.transpose(-2, -1) if self.loc.ndim > 1 else self
        if name.startswith("__") or name in ("data", "grad", "grad_fn") or not hasattr(Tensor, name):
            raise AttributeError(
                f"vardrop: a random weight has no {name!r}; while its layer is in training the weight is a random "
                "variable, and the parameter with .data and .grad is dict(layer.named_parameters())['weight']"
            )
        attribute = getattr(Tensor, name)
        return functools.partial(_dispatch, attribute, self) if callable(attribute) else getattr(self.drawn(), name)

    def __len__(self) -> int:
        return len(self.loc)

    def __repr__(self) -> str:
        return f"{type(self).__name__}(shape={tuple(self.loc.shape)}, dtype={self.loc.dtype}, device={self.loc.device})"


def _refuse(name: str) -> None:
    raise TypeError(
        f"vardrop: {name} would change a random weight in place, but there is only a sample to change; "
        "call it on the parameter, dict(layer.named_parameters())['weight'], or after layer.eval()"
    )


def _plain(values: tuple[Any, ...]) -> bool:
    return not any(isinstance(value, RandomWeight) for value in values)


def _drawn(value: Any) -> Any:
    """``value`` with its sample in place of every random weight."""
    if isinstance(value, RandomWeight):
        return value.drawn()
    if isinstance(value, tuple | list):
        return type(value)([_drawn(entry) for entry in value])
    if isinstance(value, dict):
        return {key: _drawn(entry) for key, entry in value.items()}
    return value


def _dispatch(func: Any, *args: Any, **kwargs: Any) -> Any:
    return RandomWeight.__torch_function__(func, (), args, kwargs)


def _operator(func: Any, swapped: bool = False) -> Callable[..., Any]:
    def operate(self: RandomWeight, *args: Any) -> Any:
        return _dispatch(func, *args, self) if swapped else _dispatch(func, self, *args)

    return operate


def _only_on_the_parameter(name: str) -> property:
    def read(self: RandomWeight) -> Any:
        return RandomWeight.__getattr__(self, name)

    def write(self: RandomWeight, value: Any) -> None:
        _refuse(f"to set .{name}")

    return property(read, write)


for _name in ("data", "grad", "requires_grad"):
    setattr(RandomWeight, _name, _only_on_the_parameter(_name))
for _name in "add radd sub rsub mul rmul truediv rtruediv pow neg abs eq ne lt le gt ge getitem".split():
    setattr(RandomWeight, f"__{_name}__", _operator(getattr(Tensor, f"__{_name}__")))
RandomWeight.__iter__ = lambda self: iter(self.unbind())  # type: ignore[attr-defined]
setattr(RandomWeight, "__matmul__", _operator(torch.matmul))  # noqa: B010 - as the others
setattr(RandomWeight, "__rmatmul__", _operator(torch.matmul, swapped=True))  # noqa: B010
RandomWeight.__hash__ = object.__hash__  # type: ignore[method-assign]


def _are_rows(index: Any) -> bool:
    return isinstance(index, Tensor) and index.dtype in (torch.int64, torch.int32)
