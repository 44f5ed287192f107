"""The figures of the pages: plotly from the numbers of a run, nothing read and nothing written here.

Colours are mid-tones that hold on a light and on a dark page; text and grid are coloured by the page's style sheet.
"""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from vardrop.report.reading import QUANTILES, Run

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
PALETTE = ("#3f7fd0", "#d1703c", "#2a9d8f", "#b0589f", "#c9a227", "#7a6fd0", "#8a94a6", "#c44e5a")
DASHES = ("solid", "dash", "dot", "dashdot")
_TRAINING, _VALIDATION, _KL, _RATE = "#8a94a6", "#3f7fd0", "#d1703c", "#2a9d8f"
_FEW = 12  # epochs: so few are points worth seeing, and one alone has no line


def curves(run: Run) -> go.Figure | None:
    """Training and validation nll over the epochs, and below it the KL where there is one."""
    epochs = [line["epoch"] for line in run.metrics]
    nll = {name: _column(run, name) for name in ("train_nll", "val_nll")}
    if not any(value is not None for values in nll.values() for value in values):
        return None
    kl = _column(run, "kl")
    rows = 2 if any(kl) else 1  # a model without random weights has a KL of 0, which is no curve
    figure = make_subplots(rows=rows, shared_xaxes=True, vertical_spacing=0.07, row_heights=[0.62, 0.38][:rows])
    for name, label, colour in (("train_nll", "training", _TRAINING), ("val_nll", "validation", _VALIDATION)):
        if any(value is not None for value in nll[name]):
            figure.add_trace(_line(epochs, nll[name], label, colour, "%{y:.4g} nats"), row=1, col=1)
    _scale(figure, [value for values in nll.values() for value in values], "nll (nats per example)", row=1)
    if rows == 2:
        figure.add_trace(_line(epochs, kl, "KL", _KL, "%{y:.5g} nats", legend=False), row=2, col=1)
        figure.update_yaxes(title_text="KL (nats)", exponentformat="SI", row=2, col=1)
    if run.best_epoch is not None:
        figure.add_vline(x=run.best_epoch, line={"color": _TRAINING, "width": 1, "dash": "dot"}, row="all", col=1)
        left = run.best_epoch > (epochs[0] + epochs[-1]) / 2  # the words go where there is room
        figure.add_annotation(
            x=run.best_epoch, y=1.0, yref="y domain", text=f"best epoch {run.best_epoch}", showarrow=False,
            xanchor="right" if left else "left", xshift=-5 if left else 5, yanchor="top",
        )  # fmt: skip
    figure.update_xaxes(title_text="epoch", row=rows, col=1)
    return _style(figure, 480 if rows == 2 else 320)


def rates(run: Run, weight: str, top: float) -> go.Figure:
    """The rates of one weight over the epochs as quantile bands, and on their side the histogram of the final ones."""
    history = [(line["epoch"], line["rates"][weight]) for line in run.metrics if weight in (line.get("rates") or {})]
    final = run.final_rates.get(weight)
    widths = [1.0] if not (history and final) else [0.7, 0.3]
    figure = make_subplots(cols=len(widths), shared_yaxes=True, column_widths=widths, horizontal_spacing=0.06)
    if history:
        epochs = [epoch for epoch, _ in history]
        q05, q25, q50, q75, q95 = ([row[name] for _, row in history] for name in QUANTILES)
        for low, high, opacity in ((q05, q95, 0.16), (q25, q75, 0.30)):
            band = {"line": {"width": 0}, "hoverinfo": "skip", "mode": "lines", "showlegend": False}
            figure.add_trace(go.Scatter(x=epochs, y=low, **band), row=1, col=1)
            fill = f"rgba(42, 157, 143, {opacity})"
            figure.add_trace(go.Scatter(x=epochs, y=high, fill="tonexty", fillcolor=fill, **band), row=1, col=1)
        median = _line(epochs, q50, "median", _RATE, "median %{y:.3f}", legend=False)
        figure.add_trace(median, row=1, col=1)
        figure.update_xaxes(title_text="epoch", row=1, col=1)
    if final:
        column = len(widths)
        edges, counts = np.asarray(final["edges"], float), np.asarray(final["counts"], float)
        share = 100 * counts / max(counts.sum(), 1)
        bars = go.Bar(
            x=share, y=(edges[:-1] + edges[1:]) / 2, width=np.maximum(np.diff(edges), top / 150), orientation="h",
            marker={"color": _RATE, "line": {"width": 0}}, showlegend=False,
            hovertemplate="%{x:.1f}% of the rates near %{y:.3f}<extra></extra>",
        )  # fmt: skip
        figure.add_trace(bars, row=1, col=column)
        figure.update_xaxes(title_text="% of rates", rangemode="tozero", nticks=4, row=1, col=column)
    figure.update_yaxes(range=[0, top])
    figure.update_yaxes(title_text="dropout rate p", row=1, col=1)
    return _style(figure, 250)


