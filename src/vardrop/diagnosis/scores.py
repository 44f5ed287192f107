"""How good a model's answers are, example by example, where a loader has labels that fit them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vardrop.diagnosis.passes import Passes
from vardrop.diagnosis.report import Cost
from vardrop.prediction.structure import named

Loss = Callable[[nn.Module, Any], Tensor]
_LABELS = ("labels", "label")
ERROR, SQUARED, LOSS = "error rate", "squared error", "loss"


class Scores(NamedTuple):
    """A number for every example (or batch, of a loss function), lower is better, and what it is."""

    measure: str
    values: Tensor

    @property
    def mean(self) -> float:
        """Over all examples."""
        return float(self.values.mean())

    @property
    def error(self) -> float:
        """The standard error of the mean; infinite for a single number."""
        return standard_error(self.values)


def standard_error(values: Tensor) -> float:
    """Of the mean of independent numbers ``[N]``; infinite if there is one alone."""
    return float(values.std() / math.sqrt(len(values))) if len(values) > 1 else math.inf


def labels_of(batch: Any) -> Tensor | None:
    """The labels of a batch, if it has some."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _LABELS if name in batch), None)
    elif isinstance(batch, tuple | list) and len(batch) > 1:
        found = batch[1]
    else:
        found = None
    return found if isinstance(found, Tensor) else None


def score(passes: Passes, loss_fn: Loss | None, noise: str | None = None) -> Scores | None:
    """The scores of all batches; None where labels are missing or do not fit the output.

    Args:
        passes: the model, borrowed.
        loss_fn: ``loss_fn(model, batch)`` -> the mean loss of a batch; None to go by labels.
        noise: whose noise is on, "" for all, None for none.
    """
    values, measure = [], LOSS
    for index, batch in enumerate(passes.batches):
        if loss_fn is not None:
            values.append(passes.loss(index, loss_fn, noise))
            continue
        labels = labels_of(batch)
        if labels is None:
            return None
        judged = _judge(passes.run(index, noise), labels)
        if judged is None or (values and judged.measure != measure):
            return None
        measure = judged.measure
        values.append(judged.values)
    return Scores(measure, torch.cat(values))


def _judge(output: Any, labels: Tensor) -> Scores | None:
    """Mistakes for classes, squared errors for numbers, a mean for every example."""
    try:
        name, tensors = named(output, None)
    except ValueError:
        return None
    answer, labels = tensors[name].detach().cpu(), labels.detach().cpu()
    if not answer.is_floating_point() or answer.ndim == 0 or labels.ndim == 0 or len(answer) != len(labels):
        return None
    if labels.dtype == torch.int64 and answer.ndim == labels.ndim + 1 and answer.shape[1] > 1:
        if answer.shape[2:] != labels.shape[1:] or int(labels.max()) >= answer.shape[1]:
            return None
        wrong = (answer.argmax(1) != labels) & (labels >= 0)
        return Scores(ERROR, wrong.double().reshape(len(labels), -1).mean(1))
    if labels.is_floating_point() and answer.numel() == labels.numel():
        off = (answer.double() - labels.double().reshape(answer.shape)).square()
        return Scores(SQUARED, off.reshape(len(labels), -1).mean(1))
    return None


def difference(before: Scores, after: Scores) -> Cost:
    """The same examples twice: both means, and the standard error of what lies between."""
    return Cost(before.measure, before.mean, after.mean, standard_error(before.values - after.values))
