"""Results on disk: one JSON file for every finished cell, whole or not there at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vardrop.reproduce.experiment import SCALES, Cell, Config, Experiment, Row


@dataclass(frozen=True)
class Result:
    """A finished cell: its rows, and what they were computed with."""

    experiment: str
    scale: str
    config: Config
    seed: int | None
    versions: dict[str, str]  # of Python and the packages that matter
    commit: str | None  # of the source, "+changes" if it had uncommitted ones; None outside its repository
    device: str
    threads: int
    seconds: float
    rows: list[Row]

    @property
    def cell(self) -> Cell:
        """The cell that was run."""
        return Cell(self.experiment, self.scale, self.config)


def _written(value: Any, column: str) -> str:
    """A value as JSON; nan and infinities, which JSON has no words for, as text."""
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(str(value))
    if not isinstance(value, str | int | float | bool | None):
        raise TypeError(
            f"vardrop.reproduce: a row must hold text, numbers, bools or None, got {type(value).__name__} in {column!r}"
        )
    return json.dumps(value, ensure_ascii=False)


def write(result: Result, path: Path) -> None:
    """Write a result at once: under another name first, so that a kill or a full disk leaves no half file.

    Raises:
        OSError: if it cannot be written; whatever was at ``path`` is still there.
        TypeError: if a row holds anything but text, numbers, bools or None.
    """
    head = {name: value for name, value in asdict(result).items() if name != "rows"}
    rows = ["{" + ", ".join(f"{json.dumps(k)}: {_written(v, k)}" for k, v in row.items()) + "}" for row in result.rows]
    text = json.dumps(head, indent=1, ensure_ascii=False)[:-2] + ',\n "rows": [\n  ' + ",\n  ".join(rows) + "\n ]\n}\n"
    unfinished = path.with_name(f".{path.stem}.{os.getpid()}.unfinished")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except OSError as error:
        raise OSError(
            f"vardrop.reproduce: the result must go to {path}, which cannot be written ({error.strerror or error}); "
            "free some space or choose another place with --results, and run again: finished cells are kept"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            unfinished.unlink(missing_ok=True)


def read(path: Path) -> Result:
    """One result.

    Raises:
        ValueError: if the file is not JSON, or is not one of ours.
    """
    remedy = "delete it and run the experiment again"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"vardrop.reproduce: a result must be JSON, got {path} ({error}); {remedy}") from None
    wanted = {field.name for field in fields(Result)}
    if not isinstance(content, dict) or set(content) != wanted or not isinstance(content["rows"], list):
        found = ", ".join(content) if isinstance(content, dict) else type(content).__name__
        raise ValueError(
            f"vardrop.reproduce: a result must have {', '.join(sorted(wanted))}, got {found} in {path}; {remedy}"
        )
    return Result(**content)


def read_all(root: Path) -> list[Result]:
    """All results under a directory.

    Raises:
        ValueError: if there is no such directory, or a file in it is damaged.
    """
    if not root.is_dir():
        raise ValueError(
            f"vardrop.reproduce: results must be a directory, got {root}, which is not there; "
            "`vardrop reproduce run all --scale cpu` makes one, --results names another"
        )
    return [read(path) for path in sorted(root.glob("*/*/*.json"))]


def finished(results: Iterable[Result], experiment: Experiment, scale: str) -> tuple[list[Result], int]:
    """The results of an experiment's cells at a scale, in their order, and how many cells have none yet."""
    by_key = {result.cell.key: result for result in results}
    cells = experiment.at(scale)
    found = [by_key[cell.key] for cell in cells if cell.key in by_key]
    return found, len(cells) - len(found)


def left_over(results: Iterable[Result], experiments: dict[str, Experiment]) -> list[Result]:
    """Results that no cell asks for any more: the configuration or the experiment has changed since."""
    wanted = {cell.key for experiment in experiments.values() for scale in SCALES for cell in experiment.at(scale)}
    return [result for result in results if result.cell.key not in wanted]
