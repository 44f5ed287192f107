"""What this room is given: tensors of its own kind, or a :class:`vardrop.Prediction` that has them.

A Prediction is anything with its attributes, so that the answers of another library can be wrapped in a few lines.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

CLASS_KINDS = ("logits", "probabilities", "log_probabilities")  # of a Prediction; all others are values
CLASS_MEASURES = ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio", "confidence")
VALUE_MEASURES = ("variance", "std")


def exact(x: Tensor) -> Tensor:
    """x in float64 without its gradient; on the CPU if its device, like Apple's, has no such type."""
    x = x.detach()
    return (x.cpu() if x.device.type == "mps" else x).double()


def has_classes(prediction: Any) -> bool:
    """Whether a prediction is about classes, and not about values."""
    return prediction.kind in CLASS_KINDS


def measures(prediction: Any) -> tuple[str, ...]:
    """The names of all measures of doubt that a prediction has, the one that takes in everything first."""
    return CLASS_MEASURES if has_classes(prediction) else VALUE_MEASURES


def measure(prediction: Any, by: str) -> Tensor:
    """One number for every example, high for doubtful; where an example has several, their mean.

    ``"confidence"`` is one minus the largest probability.
    """
    known = measures(prediction)
    if by not in known:
        raise ValueError(
            f"vardrop.uncertainty: by must be one of {', '.join(known)}, got {by!r} for a prediction of kind "
            f"{prediction.kind!r}; mc_predict(..., outputs='logits') makes one of classes"
        )
    if by == "confidence":
        return _one_each(1 - prediction.probabilities.amax(prediction.class_dim))
    return _one_each(getattr(prediction, by))


def losses(prediction: Any, truth: Tensor) -> Tensor:
    """A loss for every example: wrong or right by integer labels, a square by float targets; booleans are errors."""
    if truth.dtype == torch.bool:
        return truth
    if truth.is_floating_point() == has_classes(prediction):
        raise TypeError(
            "vardrop.uncertainty: integer labels belong to a prediction of classes, float targets to one of values, "
            f"got {truth.dtype} for kind {prediction.kind!r}; say mc_predict(..., outputs='logits'), or convert them"
        )
    said = prediction.predicted if has_classes(prediction) else prediction.mean
    truth = truth.to(said.device)
    if truth.shape != said.shape and not (truth.shape == said.shape[:1] and truth.numel() == said.numel()):
        raise ValueError(
            f"vardrop.uncertainty: the truth must have the shape of what is predicted, {tuple(said.shape)}, got "
            f"{tuple(truth.shape)}; give one for every example"
        )
    truth = truth.reshape(said.shape)
    if has_classes(prediction):
        _in_range(truth, prediction.probabilities.shape[prediction.class_dim])
    return _one_each((said != truth).float() if has_classes(prediction) else exact(said - truth).square())


def _one_each(found: Tensor) -> Tensor:
    return found if found.ndim == 1 else found.flatten(1).mean(1)


def class_samples(prediction: Any) -> Tensor:
    """The probabilities of every pass, ``[T, N, C]``, of a prediction or as they are given."""
    if isinstance(prediction, Tensor):
        return checked_samples(prediction)
    if not has_classes(prediction):
        raise ValueError(
            f"vardrop.uncertainty: probabilities of classes are needed, got a prediction of kind {prediction.kind!r}; "
            "say what the model returns: mc_predict(..., outputs='logits')"
        )
    if prediction.samples is None:
        raise ValueError(
            "vardrop.uncertainty: every pass is needed, got a prediction that kept only their moments; make it with "
            "keep=True"
        )
    return checked_samples(prediction.samples)


def checked_samples(samples: Tensor) -> Tensor:
    """The samples, if they are probabilities ``[T, N, C]``."""
    if samples.ndim != 3 or 0 in samples.shape:
        raise ValueError(
            f"vardrop.uncertainty: probabilities of every pass are needed, [T, N, C], got {tuple(samples.shape)}; "
            "stack the passes on a first axis; of answers at many places 'bald', 'entropy', 'variation_ratio' and "
            "'least_confident' take the mean, if they are given the prediction"
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
    wide = exact(p)
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
    _in_range(labels, classes)
    return labels.detach().long()


def _in_range(labels: Tensor, classes: int) -> None:
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= classes):
        raise ValueError(
            f"vardrop.uncertainty: labels must be class indices from 0 to {classes - 1}, got {int(labels.min())} to "
            f"{int(labels.max())}; leave out unlabelled cases"
        )
