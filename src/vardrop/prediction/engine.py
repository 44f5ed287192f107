"""Noisy passes of a model over one batch: many at once under vmap, or one by one where it refuses.

Under ``vmap(randomness="different")`` a tensor has no axis of passes until noise reaches it. So what stands before the
first noise runs once for all passes, in any network and without knowing it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.prediction import chunks, seeds
from vardrop.prediction.structure import Call, Select, named

Outputs = dict[str, Tensor]  # name -> [passes, N, ...]


class Refused(Exception):  # noqa: N818 - an answer, not an error: the loop can
    """vmap could not run this model; the words say why."""


class Engine:
    """Makes the passes, and remembers over the batches of one prediction what worked.

    Attributes:
        name: ``"vmap"`` or ``"loop"``, what runs now.
        chunk: the most passes made at once so far.
        reason: why it is the loop.
        main: the name of the main output.
        reached: whether noise reached the main output; None where that is not known before passes are compared.
    """

    def __init__(
        self, model: nn.Module, select: Select | None, engine: str, chunk: int | None, max_memory: int | None
    ) -> None:
        self.model, self.select = model, select
        self.name = "loop" if engine == "loop" else "vmap"
        self.may_fall_back = engine == "auto"
        self.reason = "asked for" if engine == "loop" else ""
        self.asked, self.max_memory = chunk, max_memory
        self.chunk = 1
        self.main = ""
        self.reached: bool | None = None
        self._sizes: dict[tuple[Any, ...], int] = {}  # shapes of a batch -> its chunk

    def passes(self, call: Call, samples: int) -> Iterator[Outputs]:
        """All passes over a batch, in pieces."""
        yield from (self._vmap if self.name == "vmap" else self._loop)(call, samples)

    def fall_back(self, why: Refused) -> None:
        """From here on one by one."""
        self.name, self.reason, self.chunk, self.reached = "loop", str(why), 1, None

    # ------------------------------------------------------------------------------------------------------- vmap

    def _vmap(self, call: Call, samples: int) -> Iterator[Outputs]:
        shape = _shape(call)
        done = 0
        if self.asked is None and shape not in self._sizes:
            largest = chunks.Largest()
            before = seeds.foreign()
            with largest:
                first = self._at_once(call, 1)
            if seeds.foreign() != before:
                raise Refused(
                    "the model draws from Python's or numpy's random numbers, which vmap would draw once for all"
                )
            yield first
            done = 1
            device = next(iter(first.values())).device
            self._sizes[shape] = chunks.choose(samples, largest.bytes, device)
        size = self.asked or self._sizes[shape]
        while done < samples:
            count = min(size, samples - done)
            self.chunk = max(self.chunk, count)
            yield self._at_once(call, count)
            done += count

    def _at_once(self, call: Call, count: int) -> Outputs:
        def one(_: Tensor) -> Outputs:
            self.main, found = named(self.model(*call.args, **call.kwargs), self.select)
            self.reached = chunks.is_batched(found[self.main])
            return found

        try:
            with _no_slow_rules():
                return torch.vmap(one, randomness="different")(torch.empty(count))
        except Exception as error:
            raise Refused(_in_short(error)) from error

    # ------------------------------------------------------------------------------------------------------- loop

    def _loop(self, call: Call, samples: int) -> Iterator[Outputs]:
        waiting: list[Outputs] = []
        for index in range(samples):
            self.main, found = named(self.model(*call.args, **call.kwargs), self.select)
            waiting.append(found)
            size = sum(tensor.numel() for tensor in found.values()) * len(waiting)
            if index + 1 == samples or len(waiting) == 32 or size > 1 << 20:
                yield {name: torch.stack([each[name] for each in waiting]) for name in found}
                waiting = []


def _shape(call: Call) -> tuple[Any, ...]:
    """What the size of the activations depends on, as far as the arguments tell."""
    return tuple(
        (tuple(value.shape), value.dtype) for value in (*call.args, *call.kwargs.values()) if isinstance(value, Tensor)
    )


@contextmanager
def _no_slow_rules() -> Iterator[None]:
    """Where vmap knows an operation only as a slow loop of its own, with a warning, it refuses instead."""
    functorch: Any = torch._C._functorch
    was_on = functorch._is_vmap_fallback_enabled()
    functorch._set_vmap_fallback_enabled(False)
    try:
        yield
    finally:
        functorch._set_vmap_fallback_enabled(was_on)


def _in_short(error: Exception) -> str:
    """The first sentence of a message of vmap, which can be a page."""
    first = (str(error).strip() or "no message").splitlines()[0]
    return f"vmap refused ({type(error).__name__}: {first[:200]})"
