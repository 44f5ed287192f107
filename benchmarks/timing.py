"""Ratios that a busy machine cannot bend much: every measurement stands beside one of the reference.

In each round every variant runs right after a run of the reference, and what is kept is the ratio of the two. A slow
second of the machine slows both. The figure is the median over rounds, with the interquartile range.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple


class Pair(NamedTuple):
    """What a variant and the reference beside it took in one round, in the same unit."""

    variant: float
    reference: float


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        benchmark: the name that ``--only`` knows.
        variant: what was measured.
        ratio: median over rounds of variant / reference; None if it could not be measured.
        quartiles: of the ratio over rounds.
        amount: median of what the variant took, in ``unit``.
        unit: ``"s"`` or ``"bytes"``.
        rounds: how many rounds.
        goal: the ratio should be at most this; None if no goal is set.
        note: why it could not be measured, or what is particular about it.
    """

    benchmark: str
    variant: str
    ratio: float | None = None
    quartiles: tuple[float, float] | None = None
    amount: float | None = None
    unit: str = "s"
    rounds: int = 0
    goal: float | None = None
    note: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the goal was met; None without a goal or a figure."""
        return None if self.goal is None or self.ratio is None else self.ratio <= self.goal


def summarise(benchmark: str, variant: str, pairs: Sequence[Pair], **about: Any) -> Row:
    """The row for what was measured in the rounds of a benchmark."""
    ratios = [pair.variant / pair.reference for pair in pairs]
    low, high = ratios[0], ratios[0]
    if len(ratios) > 1:
        low, _, high = statistics.quantiles(ratios, n=4, method="inclusive")
    amount = statistics.median(pair.variant for pair in pairs)
    return Row(benchmark, variant, statistics.median(ratios), (low, high), amount, rounds=len(pairs), **about)


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """What was garbage before the block is collected before it; inside nothing is."""
    was_on = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def interleaved(
    variants: Mapping[str, Callable[[], object]],
    reference: Callable[[], object],
    rounds: int,
    warmup: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[Pair]]:
    """Seconds of every variant and of the reference run right before it, for every round.

    Args:
        variants: name -> what to time; called without arguments.
        reference: what they are compared with.
        rounds: how often each is timed.
        warmup: how often each is called before that, untimed.
        clock: a function that returns seconds.
    """

    def seconds(call: Callable[[], object]) -> float:
        start = clock()
        call()
        return clock() - start

    for call in (reference, *variants.values()):
        for _ in range(warmup):
            call()
    pairs: dict[str, list[Pair]] = {name: [] for name in variants}
    for _ in range(rounds):
        with _no_garbage_collection():
            for name, call in variants.items():
                beside = seconds(reference)
                pairs[name].append(Pair(seconds(call), beside))
    return pairs
