"""The one table that a run prints, and the file it can leave."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Row

HEADER = ("benchmark", "variant", "ratio", "quartiles", "median", "rounds", "goal", "met")
_LIBRARIES = ("vardrop", "bayesian-torch", "torchbnn", "blitz-bayesian-pytorch", "timm", "baal", "torch-uncertainty")


def _amount(row: Row) -> str:
    if row.amount is None:
        return ""
    if row.unit == "bytes":
        return f"{row.amount / 2**20:.0f} MiB"
    return f"{row.amount:.2f} s" if row.amount >= 1 else f"{row.amount * 1e3:.1f} ms"


def cells(rows: Sequence[Row]) -> list[tuple[str, ...]]:
    """The text of every cell; the name of a benchmark stands on its first line only."""
    lines: list[tuple[str, ...]] = []
    last = ""
    for row in rows:
        name = "" if row.benchmark == last else row.benchmark
        last = row.benchmark
        variant = f"{row.variant} ({row.note})" if row.note else row.variant
        if row.ratio is None or row.quartiles is None:
            lines.append((name, variant, "", "", "", "", "", ""))
            continue
        goal = "" if row.goal is None else f"<= {row.goal:g}"
        met = {None: "", True: "yes", False: "NO"}[row.met]
        low, high = row.quartiles
        lines.append(
            (name, variant, f"{row.ratio:.2f}", f"{low:.2f}-{high:.2f}", _amount(row), str(row.rounds), goal, met)
        )
    return lines


def plain(rows: Sequence[Row]) -> str:
    """The table as text, with nothing but spaces and dashes."""
    lines = [HEADER, *cells(rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]

    def text(line: tuple[str, ...]) -> str:
        left = [cell.ljust(width) for cell, width in zip(line[:2], widths[:2], strict=True)]
        right = [cell.rjust(width) for cell, width in zip(line[2:], widths[2:], strict=True)]
        return "  ".join(left + right).rstrip()

    return "\n".join([text(HEADER), "  ".join("-" * width for width in widths), *map(text, lines[1:])])


def show(rows: Sequence[Row], title: str) -> None:
    """Print the table, with rich where it is installed."""
    try:
        from rich.console import Console
        from rich.table import Table
        from rich.text import Text
    except ImportError:
        print(f"{title}\n\n{plain(rows)}")
        return
    table = Table(title=title, title_justify="left")
    for column, name in enumerate(HEADER):
        table.add_column(name, justify="left" if column < 2 else "right", no_wrap=column != 1)
    lines = cells(rows)
    for index, line in enumerate(lines):
        style = {"yes": "green", "NO": "bold red"}.get(line[-1], "")
        ends = index + 1 < len(lines) and bool(lines[index + 1][0])
        table.add_row(*(Text(cell) for cell in line[:-1]), Text(line[-1], style=style), end_section=ends)
    console = Console()
    if not console.is_terminal:  # a pipe or a file has no width, and would fold the table to 80 columns
        console.width = 160
    console.print(table)


def device_name() -> str:
    """The processor, in the words of the system."""
    try:
        info = Path("/proc/cpuinfo").read_text()
    except OSError:
        info = ""
    names = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def document(rows: Sequence[Row]) -> dict[str, Any]:
    """Everything that was measured, and where."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": device_name(),
        "system": platform.platform(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "libraries": {name: _version(name) for name in _LIBRARIES},
        "command": sys.argv[1:],
        "rows": [{**dataclasses.asdict(row), "met": row.met} for row in rows],
    }


def write(rows: Sequence[Row], path: Path) -> None:
    """Write :func:`document` as JSON."""
    path.write_text(json.dumps(document(rows), indent=1) + "\n")