def top_rate(run: Run) -> float:
    """Upper end of the axis of rates, one for all weights of a run so that the eye can compare them."""
    seen = [row["max"] for row in run.final_rates.values()]
    seen += [row["q95"] for line in run.metrics for row in (line.get("rates") or {}).values()]
    return min(1.0, 1.08 * max((value for value in seen if math.isfinite(value)), default=1.0)) or 1.0


def validation_curves(runs: Sequence[Run], labels: Sequence[str]) -> go.Figure | None:
    """The validation nll of several runs over the epochs, a dot at the best epoch of each."""
    figure = make_subplots()
    values: list[float | None] = []
    for i, (run, label) in enumerate(zip(runs, labels, strict=True)):
        nll = _column(run, "val_nll")
        if not any(value is not None for value in nll):
            continue
        epochs = [line["epoch"] for line in run.metrics]
        values += nll
        colour = PALETTE[i % len(PALETTE)]
        trace = _line(epochs, nll, label, colour, "%{y:.4g} nats")
        trace.update(line_dash=DASHES[i // len(PALETTE) % len(DASHES)], legendgroup=str(i))
        figure.add_trace(trace)
        if run.best_epoch in epochs:
            best = go.Scatter(
                x=[run.best_epoch], y=[nll[epochs.index(run.best_epoch)]], mode="markers", legendgroup=str(i),
                marker={"color": colour, "size": 9}, showlegend=False, hoverinfo="skip",
            )  # fmt: skip
            figure.add_trace(best)
    if not values:
        return None
    _scale(figure, values, "validation nll (nats per example)", row=1)
    figure.update_xaxes(title_text="epoch")
    return _style(figure, 420)


def rates_by_layer(runs: Sequence[Run], labels: Sequence[str]) -> go.Figure | None:
    """The mean of the final rates of each weight, a mark for each run, with the range of the middle 90%."""
    layers = list(dict.fromkeys(layer for run in runs for layer in run.final_rates))
    drawn = [(i, run) for i, run in enumerate(runs) if run.final_rates]
    if not drawn:
        return None
    figure = make_subplots()
    for place, (i, run) in enumerate(drawn):
        shift = 0.5 * (place - (len(drawn) - 1) / 2) / len(drawn)  # beside each other, not over each other
        names = [layer for layer in layers if layer in run.final_rates]
        rows = [run.final_rates[layer] for layer in names]
        means = np.array([row["mean"] for row in rows])
        spread = np.array([_middle(row) for row in rows])
        above, below = np.maximum(spread[:, 1] - means, 0), np.maximum(means - spread[:, 0], 0)
        marks = go.Scatter(
            x=[layers.index(name) + shift for name in names], y=means, name=_plain(labels[i]), mode="markers",
            marker={"color": PALETTE[i % len(PALETTE)], "size": 9},
            error_y={"type": "data", "array": above, "arrayminus": below, "thickness": 1.5, "width": 0},
            customdata=[_plain(name) for name in names], hovertemplate="%{customdata}: mean %{y:.3f}",
        )  # fmt: skip
        figure.add_trace(marks)
    ticks = {"tickvals": list(range(len(layers))), "ticktext": [_plain(layer) for layer in layers]}
    figure.update_xaxes(title_text="weight, from input to output", range=[-0.5, len(layers) - 0.5], **ticks)
    figure.update_yaxes(title_text="dropout rate p", rangemode="tozero")
    return _style(figure, 380).update_layout(hovermode="closest", showlegend=True)


def _middle(row: dict[str, Any]) -> tuple[float, float]:
    """The 5% and the 95% quantile of a histogram, to the width of its bins."""
    edges, counts = np.asarray(row["edges"], float), np.asarray(row["counts"], float)
    if not counts.sum():
        return row["min"], row["max"]
    below = np.concatenate([[0.0], counts.cumsum() / counts.sum()])
    low, high = np.clip(np.interp([0.05, 0.95], below, edges), row["min"], row["max"])
    return float(low), float(high)


def _plain(text: str) -> str:
    """Plotly reads tags in its labels, and a name of a weight or a folder is not markup."""
    return html.escape(text, quote=False)


def _column(run: Run, name: str) -> list[float | None]:
    """One number of every epoch; what is absent or not finite is a gap in the line."""
    values = [line.get(name) for line in run.metrics]
    return [value if value is not None and math.isfinite(value) else None for value in values]


def _line(
    x: list[int], y: Sequence[float | None], name: str, colour: str, hover: str, legend: bool = True
) -> go.Scatter:
    return go.Scatter(
        x=x, y=y, name=_plain(name), mode="lines+markers" if len(x) <= _FEW else "lines", showlegend=legend,
        line={"color": colour, "width": 2}, marker={"size": 5}, hovertemplate=hover,
    )  # fmt: skip


def _scale(figure: go.Figure, values: Sequence[float | None], title: str, row: int) -> None:
    """A log scale where values span more than a factor of ten, and the axis says so."""
    seen = [value for value in values if value is not None]
    log = min(seen) > 0 and max(seen) > 10 * min(seen)
    axis: dict[str, Any] = {}
    if log:  # plotly's own ticks on a log scale are bare digits between the decades
        decades = range(math.floor(math.log10(min(seen))), math.ceil(math.log10(max(seen))) + 1)
        digits = (1, 2, 5) if len(decades) <= 4 else (1,)
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        axis = {"type": "log", "tickvals": ticks, "ticktext": [f"{tick:.3g}" for tick in ticks]}
    figure.update_yaxes(title_text=title + (", log scale" if log else ""), row=row, col=1, **axis)


def _style(figure: go.Figure, height: int) -> go.Figure:
    figure.update_layout(
        template="none", height=height, autosize=True, hovermode="x unified", bargap=0,
        margin={"l": 64, "r": 12, "t": 28, "b": 48}, font={"family": FONT, "size": 13},
        paper_bgcolor="rgba(0,0,0,0)", plot_bgcolor="rgba(0,0,0,0)",
        hoverlabel={"bgcolor": "#ffffff", "bordercolor": "#d7dbe2", "font": {"color": "#1d2430"}},
        legend={"orientation": "h", "x": 1, "xanchor": "right", "y": 1, "yanchor": "bottom"},
        legend_bgcolor="rgba(0,0,0,0)",
    )  # fmt: skip
    figure.update_xaxes(showgrid=False, zeroline=False, showline=True, linewidth=1, ticks="", fixedrange=True)
    figure.update_yaxes(showgrid=True, gridwidth=1, zeroline=False, ticks="", title_standoff=10, fixedrange=True)
    figure.update_xaxes(title_font_size=13).update_yaxes(title_font_size=13)
    return figure
