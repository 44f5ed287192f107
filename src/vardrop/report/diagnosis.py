"""The page on a diagnosis: every BatchNorm against 1, what is wrong in the order of harm, and what cures did."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vardrop.report import diagnosis_figures as figures
from vardrop.report.pages import _embed, _render, _save, number


def write_diagnosis(result: Mapping[str, Any], out: Path) -> Path:
    """Make the page of a diagnosis: one file that opens from a disk, without a network.

    Args:
        result: what ``vardrop diagnose`` writes to ``diagnosis.json`` (:func:`vardrop.diagnosis.record.record`).
        out: the HTML file.

    Returns:
        ``out``.

    Raises:
        OSError: if it cannot be written; a page that was there is still there.
    """
    fix = result["fix"]
    page = _render(
        "diagnosis.html.j2",
        result=result,
        headline=headline(result),
        shifts=_embed(figures.shifts(result["batchnorms"]), "shifts"),
        after=_embed(figures.after(result["batchnorms"], fix["attempts"]), "after") if fix else None,
        name_of=figures.name_of,
        small=small,
        reasons=_by_reason(result),
    )
    return _save(page, Path(out))


def headline(result: Mapping[str, Any]) -> str:
    """The diagnosis in a sentence."""
    count, norms = len(result["findings"]), len(result["batchnorms"])
    if not count:
        return f"Nothing wrong was found, in {norms} BatchNorm layers and {result['examples']} examples."
    worst = result["findings"][0]
    others = "" if count == 1 else f", and {count - 1} other finding{'' if count == 2 else 's'}"
    return f"The worst is {worst['rule'].replace('-', ' ')} at {worst['where']}: {worst['measure']}{others}."


def small(value: float | None) -> str:
    """A number to read, in which rounding errors are 0."""
    return "0" if value is not None and abs(value) < 1e-6 else number(value, 3)


def _by_reason(result: Mapping[str, Any]) -> list[tuple[str, list[str]]]:
    """What could not be judged, names that share a reason together."""
    found: dict[str, list[str]] = {}
    for entry in result["unjudged"]:
        found.setdefault(entry["reason"], []).append(entry["where"])
    return list(found.items())
