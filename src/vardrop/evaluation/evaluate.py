"""What `vardrop evaluate` measures: error, calibration, what may be left to the model, what it finds strange.

Whatever is chosen (temperature, threshold) is chosen on the rows that training kept back, and told of the test rows.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from vardrop.evaluation.answers import Classes, Numbers, Passes, answer
from vardrop.evaluation.examples import strange
from vardrop.evaluation.measures import of_classes, of_numbers, selection, strangeness
from vardrop.evaluation.referral import referral
from vardrop.evaluation.runs import OpenRun


@dataclass(frozen=True)
class Evaluation:
    """What was found.

    Attributes:
        result: all of it as plain numbers, for ``evaluation.json``.
        x: the test rows.
        y: their truths.
        answers: to them.
    """

    result: dict[str, Any]
    x: Tensor
    y: Tensor
    answers: Classes | Numbers

    def most_doubtful(self, number: int) -> Tensor:
        """Test rows, the least certain first."""
        return self.answers.doubt.argsort(descending=True, stable=True)[:number]

    def sure_and_wrong(self, number: int) -> Tensor:
        """Test rows: mistakes, the surest first; of numbers those that are furthest off."""
        if isinstance(self.answers, Numbers):
            return self.answers.loss(self.y).argsort(descending=True, stable=True)[:number]
        sure = torch.where(self.answers.predicted != self.y, self.answers.probabilities.amax(-1), -1)
        order = sure.argsort(descending=True, stable=True)
        return order[sure[order] > 0][:number]


def evaluate(
    run: OpenRun,
    passes: Passes,
    ood: Sequence[str] = (),
    target_error: float | None = None,
    limit: int | None = None,
) -> Evaluation:
    """Measure a run on its test rows.

    Args:
        run: to measure.
        passes: how it is asked. A run without noise is asked once, and the result says so.
        ood: names of strange sets, for :func:`vardrop.evaluation.examples.strange`.
        target_error: that the threshold is chosen for, on validation rows; an RMSE for numbers. None for half of the
            error there, or nine tenths of the RMSE.
        limit: at most so many rows of every set.

    Raises:
        ValueError: if a strange set does not fit, or the target is below 0.
        FileNotFoundError: if a strange set is not here.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from vardrop.evaluation.answers import Passes
        >>> from vardrop.evaluation.evaluate import evaluate
        >>> from vardrop.evaluation.runs import open_run
        >>> from vardrop.training import Config, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train(Config(model="mlp:1x8", epochs=1), Path(folder), progress=False)
        ...     found = evaluate(open_run(Path(folder)), Passes(samples=5), ood=["noise"])
        >>> found.result["examples"], sorted(found.result["ood"]["noise"])
        (359, ['examples', 'mutual_information', 'predictive_entropy'])
    """
    if target_error is not None and not (math.isfinite(target_error) and target_error >= 0):
        raise ValueError(
            f"vardrop.evaluate: target_error must be finite and at least 0, got {target_error}; 0.01 is one "
            "in a hundred"
        )
    began = time.perf_counter()
    notes = []
    if passes.samples > 1 and not run.random:
        passes = dataclasses.replace(passes, samples=1)
        notes.append(_without_noise(run))
    number = len(run.data.test_x) if limit is None else min(limit, len(run.data.test_x))
    odd = [strange(run, name, number, passes.seed) for name in ood]  # what does not fit is told before the long work
    x, y = run.data.test_x[:number], run.data.test_y[:number]
    answers = answer(run, x, passes)
    held_back = run.validation()
    kept_back = held_back and (answer(run, held_back[0][:limit], passes), held_back[1][:limit])
    titles = [examples.name for examples in odd]
    titles = titles if len(set(titles)) == len(titles) else list(ood)  # two files of one name in two folders
    elsewhere = {title: answer(run, examples.x, passes) for title, examples in zip(titles, odd, strict=True)}
    result: dict[str, Any] = {
        "run": run.path.resolve().name, "data": run.data.name, "model": run.config.model, "method": run.config.method,
        "task": run.data.task, "examples": number, "validation_examples": len(kept_back[1]) if kept_back else 0,
        "samples": passes.samples, "seed": passes.seed, "limit": limit, "notes": notes,
        "how": f"{answers.engine[:1].upper()}{answers.engine[1:]}, seed {passes.seed}.",
        "calibrated": None, "reliability": {}, "intervals": [],
    }  # fmt: skip
    if isinstance(answers, Classes):
        result |= of_classes(answers, y, kept_back)  # type: ignore[arg-type]
    else:
        result |= of_numbers(answers, y)
    result["ood"], result["histograms"] = strangeness(answers, elsewhere)
    result["selection"] = selection((answers, y), kept_back, target_error)
    if kept_back is None:
        notes.append("The run kept no validation rows, so neither a threshold nor a temperature is chosen.")
    if kept_back and isinstance(answers, Classes) and not result["calibrated"]:
        notes.append("No temperature is fitted: the likelihood of the validation rows has no best one.")
    if kept_back and result["selection"]["rule"] is None:
        notes.append("No threshold meets the target error on the validation rows, so none is chosen.")
    other_doubts = {name: found.doubt.numpy() for name, found in elsewhere.items()}
    result["referral"] = referral(answers.loss(y).numpy(), answers.doubt.numpy(), other_doubts)
    for name in ("nll", "log_likelihood"):
        if not math.isfinite(result["test"].get(name, 0.0)):
            notes.append("Some test example was held to be impossible: the likelihood of all of them together is 0.")
    result["seconds"] = round(time.perf_counter() - began, 3)
    return Evaluation(_without_infinity(result), x, y, answers)


def _without_infinity(value: Any) -> Any:
    """The same with None for what JSON has no number for."""
    if isinstance(value, dict):
        return {name: _without_infinity(entry) for name, entry in value.items()}
    if isinstance(value, list):
        return [_without_infinity(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _without_noise(run: OpenRun) -> str:
    what = (
        "it cannot tell one example from another by its uncertainty, and what is handed over is arbitrary."
        if run.regression
        else "its uncertainty is the entropy of its softmax, and there is no mutual information."
    )
    return f"The method {run.config.method} has no noise, so this is one deterministic pass: {what}"
