"""The figures of the page on pruning: plotly from what ``prune.json`` holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vardrop.report.figures import PALETTE, _plain, _style
from vardrop.report.pruning_words import Setting

KEPT, REMOVED, WRITTEN = PALETTE[0], PALETTE[6], PALETTE[1]
MARKER = "where the slider is"  # the trace that the page moves
_SCALE = [[0, "rgba(138,148,166,0.13)"], [0.001, "rgba(63,127,208,0.22)"], [1, "#2456a0"]]
_SIGNED = [[0, "#b3513c"], [0.5, "#ffffff"], [1, "#2d6cb5"]]


def trade(settings: Sequence[Setting], at: int, written: tuple[float, float] | None, numbers: bool) -> go.Figure:
    """The error against the size, of every threshold, and of what was written.

    Args:
        settings: positions of the slider, by rising threshold.
        at: the position of the marker.
        written: size and error of the network that was written, with fine-tuning and rounding, if both are known.
        numbers: whether the error is a root mean squared error, not a share.
    """
    sized = settings[at].bytes is not None
    x = [amount(each) for each in settings]
    y = [each.value for each in settings]
    hover = "threshold %{customdata}<br>%{x:,} " + ("bytes" if sized else "weights")
    hover += "<br>%{y:.3g}" + ("" if numbers else " %") + "<extra></extra>"
    figure = make_subplots()
    line = {"color": KEPT, "width": 2}
    figure.add_trace(
        go.Scatter(
            x=x, y=y, name="all thresholds", mode="lines+markers", line=line, marker={"size": 5, "color": KEPT},
            customdata=[each.asked for each in settings], hovertemplate=hover,
        )
    )  # fmt: skip
    marker = {"color": KEPT, "size": 13, "line": {"color": "#ffffff", "width": 2}}
    figure.add_trace(
        go.Scatter(
            x=[x[at]], y=[y[at]], name=MARKER, mode="markers", marker=marker, showlegend=False, hoverinfo="skip",
            cliponaxis=False,
        )
    )  # fmt: skip
    if written is not None:
        star = {"symbol": "star", "size": 14, "color": WRITTEN}
        figure.add_trace(
            go.Scatter(
                x=[written[0]], y=[written[1]], name="as written", mode="markers", marker=star,
                hovertemplate=hover.replace("threshold %{customdata}", "the files in this folder"),
            )
        )  # fmt: skip
    seen = [*x, *([] if written is None else [written[0]])]
    ticks = [d * 10.0**e for e in range(10) for d in (1, 2, 5) if min(seen) / 2 <= d * 10.0**e <= max(seen) * 2]
    figure.update_xaxes(
        title_text=f"{'bytes of the compressed file' if sized else 'weights left'}, log scale", type="log",
        tickvals=ticks, ticktext=[_short(tick) for tick in ticks],
        range=[math.log10(min(seen)) - 0.08, math.log10(max(seen)) + 0.08],
    )  # fmt: skip
    figure.update_yaxes(title_text="RMSE on validation data" if numbers else "error on validation data (%)")
    figure.update_yaxes(rangemode="tozero")
    figure = _style(figure, 360)
    return figure.update_layout(hovermode="closest", showlegend=True, margin={"t": 40})


def amount(setting: Setting) -> int:
    """What a position is worth on the axis of sizes."""
    return sum(setting.kept) if setting.bytes is None else setting.bytes


def _short(tick: float) -> str:
    for unit, name in ((1e6, "M"), (1e3, "k")):
        if tick >= unit:
            return f"{tick / unit:g}{name}"
    return f"{tick:g}"


def layers(names: Sequence[str], weights: Sequence[int], kept: Sequence[int]) -> go.Figure:
    """Of every layer how much is kept and how much is removed, in percent; the first layer on top.

    Args:
        names: of the layers.
        weights: that they had.
        kept: that are left of them.
    """
    left = 100 * np.array(kept) / np.array(weights)
    figure = make_subplots()
    for name, values, numbers, colour, opacity in (
        ("kept", left, np.array(kept), KEPT, 1.0),
        ("removed", 100 - left, np.array(weights) - np.array(kept), REMOVED, 0.35),
    ):
        bars = go.Bar(
            y=[_plain(each) for each in names], x=values, orientation="h", name=name, opacity=opacity,
            marker={"color": colour, "line": {"width": 0}}, customdata=numbers,
            hovertemplate="%{y}: %{customdata:,} " + name + ", %{x:.1f} %<extra></extra>",
        )  # fmt: skip
        figure.add_trace(bars)
    figure.update_xaxes(title_text="% of the weights of the layer", range=[0, 100])
    figure.update_yaxes(autorange="reversed", showgrid=False, type="category", automargin=True, ticksuffix="  ")
    figure = _style(figure, 110 + 44 * len(names))
    figure.update_layout(barmode="stack", bargap=0.35, hovermode="closest", showlegend=True)
    return figure.update_layout(legend_traceorder="normal")


def pixels(inputs: Sequence[int], shape: tuple[int, int, int]) -> go.Figure:
    """How many weights of the first layer are left at every pixel, over all colours.

    Args:
        inputs: weights left at each input, ``[channels * height * width]``.
        shape: channels, height and width.
    """
    counts = np.asarray(inputs).reshape(shape).sum(0)
    heat = go.Heatmap(
        z=counts.tolist(), zmin=0, zmax=max(int(counts.max()), 1), colorscale=_SCALE, xgap=1, ygap=1,
        colorbar={"title": {"text": "weights left", "side": "right"}, "thickness": 10, "outlinewidth": 0, "nticks": 5},
        hovertemplate="row %{y}, column %{x}: %{z} weights<extra></extra>",
    )  # fmt: skip
    figure = _style(make_subplots(), 360)
    figure.add_trace(heat)
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain", visible=False)
    figure.update_xaxes(constrain="domain", visible=False)
    return figure.update_layout(hovermode="closest", margin={"l": 8, "r": 8, "t": 8, "b": 8})


def columns(inputs: Sequence[int]) -> go.Figure:
    """How many weights of the first layer are left at every column of a table."""
    bars = go.Bar(
        x=[f"x{i}" for i in range(1, len(inputs) + 1)], y=list(inputs), marker={"color": KEPT},
        hovertemplate="%{x}: %{y} weights<extra></extra>",
    )  # fmt: skip
    figure = _style(make_subplots(), 260)
    figure.add_trace(bars)
    figure.update_yaxes(title_text="weights left", rangemode="tozero")
    figure.update_xaxes(title_text="column", type="category")
    return figure.update_layout(bargap=0.25, hovermode="closest")


def filters(weights: Sequence[Sequence[Sequence[Sequence[float]]]]) -> go.Figure:
    """The filters of a first convolution beside each other; a removed weight is a gap.

    Args:
        weights: ``[maps, channels, height, width]``; the channels of a map stand side by side.
    """
    array = np.asarray(weights, float)
    maps, channels, height, width = array.shape
    array = np.where(array == 0, np.nan, array).transpose(0, 2, 1, 3).reshape(maps, height, channels * width)
    across = max(1, round(math.sqrt(2.2 * maps * height / (channels * width))))
    down = math.ceil(maps / across)
    wide, high = channels * width + 1, height + 1
    canvas = np.full((down * high - 1, across * wide - 1), np.nan)
    shapes = []
    for i, each in enumerate(array):
        y, x = i // across * high, i % across * wide
        canvas[y : y + height, x : x + channels * width] = each
        shapes.append(
            {
                "type": "rect", "x0": x - 0.5, "x1": x + channels * width - 0.5, "y0": y - 0.5, "y1": y + height - 0.5,
                "line": {"width": 1, "color": REMOVED}, "opacity": 0.6,
            }
        )  # fmt: skip
    top = float(np.nanmax(np.abs(canvas))) if np.isfinite(canvas).any() else 1.0
    z = [[None if math.isnan(value) else round(value, 5) for value in row] for row in canvas.tolist()]
    heat = go.Heatmap(
        z=z, zmin=-top, zmax=top, colorscale=_SIGNED, hoverongaps=False, hovertemplate="%{z:.3g}<extra></extra>",
        colorbar={"thickness": 10, "outlinewidth": 0, "nticks": 5},
    )  # fmt: skip
    figure = _style(make_subplots(), 380)
    figure.add_trace(heat)
    figure.update_yaxes(autorange="reversed", scaleanchor="x", constrain="domain", visible=False)
    figure.update_xaxes(constrain="domain", visible=False)
    return figure.update_layout(shapes=shapes, hovermode="closest", margin={"l": 8, "r": 8, "t": 8, "b": 8})
