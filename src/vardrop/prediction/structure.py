"""What goes into a model and comes out of it, whatever its structure: arguments in, named tensors out."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

Select = str | int | Callable[[Any], Tensor]
MAIN = "output"  # the name of the only tensor there is, or of what a function selects
_LABELS = ("labels", "label")


class Call(NamedTuple):
    """The arguments of one call of a model."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def is_batches(x: Any, owner: str = "mc_predict") -> bool:
    """Whether x is a loader or another iterable of batches, and not one batch."""
    if isinstance(x, Tensor | PackedSequence):
        return False
    if isinstance(x, str) or hasattr(x, "__array__"):
        raise TypeError(
            f"vardrop.{owner}: x must be a tensor, a structure of tensors or a loader, got a {type(x).__name__}; write "
            "torch.as_tensor(numpy.asarray(x), dtype=torch.float32)"
        )
    return isinstance(x, Iterable) and not isinstance(x, tuple | Mapping)


def single(x: Any) -> Call:
    """One batch as it was given: a tensor, a tuple of arguments, or a mapping of keyword arguments."""
    if isinstance(x, Mapping):
        return Call((), dict(x))
    return Call(x if isinstance(x, tuple) and not isinstance(x, PackedSequence) else (x,), {})


def of_loader(batch: Any) -> Call:
    """One batch of a loader: what comes after the first entry, or is called labels, is not for the model."""
    if isinstance(batch, Mapping):
        return Call((), {key: value for key, value in batch.items() if key not in _LABELS})
    if isinstance(batch, tuple | list):
        if not batch:
            raise ValueError("vardrop.mc_predict: a batch must have an input, got an empty tuple; give (input, ...)")
        return Call((batch[0],), {})
    return Call((batch,), {})


def moved(value: Any, device: Any) -> Any:
    """``value`` with all its tensors on a device."""
    return _mapped(value, lambda tensor: tensor.to(device))


def copied(value: Any) -> Any:
    """``value`` with copies of its tensors, for code that may write to what it is given."""
    return _mapped(value, lambda tensor: tensor.clone())


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(_mapped(entry, change) for entry in value))
    if isinstance(value, tuple | list):
        return type(value)(_mapped(entry, change) for entry in value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    return value


class Inputs:
    """The arguments of a model as they were given, for every pass: a forward may write to them (``inplace=True``)."""

    def __init__(self, call: Call) -> None:
        self._original = call
        self._renew()

    def _renew(self) -> None:
        self._tensors: list[Tensor] = []
        self._call: Call = _mapped(self._original, self._copy)
        self._versions = [tensor._version for tensor in self._tensors]

    def _copy(self, tensor: Tensor) -> Tensor:
        self._tensors.append(tensor.clone())
        return self._tensors[-1]

    def fresh(self) -> Call:
        """The arguments; the same tensors as long as nothing wrote to them."""
        if [tensor._version for tensor in self._tensors] != self._versions:
            self._renew()
        return self._call


def device_of(modules: Iterable[nn.Module]) -> Any:
    """Where the first parameter of some modules is, or the first buffer; None if they have none."""
    for kind in ("_parameters", "_buffers"):
        for module in modules:
            for tensor in getattr(module, kind).values():
                if tensor is not None:
                    return tensor.device
    return None


def tensors(output: Any) -> dict[str, Tensor]:
    """All tensors of an output by their paths, such as ``"logits"``, ``"0"`` or ``"hidden_states.3"``.

    Tuples, lists, mappings (the outputs of transformers too) and dataclasses are looked into; what else there is,
    such as None, numbers and caches, is left out.

    Args:
        output: what a model returned.

    Example:
        >>> import torch
        >>> from vardrop.prediction.structure import tensors
        >>> list(tensors({"logits": torch.ones(2), "states": (torch.ones(1), None, torch.ones(1))}))
        ['logits', 'states.0', 'states.2']
    """
    return {name or MAIN: tensor for name, tensor in _walk(output, "")}


def _walk(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    inside: Iterable[tuple[Any, Any]] = ()
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, Mapping):
        inside = value.items()
    elif isinstance(value, tuple) and hasattr(value, "_fields"):
        inside = zip(value._fields, value, strict=True)
    elif isinstance(value, tuple | list):
        inside = enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        inside = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
    for key, entry in inside:
        yield from _walk(entry, f"{path}.{key}" if path else str(key))


def named(output: Any, select: Select | None) -> tuple[str, dict[str, Tensor]]:
    """The name of the main tensor of an output, and all tensors by name.

    The main one is what ``select`` says, else the only one, else the one called ``logits``.
    """
    found = tensors(output)
    if callable(select):
        chosen = select(output)
        if not isinstance(chosen, Tensor):
            raise TypeError(f"vardrop.mc_predict: select must return a tensor, got {type(chosen).__name__}")
        return MAIN, {**found, MAIN: chosen}
    names = ", ".join(found) or "none"
    if select is not None:
        if str(select) not in found:
            raise ValueError(f"vardrop.mc_predict: select must name a tensor of the output ({names}), got {select!r}")
        return str(select), found
    if len(found) == 1:
        return next(iter(found)), found
    if "logits" in found:
        return "logits", found
    raise ValueError(
        "vardrop.mc_predict: the model's output must have one tensor, or one called logits, got "
        f"{type(output).__name__} with {names}; say which with select=, by name or by a function of the output"
    )
