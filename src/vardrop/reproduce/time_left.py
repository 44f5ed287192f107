"""How long a sweep will still take, from the cells that are finished."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Sequence
from statistics import fmean
from typing import NamedTuple

from vardrop.reproduce.experiment import Cell, Config

_Items = frozenset[tuple[str, str]]


class Left(NamedTuple):
    """What is left: seconds, as far as can be told, and how many cells nothing can be told of."""

    seconds: float
    unknown: int

    def __str__(self) -> str:
        words = f"about {duration(self.seconds)} left" if self.seconds or not self.unknown else ""
        more = "cells" if words == "" else "more cells"
        return (
            words
            + (" and " if words and self.unknown else "")
            + (f"{self.unknown} {more} of unknown length" if self.unknown else "")
        )


def time_left(
    waiting: Sequence[Cell], finished: Iterable[tuple[Cell, float]], jobs: int = 1, alone: Sequence[Cell] = ()
) -> Left:
    """The time until all cells are finished, if each takes as long as those of its experiment that are most like it.

    Most like it are those that agree with it in most entries of their configurations, the seed aside. So many jobs
    take a share of the sum each, and never less than the longest cell. Cells of an experiment of which none is
    finished are counted, not guessed.

    Args:
        waiting: the cells that are run beside each other, not finished yet.
        finished: cells and their seconds, of whatever experiments.
        jobs: how many cells run at once.
        alone: the cells that have the machine to themselves, not finished yet.

    Example:
        >>> from vardrop.reproduce.experiment import Cell
        >>> from vardrop.reproduce.time_left import time_left
        >>> small, large = ([Cell("a", "cpu", {"units": u, "seed": s}) for s in range(4)] for u in (100, 400))
        >>> str(time_left([*small[1:], *large[1:]], [(small[0], 60.0), (large[0], 600.0)], jobs=3))
        'about 11 min left'
    """
    seconds: defaultdict[str, defaultdict[_Items, list[float]]] = defaultdict(lambda: defaultdict(list))
    for cell, took in finished:
        seconds[cell.experiment][_items(cell.config)].append(took)
    known: dict[tuple[str, _Items], float | None] = {}

    def expected(cell: Cell) -> float | None:
        key = (cell.experiment, _items(cell.config))
        if key not in known:
            known[key] = _of_most_alike(key[1], seconds[cell.experiment])
        return known[key]

    beside, apart = ([expected(cell) for cell in cells] for cells in (waiting, alone))
    told = [took for took in beside if took is not None]
    total = max(sum(told) / jobs, max(told, default=0.0)) + sum(took for took in apart if took is not None)
    return Left(total, sum(took is None for took in (*beside, *apart)))


def _items(config: Config) -> _Items:
    return frozenset((key, json.dumps(value, sort_keys=True)) for key, value in config.items() if key != "seed")


def _of_most_alike(items: _Items, seconds: dict[_Items, list[float]]) -> float | None:
    most = max((len(items & other) for other in seconds), default=0)
    alike = [took for other, times in seconds.items() if len(items & other) == most for took in times]
    return fmean(alike) if alike else None


def duration(seconds: float) -> str:
    """Seconds as a person says them.

    Example:
        >>> [duration(s) for s in (0.4, 59, 90, 5400, 200_000)]
        ['0 s', '59 s', '2 min', '1.5 h', '2.3 days']
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 48 * 3600 else f"{seconds / 86400:.1f} days"
