"""Noisy passes of a model over one batch: many at once under vmap, or one by one where it refuses.

Under ``vmap(randomness="different")`` a tensor has no axis of passes until noise reaches it. So what stands before the
first noise runs once for a chunk of passes, in any network and without knowing it; and :mod:`.prefix` keeps it from the
first chunk for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._C._functorch import _remove_batch_dim
from torch._functorch.vmap import lazy_load_decompositions  # type: ignore[attr-defined]

from vardrop.memory import keep_freed
from vardrop.prediction import chunks, seeds
from vardrop.prediction.noise_mode import watched
from vardrop.prediction.prefix import Prefix, Sizes, TooMany
from vardrop.prediction.structure import Call, Inputs, Select, named, tensors

Outputs = dict[str, Tensor]  # name -> [passes, N, ...]
Named = tuple[str, Outputs]  # and the name of the main one
Take = Callable[[Outputs], None]
_WAITING, _STACK = 32, 1 << 20  # passes, and entries of outputs, that the loop hands on together at most


class Refused(Exception):  # noqa: N818 - an answer, not an error: the loop can
    """vmap could not run this model; the words say why."""


class Engine:
    """Makes the passes, and remembers over the batches of one prediction what worked.

    Args:
        model: it is called under :func:`vardrop.stochastic`, without gradients.
        select: the main output, see :func:`.structure.named`.
        engine: ``"auto"``, ``"vmap"`` or ``"loop"``.
        chunk: passes at once; None to choose.
        max_memory: bytes for the tensors of the passes, or None.
        watches: whether to look for draws from random numbers that are not torch's.

    Attributes:
        name: ``"vmap"`` or ``"loop"``, what runs now.
        chunk: the most passes made at once so far.
        reason: why it is the loop.
        main: the name of the main output.
        silent: whether it is known that no random operation reaches the main output.
        answered: calls of torch functions that were not carried out again, as they stand before the noise.
    """

    def __init__(
        self,
        model: nn.Module,
        select: Select | None,
        engine: str,
        chunk: int | None,
        max_memory: int | None,
        watches: bool = True,
    ) -> None:
        self.model, self.select = model, select
        self.name = "loop" if engine == "loop" else "vmap"
        self.reason = "it was asked for" if engine == "loop" else ""
        self.may_fall_back = engine == "auto"
        self.chunk = 1
        self.main = ""
        self.silent = False
        self.answered = 0
        self._asked, self._max_memory = chunk, max_memory
        self._sizes: dict[Any, int] = {}  # shapes of a batch -> passes at once
        self._keeps_prefix = True
        self._watches = watches
        self._generators = seeds.generators(model.modules()) if watches else []
        keep_freed()

    def run(self, call: Call, samples: int, take: Take) -> None:
        """Make all passes over a batch, and hand them on in pieces."""
        self._inputs = Inputs(call)
        (self._vmap if self.name == "vmap" else self._loop)(call, samples, take)

    def fall_back(self, why: str) -> None:
        """From here on one by one."""
        self.name, self.reason, self.chunk, self.silent, self._keeps_prefix = "loop", why, 1, False, True

    def shrink(self) -> bool:
        """Half as many passes at once, after the memory was too small; False if that is not possible."""
        if self.name == "loop" or self._asked is not None or max(self._sizes.values(), default=1) == 1:
            return False
        self._sizes = {shape: max(1, size // 2) for shape, size in self._sizes.items()}
        self.chunk = 1
        return True

    # ------------------------------------------------------------------------------------------------------- vmap

    def _vmap(self, call: Call, samples: int, take: Take) -> None:
        shape = tuple((tuple(tensor.shape), tensor.dtype) for tensor in _tensors(call))
        size = self._asked or self._sizes.get(shape)
        done = 0
        trial = 0  # passes of the next chunk, while it is being found out how many there can be
        if size is None:
            fits = self._max_memory is None and samples <= chunks.at_first(_tensors(call))
            trial = self._sizes[shape] = samples if fits else 1
        sizes = Sizes()
        prefix = Prefix(sizes)
        while done < samples and not self.silent:
            count = min(trial, samples - done) if trial else chunks.even(samples - done, size or 1)
            only = count == samples  # no chunk will follow that could be answered from notes
            before = None if done or not self._watches else seeds.foreign(self._generators)
            with self._memory(call, prefix, count, measure=trial > 0 or done == 0) as memory:
                try:
                    sizes.passes = count if trial > 1 and not done else 1
                    piece = self._at_once(count, None if only else prefix, sizes)
                except TooMany:
                    sizes = Sizes()
                    prefix = Prefix(sizes)
                    trial = self._sizes[shape] = 1
                    continue
                if before is not None and seeds.foreign(self._generators) != before:
                    raise Refused("the model draws from Python's or numpy's random numbers, which know nothing of vmap")
                place = piece[self.main].device
                take(piece)
                del piece
            done += count
            self.chunk = max(self.chunk, count)
            if trial:
                size = min(samples, chunks.for_cache(sizes.largest, place))
                if memory is not None and self._max_memory is not None:
                    size = min(size, chunks.for_memory(self._max_memory, prefix.held(), memory.most_since, count))
                trial = 2 if trial == 1 and memory is not None and size > 1 else 0  # one pass has no strides of its own
                self._sizes[shape] = size
        self.answered += prefix.answered

    def _at_once(self, count: int, prefix: Prefix | None, sizes: Sizes) -> Outputs:
        watch = watched(sizes.look_at) if sizes.passes > 1 else nullcontext()
        try:
            with _passes_at_once(count) as level, watch:
                self.main, found = self._with(prefix)
                main = found[self.main]
                self.silent = main.numel() > 0 and not chunks.is_batched(main)
                found = {name: _remove_batch_dim(tensor, level, count, 0) for name, tensor in found.items()}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            if not sizes.gave_up:
                raise Refused(_in_short(error)) from error
        if sizes.gave_up:  # whatever the model made of it
            raise TooMany
        return found

    # ------------------------------------------------------------------------------------------------------- loop

    def _loop(self, call: Call, samples: int, take: Take) -> None:
        prefix = Prefix()
        waiting: list[Outputs] = []
        for index in range(samples):
            before = seeds.foreign(self._generators) if index < 2 and self._watches else None
            with self._memory(call, prefix, 1, measure=index == 0):
                self.main, found = self._with(prefix)
                waiting.append(found)
            if before is not None and seeds.foreign(self._generators) != before:
                prefix.forget()
                prefix.random = True
            if index == 1 and not prefix.random:
                one, two = (each[self.main] for each in waiting)
                self.silent = one.numel() > 0 and torch.equal(one, two)
            size = sum(tensor.numel() for tensor in waiting[-1].values()) * (len(waiting) + 1)
            if index and (index + 1 == samples or self.silent or len(waiting) == _WAITING or size > _STACK):
                take({name: torch.stack([each[name] for each in waiting]) for name in waiting[0]})
                waiting = []
            if self.silent:
                return
        self.answered += prefix.answered

    # ------------------------------------------------------------------------------------------------------- both

    def _with(self, prefix: Prefix | None) -> Named:
        """Some passes with what was noted before; in full if the notes do not fit."""
        call = self._inputs.fresh()  # not where the prefix takes notes
        if prefix is None or not (self._keeps_prefix and prefix.useful):
            return self._passes(call)
        try:
            with prefix:
                found = self._passes(call)
        except Exception:
            if not prefix.deviated:
                raise
        if not prefix.deviated:
            return found
        self._keeps_prefix = False
        prefix.forget()
        return self._passes(self._inputs.fresh())

    def _passes(self, call: Call) -> Named:
        with torch._C._EnableTorchFunction():  # for the code of others; what is ours runs without modes
            return named(self.model(*call.args, **call.kwargs), self.select)

    @contextmanager
    def _memory(self, call: Call, prefix: Prefix, count: int, measure: bool) -> Iterator[chunks.Peak | None]:
        """What the passes inside take at one time, if there is a bound; refused if it is too much."""
        if self._max_memory is None or not measure:
            yield None
            return
        held = prefix.held()
        with chunks.Peak(held) as peak:
            prefix.at_noise = peak.mark
            yield peak
        if peak.most <= self._max_memory:
            return
        if count > 1 and self._asked is None:
            raise torch.OutOfMemoryError  # fewer at once may fit
        passes = "one pass" if count == 1 else f"chunk={count} passes"
        examples = next((len(tensor) for tensor in _tensors(call) if tensor.ndim), 0)
        raise ValueError(
            f"vardrop.mc_predict: max_memory must have room for {passes} over a batch of {examples} examples, "
            f"which take {peak.most:,} bytes, got {self._max_memory:,}; give more, or smaller batches"
        )


def _tensors(call: Call) -> list[Tensor]:
    """The tensors in the arguments: what the size of the activations depends on, as far as they tell."""
    return list(tensors((*call.args, call.kwargs)).values())


@contextmanager
def _passes_at_once(count: int) -> Iterator[int]:
    """What ``torch.vmap`` does around a function without arguments, and its level.

    Where vmap knows an operation only as a slow loop of its own, with a warning, it refuses instead.
    """
    functorch: Any = torch._C._functorch
    was_on = functorch._is_vmap_fallback_enabled()
    lazy_load_decompositions()
    functorch._set_vmap_fallback_enabled(False)
    level = functorch._vmap_increment_nesting(count, "different")
    try:
        yield level
    finally:
        functorch._vmap_decrement_nesting()
        functorch._set_vmap_fallback_enabled(was_on)


def _in_short(error: Exception) -> str:
    """The first sentence of a message of vmap, which can be a page."""
    first = (str(error).strip() or "no message").splitlines()[0].partition(". ")[0]
    return f"vmap refused ({type(error).__name__}: {first[:200]})"
