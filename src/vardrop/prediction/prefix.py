"""What a model computes before its first noise, kept from the first pass for all that follow.

No graph is needed, and no module is changed. While the first passes run, every torch function that is called before the
first random one is noted, with what went in and what came out. Later the model's code runs again from its beginning,
but these calls are answered from the notes. Nothing is taken on trust: a call that is another one or has other
arguments ends it, and the passes are made again in full; so does a noted tensor that was written to since.

What the notes hold is what was still alive when the noise began, no more: of a tensor that only the prefix itself has
used nothing is left but a stand-in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.weak import TensorWeakRef, WeakIdKeyDictionary

from vardrop.prediction.chunks import is_batched, too_many


class TooMany(Exception):  # noqa: N818 - a signal to start again
    """One pass of a tensor is so large that there should be fewer passes at once."""


class Deviated(Exception):  # noqa: N818 - a signal to start again
    """The model does something else before its first noise than it did in the first pass."""


@dataclass(frozen=True)
class _Number:
    """Stands for a tensor in the notes."""

    value: int


class _Note(NamedTuple):
    """One call: the function, its arguments with numbers for tensors, its result likewise."""

    func: Any
    arguments: Any
    result: Any
    acts: bool  # on the surroundings, like set_grad_enabled: it is carried out every time
    computes: bool  # tensors from tensors, and does not only look at them


class _Draws(TorchDispatchMode):
    """Notes whether a random operation has run, whatever its generator."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch would load its compiler, for seconds, only to keep it away from here


class Sizes:
    """How large the noisy tensors are, under vmap.

    Attributes:
        largest: bytes of one pass of the largest noisy tensor.
        gave_up: whether there were too many passes at once.
        passes: how many run at once, if they are to be given up when a tensor is too large for so many.
    """

    def __init__(self) -> None:
        self.largest = 0
        self.gave_up = False
        self.passes = 1

    def look_at(self, out: Any) -> None:
        """What a function has returned."""
        for tensor in _tensors(out):
            if is_batched(tensor) and (size := tensor.nbytes) > self.largest:
                self.largest = size
                if too_many(self.passes, size, tensor.device):
                    self.gave_up = True
                    raise TooMany


