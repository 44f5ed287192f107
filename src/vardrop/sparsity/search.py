"""What it costs to remove weights: errors along the order in which they go."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vardrop.sparsity.ranking import Groups, Order
from vardrop.weights.additive import GaussianPosterior

Validation = Callable[[nn.Module], float] | Iterable[Any]

SILENT = -40.0  # log σ² of a removed weight whose variance does not go with its mean
POINTS = 24  # of a curve
REFINEMENTS = 6  # bisections between the last point of a curve that is good enough and the next one


class SparsityPoint(NamedTuple):
    """One point of the accuracy-threshold curve: log α above which all goes, the sparsity then, the error then."""

    threshold: float
    sparsity: float
    error: float


def remove(groups: list[Groups], masks: list[Tensor]) -> None:
    """Set means to zero where the masks say so, and silence noise that does not go with the mean."""
    with torch.no_grad():
        for each, mask in zip(groups, masks, strict=True):
            each.weight.mean.masked_fill_(mask, 0.0)
            if isinstance(each.weight.config, GaussianPosterior):
                each.weight.noise.masked_fill_(mask, SILENT)


class Search:
    """Errors of a model with so many groups removed, each of them measured once."""

    def __init__(self, model: nn.Module, groups: list[Groups], order: Order, validation: Validation | None) -> None:
        self.model, self.groups, self.order, self.validation = model, groups, order, validation
        self.errors: dict[int, float] = {}

    def error(self, count: int) -> float:
        if count not in self.errors:
            with _tentatively(self.model, self.groups, self.order.masks(count)):
                self.errors[count] = error_of(self.model, self.validation)
        return self.errors[count]

    def grid(self) -> list[int]:
        """Numbers of removed groups: dense at the sparse end, where the error turns."""
        total, first = self.order.total, self.order.already
        kept = [(total - first) ** (1 - i / (POINTS - 1)) for i in range(POINTS)]
        return sorted({first, *(min(max(total - round(k), first), total) for k in kept)})

    def sparsest(self, increase: float, allow_empty: bool) -> int:
        """The largest number of groups that may go; between points of the curve by bisection."""
        allowed = self.error(self.order.already) + increase
        grid = [count for count in self.grid() if allow_empty or not self.order.emptied(count)]
        good = max((count for count in grid if self.error(count) <= allowed), default=self.order.already)
        bad = min((count for count in grid if count > good), default=good)
        for _ in range(REFINEMENTS):
            middle = (good + bad) // 2
            if middle in (good, bad):
                break
            if self.error(middle) <= allowed:
                good = middle
            else:
                bad = middle
        return good

    def curve(self, chosen: int) -> list[SparsityPoint]:
        for count in [*self.grid(), chosen]:
            self.error(count)
        return [
            SparsityPoint(self.order.threshold(count), self.order.sparsity(count), error)
            for count, error in sorted(self.errors.items())
        ]


@contextmanager
def _tentatively(model: nn.Module, groups: list[Groups], masks: list[Tensor]) -> Iterator[None]:
    """With these weights removed and in evaluation, for the length of a block."""
    kept = [(each.weight.mean.detach().clone(), each.weight.noise.detach().clone()) for each in groups]
    flags = {module: module.training for module in model.modules()}
    try:
        model.eval()
        remove(groups, masks)
        yield
    finally:
        with torch.no_grad():
            for each, (mean, noise) in zip(groups, kept, strict=True):
                each.weight.mean.copy_(mean)
                each.weight.noise.copy_(noise)
        for module, flag in flags.items():
            module.training = flag


def error_of(model: nn.Module, validation: Any) -> float:
    """The error of a model in evaluation: what a function says, or what batches show."""
    with torch.no_grad():
        if callable(validation):
            return _finite(float(validation(model)))
        device = next(model.parameters()).device
        total, count, is_class = 0.0, 0, True
        for x, y in validation:
            output, y = model(x.to(device, copy=True)), y.to(device)  # a forward may write to its input
            is_class = not y.is_floating_point()
            _check_fit(output, y, is_class)
            wrong = output.argmax(1) != y if is_class else (output.reshape(y.shape) - y).square()
            total, count = total + float(wrong.double().sum()), count + wrong.numel()
    if not count:
        raise ValueError("vardrop.sparsify_: validation must have batches (x, y), got none; a loader, not an iterator")
    return _finite(total / count if is_class else math.sqrt(total / count))


def _check_fit(output: Any, y: Tensor, is_class: bool) -> None:
    """Refuse truths that would be compared with something else than the outputs for them."""
    shape = tuple(getattr(output, "shape", ()))
    if is_class:
        fits = len(shape) > 1 and shape[1] > 1 and y.shape == (shape[0], *shape[2:])
        wanted = "class indices of the shape [N, ...] for outputs [N, C, ...] with a score for each of C > 1 classes"
    else:
        fits = len(shape) > 0 and y.shape[:1] == shape[:1] and y.numel() == output.numel()
        wanted = "real values, as many as there are outputs"
    if not fits:
        raise ValueError(
            f"vardrop.sparsify_: y of validation must be {wanted}, got y of shape {tuple(y.shape)} and outputs of "
            f"shape {shape}; give a function of the model that returns its error"
        )


def _finite(error: float) -> float:
    return error if math.isfinite(error) else math.inf  # no error at all would compare as anything
