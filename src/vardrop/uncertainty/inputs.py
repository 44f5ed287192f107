"""What this room is given: tensors of its own kind, or a :class:`vardrop.Prediction` that has them.

A Prediction is anything with its attributes, so that the output of another library can be wrapped in four lines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLASS_MEASURES = ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio", "confidence")
NUMBER_MEASURES = ("variance", "std")


def has_classes(prediction: Any) -> bool:
    """Whether a prediction is about classes, and not about numbers."""
    return prediction.outputs != "numbers"


def default_measure(prediction: Any) -> str:
    """The measure of doubt that all that is known goes into."""
    return "predictive_entropy" if has_classes(prediction) else "variance"


def measures(prediction: Any) -> tuple[str, ...]:
    """The names of all measures of doubt that a prediction has."""
    return CLASS_MEASURES if has_classes(prediction) else NUMBER_MEASURES


def measure(prediction: Any, by: str) -> Tensor:
    """One number for every case, high for doubtful.

    ``"confidence"`` is one minus the largest probability. The variances of several outputs of a case are averaged,
    their standard deviations too.
    """
    known = measures(prediction)
    if by not in known:
        raise ValueError(f"vardrop.uncertainty: by must be one of {', '.join(known)} for this prediction, got {by!r}")
    if by == "confidence":
        return 1 - prediction.probabilities.amax(-1)
    found: Tensor = getattr(prediction, by)
    return found if found.ndim == 1 else found.flatten(1).mean(1)


def losses(prediction: Any, truth: Tensor) -> Tensor:
    """What the prediction's errors are: wrong or right by integer labels, squares by float targets.

    Booleans are taken for errors that somebody else has judged.
    """
    if truth.dtype == torch.bool:
        return truth
    if not has_classes(prediction):
        mean = prediction.mean
        error = (mean - truth.to(mean.device).reshape(mean.shape)).double().square()
        return error if error.ndim == 1 else error.flatten(1).mean(1)
    if truth.is_floating_point():
        return truth
    return prediction.predicted != truth.to(prediction.predicted.device)


def class_samples(prediction: Any) -> Tensor:
    """The probabilities of every pass, ``[T, N, C]``."""
    samples = prediction if isinstance(prediction, Tensor) else prediction.samples
    if samples is None:
        raise ValueError(
            "vardrop.uncertainty: the passes themselves are needed, got a prediction that kept only their moments; "
            "ask mc_predict to keep its samples"
        )
    if not isinstance(prediction, Tensor) and prediction.outputs == "logits":
        samples = samples.softmax(-1)
    return checked_samples(samples)


def checked_samples(samples: Tensor) -> Tensor:
    """The samples, if they are probabilities ``[T, N, C]``."""
    if samples.ndim != 3 or 0 in samples.shape:
        raise ValueError(
            f"vardrop.uncertainty: probabilities of every pass are needed, [T, N, C], got {tuple(samples.shape)}; "
            "stack the passes on a first axis"
        )
    return _checked(samples, "samples")


def checked_probabilities(probabilities: Tensor) -> Tensor:
    """The probabilities, if they are such, ``[N, C]``."""
    if probabilities.ndim != 2 or 0 in probabilities.shape:
        raise ValueError(
            "vardrop.uncertainty: probabilities [N, C] are needed, one row a case, got "
            f"{tuple(probabilities.shape)}; for two classes give both columns, stack([1 - p, p], -1)"
        )
    return _checked(probabilities, "probabilities")


def _checked(p: Tensor, name: str) -> Tensor:
    wide = p.detach().double()
    low, high, off = wide.min().item(), wide.max().item(), (wide.sum(-1) - 1).abs().max().item()
    close = 1e-4 if p.dtype in (torch.float64, torch.float32) else 2e-2
    if not (low >= -close and off <= close):  # also true for nan
        raise ValueError(
            f"vardrop.uncertainty: {name} must be at least 0 and sum to 1 over the last axis, got {low:.4g} to "
            f"{high:.4g} with sums up to {off:.2g} from 1; use softmax(-1) on logits"
        )
    return wide.clamp(min=0)


def checked_labels(labels: Tensor, cases: int, classes: int) -> Tensor:
    """The labels, if there is one of the classes for every case."""
    if labels.shape != (cases,) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise ValueError(
            f"vardrop.uncertainty: labels must be {cases} integers, one a case, got {tuple(labels.shape)} of "
            f"{labels.dtype}; give class indices"
        )
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(
            f"vardrop.uncertainty: labels must be class indices from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}; leave out unlabelled cases"
        )
    return labels.detach().long()
