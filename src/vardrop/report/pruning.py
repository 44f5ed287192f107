"""The page of a pruned run: what was removed where, and what other thresholds would have left."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vardrop.report import pruning_figures as figures
from vardrop.report.pages import _embed, _render, _save
from vardrop.report.pruning_words import Setting, headline, part, settings, size, smaller, stages, totals, tuned
from vardrop.report.uncertainty import _script_json
from vardrop.report.uncertainty_words import count


def write_pruning(found: Mapping[str, Any], out: Path) -> Path:
    """Make the page of a pruned run: one file that opens from a disk, without a network.

    The slider shows the thresholds in ``found["positions"]``; ``index.html#threshold=2.5`` opens the page at the one
    that is nearest.

    Args:
        found: what ``vardrop prune`` writes to ``prune.json``.
        out: the HTML file.

    Returns:
        ``out``.

    Raises:
        OSError: if it cannot be written; a page that was there is still there.
    """
    slider = settings(found)
    at = next(i for i, row in enumerate(found["positions"]) if row["chosen"])
    numbers = found["task"] == "regression"
    names = [row["name"] for row in found["layers_removed"]]
    weights = [row["weights"] for row in found["layers_removed"]]
    measured = slider[at].value is not None
    page = _render(
        "pruning.html.j2",
        found=found,
        regression=numbers,
        headline=headline(found),
        smaller=smaller(found),
        slider=slider,
        at=at,
        slider_json=_script_json([{**dataclasses.asdict(each), "x": figures.amount(each)} for each in slider]),
        weights=weights,
        names=names,
        trade=_embed(figures.trade(slider, at, _written(found, slider[at]), numbers), "trade") if measured else None,
        bars=_embed(figures.layers(names, weights, slider[at].kept), "layers"),
        first=_first(found, slider, at),
        marker=figures.MARKER,
        stages=stages(found),
        tuned=tuned(found),
        total=totals(found["layers"]),
        part=part,
        count=count,
        size=size,
    )
    return _save(page, Path(out))


def _written(found: Mapping[str, Any], here: Setting) -> tuple[float, float] | None:
    """Size and validation error of the network that was written."""
    error = found["validation"].get("compact")
    if error is None:
        return None
    written = found["bytes"]["compact"]["compressed"]
    amount = found["weights"] - found["removed"] if here.bytes is None or written is None else written
    return amount, error if found["task"] == "regression" else 100 * error


def _first(found: Mapping[str, Any], slider: list[Setting], at: int) -> dict[str, Any]:
    """The picture of the first layer: its kind, and the figure."""
    first = found["first"]
    if first["kind"] == "filters":
        return {"kind": "filters", "figure": _embed(figures.filters(first["weights"]), "first"), "shape": [0, 0, 0]}
    if first["kind"] == "pixels":
        figure = figures.pixels(slider[at].inputs, first["shape"])
        return {"kind": "pixels", "figure": _embed(figure, "first"), "shape": first["shape"]}
    return {"kind": "columns", "figure": _embed(figures.columns(slider[at].inputs), "first"), "shape": [0, 0, 0]}
