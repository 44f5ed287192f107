"""Cells that did not end well: what to say of them once the others are finished."""

from __future__ import annotations

import traceback
from collections.abc import Iterable
from dataclasses import dataclass

from vardrop.reproduce.experiment import Cell


@dataclass(frozen=True)
class Failure:
    """Why a cell has no result, in words that any process can pass on.

    Attributes:
        words: what to say.
        ours: whether it is an error of ours, which says what to do; anything else is a bug.
    """

    words: str
    ours: bool

    @classmethod
    def of(cls, error: Exception) -> Failure:
        """From an error: one line if it is ours, its traceback if it is a bug."""
        line = in_one_line(error)
        if line is not None:
            return cls(line, ours=True)
        return cls("".join(traceback.format_exception(error)).rstrip(), ours=False)


def in_one_line(error: BaseException) -> str | None:
    """An error of ours, or of a package that is not installed, as one line; None for a bug."""
    if isinstance(error, ValueError | TypeError | OSError | ModuleNotFoundError) and str(error).startswith("vardrop."):
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"vardrop.reproduce: this needs {error.name}, which is not installed; pip install 'vardrop[reproduce]'"
    return None


def listed(failed: Iterable[tuple[Cell, Failure]]) -> str:
    """Every error once, with the cells that it ended."""
    cells: dict[Failure, list[Cell]] = {}
    for cell, failure in failed:
        cells.setdefault(failure, []).append(cell)
    lines = []
    for failure, its in cells.items():
        lines.append(f"error: {failure.words}" if failure.ours else failure.words)
        lines += [f"  in experiment {c.experiment!r} at scale {c.scale}, configuration {c.config}" for c in its]
    return "\n".join(lines)
