"""The parts of an evaluation: answers and truths in, plain numbers out that JSON can hold."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vardrop.evaluation.answers import Classes, Numbers, with_temperature
from vardrop.evaluation.predict import fit_temperature
from vardrop.evaluation.referral import histograms
from vardrop.uncertainty import calibration, detection, select

COVERAGES = (0.95, 0.90, 0.80)
BINS = 15  # of the reliability diagram
SHARES = tuple(round(0.05 * i, 2) for i in range(1, 20))  # that intervals promise
EASIER = {"classification": 0.5, "regression": 0.9}  # the target error, as a share of that on validation rows
NAMES = {  # score -> how it is called, its unit
    "predictive_entropy": ("predictive entropy", "nats"),
    "mutual_information": ("mutual information", "nats"),
    "std": ("standard deviation of the passes", ""),
}
Rows = tuple[Classes | Numbers, Tensor]  # answers, and the truths to them


def of_classes(answers: Classes, y: Tensor, kept_back: tuple[Classes, Tensor] | None) -> dict[str, Any]:
    """Error and calibration, as it is and under the temperature that suits the rows kept back.

    Args:
        answers: to N test rows.
        y: ``[N]``, their classes.
        kept_back: answers to the rows that training kept back, and their classes.

    Returns:
        ``test``, ``calibrated`` (None without such rows, or where no temperature is best) and ``reliability``.
    """
    p = answers.probabilities
    found: dict[str, Any] = {
        "test": _scores(p, y), "calibrated": None, "reliability": {"before": _diagram(p, y)},
    }  # fmt: skip
    temperature = None if kept_back is None else _temperature(*kept_back)
    if temperature is not None:
        p = with_temperature(p, temperature)
        found["calibrated"] = {"temperature": temperature, **_scores(p, y)}
        found["reliability"]["after"] = _diagram(p, y)
    return found


def of_numbers(answers: Numbers, y: Tensor) -> dict[str, Any]:
    """Error, likelihood, and whether intervals hold what they promise.

    Args:
        answers: to N test rows.
        y: ``[N]``, their targets.

    Returns:
        ``test`` and ``intervals``.
    """
    off = 2 * (answers.cdf(y.double()) - 0.5).abs()  # the share of the smallest middle interval that holds y
    return {
        "test": {
            "rmse": answers.loss(y).mean().sqrt().item(),
            "log_likelihood": answers.log_likelihood(y).mean().item(),
            "noise_std": answers.noise_std,
        },
        "intervals": [{"nominal": share, "observed": (off <= share).double().mean().item()} for share in SHARES],
    }


def selection(test: Rows, kept_back: Rows | None, target_error: float | None) -> dict[str, Any]:
    """What may be left to the model: at fixed shares, and by the threshold that rows kept back choose.

    Args:
        test: answers to the test rows, and their truths.
        kept_back: the same for the rows that training kept back.
        target_error: that the threshold is for; None for a share of the error on the rows kept back.

    Returns:
        ``score``, ``aurc``, ``at`` and ``rule`` (None where there is no threshold), see ``evaluation.json``.
    """
    numbers = isinstance(test[0], Numbers)
    key = "std" if numbers else "predictive_entropy"
    score = {"key": key, "name": NAMES[key][0], "unit": NAMES[key][1]}
    loss = test[0].loss(test[1])
    curve = select(test[0].doubt, loss)
    at = []
    for coverage in COVERAGES:
        kept = max(1, math.ceil(coverage * len(loss)))
        risk = curve.curve.risk[kept - 1].item()
        at.append({"coverage": coverage, **({"rmse": math.sqrt(risk)} if numbers else {"accuracy": 1 - risk})})
    found = {"score": score, "aurc": curve.aurc, "excess_aurc": curve.excess_aurc, "at": at}
    return {**found, "rule": kept_back and _rule(test, kept_back, target_error)}


def strangeness(
    inside: Classes | Numbers, outside: Mapping[str, Classes | Numbers]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """How well each score tells strange examples from test rows, and how the scores are distributed.

    Args:
        inside: answers to the test rows.
        outside: answers to others, by the name of their set.

    Returns:
        ``ood``: name -> examples, and for every score its AUROC and false alarms; ``histograms``: score -> bins.
    """
    found: dict[str, Any] = {name: {"examples": len(answers.doubt)} for name, answers in outside.items()}
    bins: dict[str, Any] = {}
    for key, scores in inside.scores.items() if outside else ():
        others = {name: answers.scores.get(key, torch.zeros_like(answers.doubt)) for name, answers in outside.items()}
        for name, values in others.items():
            found[name][key] = {
                "auroc": detection.auroc(scores, values), "fpr95": detection.fpr_at(scores, values, 0.95)
            }  # fmt: skip
        name, unit = NAMES[key]
        found_bins = histograms({"": scores.numpy()} | {other: values.numpy() for other, values in others.items()})
        test = found_bins["shares"].pop("")  # the one name that no set has
        bins[key] = {"name": name, "label": f"{name} ({unit})" if unit else name, "test": test, **found_bins}
    return found, bins


def _temperature(answers: Classes, y: Tensor) -> float | None:
    """None where the rows are too few or too easy: then the likelihood grows without end as T falls."""
    try:
        return fit_temperature(answers.probabilities, y)
    except ValueError as error:
        if "a finite temperature must be the best one" not in str(error):
            raise
        return None


def _scores(p: Tensor, y: Tensor) -> dict[str, float]:
    return {
        "error": (p.argmax(-1) != y).double().mean().item(),
        "nll": calibration.nll(p, y),
        "brier": calibration.brier(p, y),
        "ece": calibration.ece(p, y, BINS),
        "confidence": p.amax(-1).mean().item(),
    }


def _diagram(p: Tensor, y: Tensor) -> list[dict[str, Any]]:
    found = calibration.reliability(p, y, BINS)
    edges = found.edges.tolist()
    return [
        {"low": low, "high": high, "count": n, "confidence": sure if n else None, "accuracy": right if n else None}
        for low, high, n, sure, right in zip(
            edges[:-1], edges[1:], found.count.tolist(), found.confidence.tolist(), found.accuracy.tolist(), strict=True
        )
    ]


def _rule(test: Rows, kept_back: Rows, target_error: float | None) -> dict[str, Any] | None:
    """The threshold for a target on the rows kept back, and what it does on the test rows; None if none meets it."""
    numbers = isinstance(test[0], Numbers)
    told = math.sqrt if numbers else float  # a risk is a mean square, and a person is told its root
    loss = kept_back[0].loss(kept_back[1])
    if target_error is None:
        target_error = EASIER["regression" if numbers else "classification"] * told(loss.mean().item())
    chosen = select(kept_back[0].doubt, loss, target_error=target_error**2 if numbers else target_error)
    kept = chosen.apply(test[0].doubt).kept
    if not chosen.coverage or not len(kept):
        return None
    return {
        "target_error": target_error,
        "threshold": chosen.threshold,
        "validation": {"coverage": chosen.coverage, "error": told(chosen.risk)},
        "test": {"coverage": len(kept) / len(test[1]), "error": told(test[0].loss(test[1])[kept].mean().item())},
    }
