"""The figures of the page on a diagnosis: every BatchNorm against 1, before and after."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vardrop.report.figures import PALETTE, _plain, _style

MEASURED, THEORY, RUNNING = PALETTE[0], PALETTE[1], PALETTE[6]
_ROW, _FRAME = 26, 110  # heights
_NAMES = {
    "recalibrate": "recalibrated", "lower_rate": "lower rate", "uniform": "uniform noise", "move": "moved",
    "layernorm": "LayerNorm",
}  # fmt: skip


def name_of(strategy: str) -> str:
    """What a page calls a cure."""
    return _NAMES.get(strategy, strategy)


def shifts(batchnorms: Sequence[Mapping[str, Any]]) -> go.Figure | None:
    """Every BatchNorm as a bar of k that begins at 1, with two standard errors; theory and running variance as marks.

    Args:
        batchnorms: rows of a diagnosis, in the order in which they run.
    """
    if not batchnorms:
        return None
    names = [_plain(row["name"]) for row in batchnorms]
    k = [row["k"] for row in batchnorms]
    figure = make_subplots()
    bars = go.Bar(
        x=[value - 1 for value in k], y=names, base=1, orientation="h", name="k, measured", width=0.62,
        marker={"color": MEASURED, "line": {"width": 0}}, customdata=k,
        error_x={"type": "data", "array": [2 * (row["k_error"] or 0.0) for row in batchnorms], "thickness": 1.5,
                 "width": 0, "color": "#8a94a6"},
        hovertemplate="k = %{customdata:.3f}<extra></extra>",
    )  # fmt: skip
    figure.add_trace(bars)
    for title, key, colour, symbol in (
        ("by theory", "theory", THEORY, "diamond-open"),
        ("running statistics", "running", RUNNING, "line-ns-open"),
    ):
        known = [row for row in batchnorms if row[key] is not None and (key != "running" or row["seen"] != 0)]
        if known:
            marks = go.Scatter(
                x=[math.sqrt(row[key]) for row in known], y=[_plain(row["name"]) for row in known], mode="markers",
                name=title, marker={"color": colour, "symbol": symbol, "size": 10, "line": {"width": 2}},
                hovertemplate=f"{title} %{{x:.3f}}<extra></extra>",
            )  # fmt: skip
            figure.add_trace(marks)
    return _framed(figure, len(names))


def after(batchnorms: Sequence[Mapping[str, Any]], attempts: Sequence[Mapping[str, Any]]) -> go.Figure | None:
    """k of every BatchNorm as it was, and with each cure.

    Args:
        batchnorms: rows of the diagnosis before.
        attempts: of the cures.
    """
    tried = [attempt for attempt in attempts if attempt["ks"]]
    if not tried or not batchnorms:
        return None
    names = [row["name"] for row in batchnorms]
    sets = [("as it was", {row["name"]: (row["k"], row["k_error"]) for row in batchnorms})]
    sets += [(name_of(attempt["strategy"]), attempt["ks"]) for attempt in tried]
    figure = make_subplots()
    for i, (title, values) in enumerate(sets):
        known = [name for name in names if name in values]
        marks = go.Scatter(
            x=[values[name][0] for name in known], y=[_plain(name) for name in known], mode="markers", name=title,
            marker={"color": PALETTE[i % len(PALETTE)], "size": 9, "symbol": i},
            error_x={"type": "data", "array": [2 * (values[name][1] or 0.0) for name in known], "thickness": 1.5,
                     "width": 0},
            hovertemplate=f"{title}: k = %{{x:.3f}}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(marks)
    return _framed(figure, len(names)).update_layout(showlegend=True)


def _framed(figure: go.Figure, rows: int) -> go.Figure:
    """Names from top to bottom in the order in which the layers run, and a line at 1."""
    line = {"color": RUNNING, "width": 1.5, "dash": "dot"}
    figure.add_shape(type="line", x0=1, x1=1, y0=0, y1=1, yref="paper", line=line)
    figure = _style(figure, _FRAME + _ROW * max(rows, 2))
    figure.update_yaxes(type="category", autorange="reversed", showgrid=False, automargin=True)
    figure.update_xaxes(
        title_text="k: standard deviation of the input in training over that in evaluation", showgrid=True
    )
    return figure.update_layout(hovermode="closest", bargap=0.3, margin={"t": 44}, showlegend=True)