class Prefix(TorchFunctionMode):
    """The notes of one batch. Entered for every chunk of passes: the first writes, the others read.

    Args:
        sizes: what looks at the results under vmap, where a tensor that noise has reached is known by its axis of
            passes; None in the loop, where random operations are looked for.

    Attributes:
        random: whether noise was met while writing.
        deviated: whether the last chunk has to be made again.
        useful: whether there is something to write, or to read.
        answered: how many calls were answered from the notes.
        at_noise: called when the noise begins, while writing.
    """

    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.random = self.deviated = False
        self.useful = True
        self.answered = 0
        self.at_noise: Callable[[], None] = _nothing
        self._sizes = sizes
        self._notes: list[_Note] = []
        self._numbers = WeakIdKeyDictionary()
        self._tensors: list[Any] = []  # by number: weak where the model made them, until the notes are complete
        self._versions: list[tuple[Tensor, int]] = []
        # a function, not a method: with that the notes would live in a circle until the next garbage collection
        self._do: Callable[[Prefix, Any, Any, Any], Any] = Prefix._write
        self._place = 0

    def __enter__(self) -> Prefix:
        self.deviated, self._place = False, 0
        if self._notes:
            if all(tensor._version == version for tensor, version in self._versions):
                self._do = Prefix._read
            else:
                self.forget()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if self._do is Prefix._write:  # nothing random: there are no passes to come
            self.forget()
        elif self._do is Prefix._read:
            self.deviated = True  # the model was done before its notes were
        self._do = Prefix._carry_out

    def forget(self) -> None:
        """Keep nothing; from now on every call is carried out."""
        self.useful = False
        self._notes, self._tensors, self._versions, self._numbers = [], [], [], WeakIdKeyDictionary()
        self._do = Prefix._carry_out

    def held(self) -> int:
        """Bytes that the notes keep alive."""
        storages = [tensor.untyped_storage() for tensor in self._tensors if isinstance(tensor, Tensor)]
        return sum({storage._cdata: storage.nbytes() for storage in storages if storage.device.type != "meta"}.values())

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._do(self, func, args, kwargs or {})

    def _carry_out(self, func: Any, args: Any, kwargs: Any) -> Any:
        out = func(*args, **kwargs)
        if self._sizes is not None:
            with torch._C.DisableTorchFunction():  # other modes have no say in what is only looked at
                self._sizes.look_at(out)
        return out

    # ---------------------------------------------------------------------------------------------------- writing

    def _write(self, func: Any, args: Any, kwargs: Any) -> Any:
        arguments = self._described((args, kwargs))
        if self._sizes is not None:
            out = self._carry_out(func, args, kwargs)
            self.random = any(map(is_batched, _tensors(out)))
        else:
            with _Draws() as draws:
                out = func(*args, **kwargs)
            self.random = draws.seen
        if self.random:
            self._complete()
            return out
        made, given = _tensors(out), bool(_tensors((args, kwargs)))
        for tensor in made:
            if tensor not in self._numbers:
                self._numbers[tensor] = len(self._tensors)
                self._tensors.append(TensorWeakRef(tensor))
        if isinstance(out, Tensor):
            result: Any = _Number(self._numbers[out])
        else:
            result = tree_map_only(Tensor, lambda tensor: _Number(self._numbers[tensor]), out) if made else out
        self._notes.append(_Note(func, arguments, result, not made and not given, bool(made) and given))
        return out

    def _complete(self) -> None:
        """The noise begins: hold what is alive, with stand-ins for what is not."""
        for number, tensor in enumerate(self._tensors):
            alive = tensor() if isinstance(tensor, TensorWeakRef) else tensor
            if alive is None:
                alive = torch.zeros(0, device="meta")  # vmap takes empty for random
                self._numbers[alive] = number
            elif isinstance(alive, Tensor) and not alive.is_inference():
                self._versions.append((alive, alive._version))
            self._tensors[number] = alive
        self._do = Prefix._carry_out
        self.at_noise()
        if not any(note.computes for note in self._notes):
            self.forget()

    def _described(self, value: Any) -> Any:
        """Arguments as something that can be compared: numbers for tensors; unknown objects by what they are."""
        if isinstance(value, Tensor):
            number = self._numbers.get(value)
            if number is None:
                if self._do is Prefix._read:
                    return None  # no description of a tensor is equal to it
                number = len(self._tensors)
                self._numbers[value] = number
                self._tensors.append(value)
            return _Number(number)
        if isinstance(value, tuple | list):
            return [self._described(entry) for entry in value]
        if isinstance(value, dict):
            return {key: self._described(entry) for key, entry in value.items()}
        return (type(value), value)

    # ---------------------------------------------------------------------------------------------------- reading

    def _read(self, func: Any, args: Any, kwargs: Any) -> Any:
        if self._place == len(self._notes):
            self._do = Prefix._carry_out
            return self._carry_out(func, args, kwargs)
        note = self._notes[self._place]
        if note.func is not func or not _equal(self._described((args, kwargs)), note.arguments):
            self.deviated = True
            self._do = Prefix._carry_out
            raise Deviated
        self._place += 1
        if note.acts:
            return func(*args, **kwargs)
        self.answered += 1
        if isinstance(note.result, _Number):
            return self._tensors[note.result.value]
        return tree_map_only(_Number, lambda number: self._tensors[number.value], note.result)


def _nothing() -> None:
    pass


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in arguments or a result."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return []
    return [tensor for entry in value for tensor in _tensors(entry)]


def _equal(one: Any, other: Any) -> bool:
    try:
        return bool(one == other)
    except Exception:  # objects of others may compare as they like, such as arrays
        return False
