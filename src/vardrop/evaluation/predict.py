"""The table of `vardrop predict`: a row an example, what the run says and how unsure it is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from vardrop.evaluation.answers import Classes, Passes, answer, log_of, with_temperature
from vardrop.evaluation.examples import Examples
from vardrop.evaluation.runs import OpenRun

INTERVAL = 0.95  # the share of the mixture between ``lower`` and ``upper``


@dataclass(frozen=True)
class Table:
    """What `vardrop predict` found.

    Attributes:
        columns: name -> ``[N]``.
        more: arrays that are more than a column.
        summary: in a sentence.
        doubt: the column that says how unsure the run is, by which the most doubtful rows are shown.
    """

    columns: dict[str, Any]
    more: dict[str, Any]
    summary: str
    doubt: str


def predict(run: OpenRun, examples: Examples, passes: Passes, temperature: float | None = None) -> Table:
    """Predict examples.

    For classes: ``predicted``, its ``probability`` (after the temperature, if there is one), ``entropy`` and
    ``mutual_information`` in nats, ``variation_ratio`` (these two not of a single pass). For numbers: ``mean``, ``std``
    of the passes, ``total_std`` with the noise of the data, and the ends ``lower`` and ``upper`` of the middle 95 % of
    the mixture. ``label`` is there where any truth is known.

    Args:
        run: that predicts.
        examples: that are predicted.
        passes: how.
        temperature: that probabilities are softened by; it does not change the entropies, which rank examples.

    Raises:
        ValueError: as :func:`vardrop.evaluation.answers.answer`, and for a temperature of numbers.
    """
    found = answer(run, examples.x, passes)
    columns: dict[str, Any] = {"index": np.arange(len(examples.x))}
    if isinstance(found, Classes):
        columns |= _labels(examples, run.data.classes)
        return _classes(run, examples, found, columns, temperature)
    if temperature is not None:
        raise ValueError(
            f"vardrop.predict: a temperature is for classes, got {temperature} for a run on {run.data.name}, which "
            "predicts numbers; leave it out"
        )
    known = examples.known
    if known.any():
        columns["label"] = examples.y.double().numpy()
    lower, upper = found.interval(INTERVAL)
    for name, column in (
        ("mean", found.mean), ("std", found.std), ("total_std", found.total_std), ("lower", lower), ("upper", upper),
    ):  # fmt: skip
        columns[name] = column.numpy()
    summary = f"{len(found.mean)} examples of {examples.name}, {found.engine}"
    if known.any():
        y = examples.y.double()
        rmse = (found.mean - y)[known].square().mean().sqrt().item()
        within = ((lower <= y) & (y <= upper))[known].double().mean().item()
        summary += f": RMSE {rmse:.4g}, {100 * within:.1f} % of the targets between lower and upper"
    return Table(columns, {"samples": found.samples.numpy()}, summary, "std" if len(found.samples) > 1 else "total_std")


def fitted_temperature(run: OpenRun, passes: Passes) -> float:
    """The temperature that makes the rows kept back for validation most likely.

    Args:
        run: a classifier.
        passes: as for the predictions that it is for.

    Raises:
        ValueError: if the run kept no rows back, or predicts numbers.
    """
    held_back = run.validation()
    if held_back is None or run.regression:
        why = "one that predicts numbers" if run.regression else "one that kept no validation rows"
        raise ValueError(
            f"vardrop.evaluation: a temperature is fitted on the validation rows of a classifier, got {run.path}, "
            f"{why}; leave --calibrate out"
        )
    found = cast("Classes", answer(run, held_back[0], passes))
    return fit_temperature(found.probabilities, held_back[1])


def fit_temperature(probabilities: Tensor, y: Tensor) -> float:
    """The temperature under which labels are most likely, of probabilities ``[N, C]``; an error if there is none."""
    from vardrop.uncertainty import TemperatureScaling

    return TemperatureScaling().fit(log_of(probabilities), y).temperature.item()


def _labels(examples: Examples, classes: tuple[str, ...]) -> dict[str, Any]:
    """The names of the true classes, empty where not known; nothing where none is."""
    if not examples.known.any():
        return {}
    names = np.array([*classes, ""])  # the last is that of -1
    return {"label": names[examples.y.numpy()]}


def _classes(
    run: OpenRun, examples: Examples, found: Classes, columns: dict[str, Any], temperature: float | None
) -> Table:
    p = found.probabilities if temperature is None else with_temperature(found.probabilities, temperature)
    columns |= {
        "predicted": np.array(run.data.classes)[found.predicted.numpy()],
        "probability": p.amax(-1).numpy(),
        "entropy": found.predictive_entropy.numpy(),
    }
    if found.passes > 1:  # one pass does not disagree with itself
        columns["mutual_information"] = found.mutual_information.numpy()
        columns["variation_ratio"] = found.variation_ratio.numpy()
    summary = f"{len(p)} examples of {examples.name}, {found.engine}"
    summary += "" if temperature is None else f", temperature {temperature:.3g}"
    known = examples.known
    if known.any():
        wrong = (found.predicted != examples.y)[known].double().mean().item()
        summary += f": error {100 * wrong:.2f} %"
    doubt = "entropy"
    more = {"probabilities": p.numpy(), "classes": np.array(run.data.classes)}
    return Table(columns, more, summary, doubt)


def most_doubtful(table: Table, number: int) -> Tensor:
    """Rows, the most doubtful first."""
    doubt = torch.from_numpy(np.asarray(table.columns[table.doubt], float))
    return doubt.argsort(descending=True, stable=True)[:number]
