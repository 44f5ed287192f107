"""The figures of the page on uncertainty: plotly from the numbers of an evaluation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vardrop.report.figures import PALETTE, _plain, _style
from vardrop.report.uncertainty_words import Position

MODEL, OTHER, IDEAL, CHANCE = PALETTE[0], PALETTE[1], PALETTE[2], PALETTE[6]
MARKER = "where the slider is"  # the trace that the page moves


def risk(positions: Sequence[Position], columns: Mapping[str, Any], at: int, numbers: bool) -> go.Figure:
    """What is left to the model against what a person gets, with a marker at one position.

    Args:
        positions: of the slider.
        columns: of :func:`vardrop.evaluation.referral.referral`, for the ideal order.
        at: the position of the marker.
        numbers: whether the error is a root mean squared error, not a share.
    """
    x = [position.share for position in positions]
    ideal = [loss if loss is None else loss**0.5 if numbers else 100 * loss for loss in columns["ideal"]]
    chance = [positions[0].error if position.error is not None else None for position in positions]
    unit = "" if numbers else "%"
    figure = make_subplots()
    for y, name, colour, dash in (
        (chance, "at random", CHANCE, "dot"),
        (ideal, "by someone who knows the mistakes", IDEAL, "dash"),
        ([position.error for position in positions], "least certain first", MODEL, "solid"),
    ):
        line = {"color": colour, "width": 3 if dash == "solid" else 1.5, "dash": dash}
        hover = f"%{{y:.3g}}{unit}"
        figure.add_trace(go.Scatter(x=x, y=y, name=name, mode="lines", line=line, hovertemplate=hover))
    marker = {"color": MODEL, "size": 13, "line": {"color": "#ffffff", "width": 2}}
    here = positions[at]
    figure.add_trace(
        go.Scatter(
            x=[here.share], y=[here.error], name=MARKER, mode="markers", marker=marker, showlegend=False,
            hoverinfo="skip", cliponaxis=False,
        )
    )  # fmt: skip
    figure.add_shape(
        type="rect", x0=0, x1=here.share, y0=0, y1=1, yref="paper", fillcolor=MODEL, opacity=0.10, line_width=0,
        layer="below",
    )  # fmt: skip
    figure.update_xaxes(title_text="handed to a person (%)", range=[-1, 101])
    label = "RMSE of what is kept" if numbers else "error of what is kept (%)"
    figure.update_yaxes(title_text=label, rangemode="tozero")
    return _style(figure, 380).update_layout(legend={"x": 0, "xanchor": "left"}, margin={"t": 56})


def reliability(bins: Sequence[Mapping[str, Any]]) -> go.Figure:
    """How often the model is right against how sure it is, and below it how many examples each point stands for.

    Args:
        bins: ``low``, ``high``, ``confidence``, ``accuracy`` (means of the bin) and ``count``; empty ones are left out.
    """
    full = [row for row in bins if row["count"]]
    sure, right = (100 * np.array([row[name] for row in full]) for name in ("confidence", "accuracy"))
    counts = np.array([row["count"] for row in full])
    share = (right / 100 * counts + 2) / (counts + 4)  # Agresti and Coull's, which has a width at 0 and 1 too
    margin = 196 * np.sqrt(share * (1 - share) / (counts + 4))
    high, low = np.minimum(100 * share + margin, 100), np.maximum(100 * share - margin, 0)
    figure = make_subplots(rows=2, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.72, 0.28])
    diagonal = {"x": [0, 100], "y": [0, 100], "mode": "lines", "hoverinfo": "skip", "showlegend": False}
    figure.add_trace(go.Scatter(line={"color": CHANCE, "width": 1.5, "dash": "dot"}, **diagonal), row=1, col=1)
    points = go.Scatter(
        x=sure, y=right, mode="markers+lines", showlegend=False, customdata=counts,
        marker={"color": MODEL, "size": 8}, line={"color": MODEL, "width": 1.5},
        error_y={"type": "data", "array": np.maximum(high - right, 0), "arrayminus": np.maximum(right - low, 0),
                 "thickness": 1.5, "width": 0, "color": MODEL},
        hovertemplate="%{x:.1f}% sure, %{y:.1f}% right<br>%{customdata:,} examples<extra></extra>",
    )  # fmt: skip
    figure.add_trace(points, row=1, col=1)
    edges = 100 * np.array([[row["low"], row["high"]] for row in full]).reshape(-1, 2)
    bars = go.Bar(
        x=edges.mean(1), y=counts, width=0.9 * (edges[:, 1] - edges[:, 0]), marker={"color": CHANCE}, showlegend=False,
        hovertemplate="%{y:,} examples<extra></extra>", text=[f"{c:,}" for c in counts], textposition="outside",
        textfont={"size": 10}, cliponaxis=False, textangle=0, constraintext="none",
    )  # fmt: skip
    figure.add_trace(bars, row=2, col=1)
    top = float(np.log10(max(counts.max(initial=1), 1))) + 0.6  # room for the counts above the bars
    figure.update_yaxes(title_text="right (%)", range=[0, 103], row=1, col=1)
    figure.update_yaxes(type="log", range=[-0.3, top], showticklabels=False, title_text="examples", row=2, col=1)
    figure.update_xaxes(title_text="sure (%)", range=[-1, 103], row=2, col=1)
    figure = _style(figure, 400)
    figure.update_yaxes(showgrid=False, row=2, col=1)
    return figure.update_layout(hovermode="closest")


def distributions(
    edges: Sequence[float], shares: Sequence[tuple[str, Sequence[float]]], unit: str, threshold: float | None = None
) -> go.Figure:
    """Two histograms over each other: the scores of test examples, and of those from elsewhere.

    Args:
        edges: of the bins.
        shares: names, and the share of each set in each bin; the test examples first.
        unit: of the score, with its name.
        threshold: where to draw a line, which the page moves; None for a score that decides nothing.
    """
    cuts = np.asarray(edges)
    figure = make_subplots()
    for (name, values), colour in zip(shares, (MODEL, OTHER), strict=True):
        bars = go.Bar(
            x=(cuts[:-1] + cuts[1:]) / 2, y=100 * np.asarray(values), width=np.diff(cuts), name=_plain(name),
            marker={"color": colour, "line": {"width": 0}}, opacity=0.6, hovertemplate="%{y:.1f}% of " + _plain(name),
        )  # fmt: skip
        figure.add_trace(bars)
    if threshold is not None:
        line = {"color": CHANCE, "width": 2, "dash": "dot"}
        figure.add_shape(type="line", x0=threshold, x1=threshold, y0=0, y1=1, yref="paper", line=line)
    figure.update_xaxes(title_text=unit)
    figure.update_yaxes(title_text="% of examples", rangemode="tozero")
    return _style(figure, 280).update_layout(barmode="overlay", showlegend=True)


def intervals(rows: Sequence[Mapping[str, float]]) -> go.Figure:
    """How many targets are within intervals that promise a share of them.

    Args:
        rows: ``nominal`` and ``observed`` shares.
    """
    figure = make_subplots()
    ends = [0, 100]
    figure.add_trace(
        go.Scatter(
            x=ends, y=ends, name="as promised", mode="lines", line={"color": CHANCE, "width": 1.5, "dash": "dot"}
        )
    )
    x, y = (100 * np.array([row[name] for row in rows]) for name in ("nominal", "observed"))
    line = {"color": MODEL, "width": 2}
    hover = "%{y:.1f}% of the targets<extra></extra>"
    figure.add_trace(go.Scatter(x=x, y=y, name="observed", mode="lines+markers", line=line, hovertemplate=hover))
    figure.update_xaxes(title_text="promised (%)", range=[0, 101])
    figure.update_yaxes(title_text="within the interval (%)", range=[0, 103])
    return _style(figure, 340)
