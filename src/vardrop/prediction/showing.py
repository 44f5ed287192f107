"""Predictions as a table and as a picture."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from vardrop.prediction.moments import KINDS

if TYPE_CHECKING:
    from vardrop.prediction.prediction import Prediction

_UNCERTAIN = ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio")


def _library(name: str, what: str) -> Any:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        top = name.partition(".")[0]
        raise ModuleNotFoundError(
            f"vardrop.Prediction.{what}: needs {top}, got no such module; pip install {top}"
        ) from error


def columns(prediction: Prediction) -> dict[str, Any]:
    """Name -> one figure for every example; what has a place in an example is named by it."""
    found: dict[str, Any] = {}
    if prediction.kind in KINDS[:3]:
        found["predicted"] = prediction.predicted
        found["probability"] = prediction.probabilities.amax(prediction.class_dim)
        found |= {name: getattr(prediction, name) for name in _UNCERTAIN}
        if prediction.probabilities.ndim == 2:
            found |= {f"p{c}": column for c, column in enumerate(prediction.probabilities.unbind(1))}
    else:
        found = {"mean": prediction.mean, "std": prediction.std}
        if prediction.mean.ndim == 2 and prediction.mean.shape[1] == 1:
            found = {name: column.squeeze(1) for name, column in found.items()}
    return {
        name if entries.ndim < 2 else f"{name}[{','.join(map(str, place))}]": column
        for name, entries in found.items()
        for place, column in _places(entries)
    }


def _places(entries: Any) -> list[tuple[tuple[int, ...], Any]]:
    """The columns of ``[N, ...]`` with their indices."""
    import itertools

    indices = itertools.product(*map(range, entries.shape[1:]))
    return [(index, entries[(slice(None), *index)].detach().cpu().numpy()) for index in indices]


def table(prediction: Prediction) -> Any:
    """A pandas data frame with a row for every example."""
    return _library("pandas", "to_pandas").DataFrame(columns(prediction)).rename_axis("example")


def figure(prediction: Prediction) -> Any:
    """A plotly figure of the uncertainty of every example, in the order of their certainty."""
    graph = _library("plotly.graph_objects", "plot")
    if prediction.kind in KINDS[:3]:
        parts = {
            name: getattr(prediction, name).flatten(1).mean(1)
            if getattr(prediction, name).ndim > 1
            else getattr(prediction, name)
            for name in ("expected_entropy", "mutual_information")
        }
        order = (parts["expected_entropy"] + parts["mutual_information"]).argsort()
        names = {
            "expected_entropy": "in the data (expected entropy)",
            "mutual_information": "in the model (mutual information)",
        }
        bars = [
            graph.Bar(
                name=names[name],
                y=part[order].tolist(),
                customdata=order.tolist(),
                hovertemplate="example %{customdata}: %{y:.3g}",
            )
            for name, part in parts.items()
        ]
        picture = graph.Figure(bars)
        picture.update_layout(barmode="stack", bargap=0, yaxis_title="nats")
    else:
        mean, std = prediction.mean.flatten().double(), prediction.std.flatten().double()
        order = mean.argsort()
        error = {"type": "data", "array": (2 * std[order]).tolist()}
        points = graph.Scatter(
            y=mean[order].tolist(),
            error_y=error,
            mode="markers",
            customdata=order.tolist(),
            hovertemplate="entry %{customdata}: %{y:.4g}",
            name="mean and two standard deviations",
        )
        picture = graph.Figure([points])
        picture.update_layout(yaxis_title="mean and two standard deviations over the passes")
    picture.update_layout(
        xaxis_title="examples, the least first", template="plotly_white", title=f"{prediction.passes} passes"
    )
    return picture
