"""Set to zero what the noise has taken over: by threshold, by sparsity, or by what it may cost on validation data."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from vardrop.given import check_module
from vardrop.half import HALVES, lost_step
from vardrop.sparsity.ranking import Groups, Order, groups_of
from vardrop.sparsity.search import Search, SparsityPoint, Validation, remove
from vardrop.weights.modules import RandomWeights

_TAKEN_OVER = 3.0  # log alpha: a dropout rate of 0.95


class LayerSparsity(NamedTuple):
    """One weight of a model: its name, how many entries it has, how many of them are zero."""

    name: str
    weights: int
    removed: int

    @property
    def sparsity(self) -> float:
        """Which part of it is zero."""
        return self.removed / self.weights


@dataclass
class SparsityReport:
    """What :func:`sparsify_` did.

    Attributes:
        layers: for every weight with learned noise, in the order of the model, its entries and zeros.
        threshold: log α above which everything was removed.
        skipped: name -> reason, in a sentence, for random weights that could not be judged.
        notes: what else there is to know, in sentences.
        curve: error against threshold, if there was validation data, from dense to sparse.
    """

    layers: list[LayerSparsity]
    threshold: float
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    curve: list[SparsityPoint] = field(default_factory=list)

    @property
    def weights(self) -> int:
        """How many weights there are in all layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def removed(self) -> int:
        """How many of them are zero."""
        return sum(layer.removed for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """Which part of them is zero."""
        return self.removed / self.weights

    @property
    def compression(self) -> float:
        """All weights over those that are left, the accounting of Molchanov et al. 2017 (biases do not count)."""
        return self.weights / (self.weights - self.removed) if self.removed < self.weights else math.inf

    def __str__(self) -> str:
        def row(name: str, weights: int, removed: int) -> str:
            return f"  {name}: {removed:,} of {weights:,} removed ({removed / weights:.1%})"

        lines = [row("total", self.weights, self.removed).strip() + f", {self.compression:.1f} x"]
        lines += [row(*layer) for layer in self.layers]
        lines += [f"left alone: {name}: {reason}" for name, reason in self.skipped.items()]
        lines += self.notes
        if self.curve:
            lines += ["threshold  sparsity  error"]
            lines += [f"{threshold:9.2f}  {sparsity:8.2%}  {error:.4g}" for threshold, sparsity, error in self.curve]
        return "\n".join(lines)


def sparsify_(
    model: nn.Module,
    threshold: float | None = None,
    target_sparsity: float | None = None,
    max_error_increase: float | None = None,
    validation: Validation | None = None,
    allow_empty: bool = False,
) -> SparsityReport:
    r"""Set the weights to zero, in place, whose noise has grown past their mean, and stop their noise.

    .. math:: w_{ij} = 0 \quad \text{where} \quad \log\alpha_{ij} > threshold

    (Molchanov, Ashukha, Vetrov 2017, section 4.3: log α = 3 is a dropout rate above 0.95.) Weights that share an α go
    together: with a rate per neuron, whole input or output units do. Zeros are the only mask that there is, so they are
    kept by checkpoints, copies and :func:`vardrop.restore_`; :func:`vardrop.finetune` keeps them through training, and
    :func:`vardrop.compact` takes them out.

    Args:
        model: a converted module with learned noise, trained.
        threshold: log α above which a weight goes; 3 if nothing else is asked for.
        target_sparsity: or which part of the weights is to go, at least: those with the largest log α of all layers
            together, of equal ones (α is often clipped) the smallest.
        max_error_increase: or by how much the error on ``validation`` may be above that of the model as it is: the
            sparsest model found on the curve that keeps to it.
        validation: a function of the model that returns its error, small is good, or batches ``(x, y)``: of class
            indices, whose error is the part that is misclassified, or of real values, whose error is the root mean
            square. With it the report has a curve.
        allow_empty: whether a layer may lose all of its weights, as a residual branch can.

    Returns:
        A report, per layer and in total.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no weight has learned noise, more than one goal is given, a goal is out of range, there is
            nothing to validate on, or a layer would lose all its weights. The model is then as it was.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(4, 1)
        >>> _ = layer.weight.data.copy_(torch.tensor([[1.0, 1e-3, -2.0, 1e-4]]))
        >>> _ = vd.convert_(layer, vd.SparseVariationalDropout())
        >>> report = vd.sparsify_(layer)
        >>> report.sparsity, report.compression
        (0.5, 2.0)
        >>> layer.eval().weight.tolist()
        [[1.0, 0.0, -2.0, 0.0]]
    """
    check_module(model, "sparsify_")
    threshold = _check_goal(threshold, target_sparsity, max_error_increase, validation)
    groups, skipped = groups_of(model)
    if not groups:
        told = "; ".join(f"{name} {reason}" for name, reason in skipped.items())
        raise ValueError(
            "vardrop.sparsify_: needs weights with learned noise, for example of vd.SparseVariationalDropout(), got "
            f"{told or f'a {type(model).__name__} without any'}; vd.convert_ and train it first"
        )
    order = Order(groups)
    search = Search(model, groups, order, validation)
    if threshold is not None:
        count = order.above(threshold)
    elif target_sparsity is not None:
        count = order.reaching(target_sparsity)
    else:
        count = search.sparsest(max_error_increase or 0.0, allow_empty)
    emptied = order.emptied(count)
    if emptied and not allow_empty:
        goal = order.threshold(count) if threshold is None else threshold
        raise ValueError(
            f"vardrop.sparsify_: every layer must keep a weight, got {', '.join(emptied)} with none left at log alpha "
            f"> {goal:.3g} and a network whose output would not depend on what comes through there; remove less, or "
            "pass allow_empty=True where a layer may go, as a residual branch can"
        )
    curve = search.curve(count) if validation is not None else []
    masks = order.masks(count)
    remove(groups, masks)
    layers = [
        LayerSparsity(each.weight.name, mask.numel(), int(mask.sum())) for each, mask in zip(groups, masks, strict=True)
    ]
    used = order.threshold(count) if threshold is None else threshold
    notes = [*_untrained(groups), *_notes(model, groups, order, used, count)]
    if target_sparsity is not None and order.already < count and used < _TAKEN_OVER:
        rate = 1 / (1 + math.exp(-used))
        notes.append(
            f"log alpha of what was removed goes down to {used:.3g}, a dropout rate of {rate:.2g}: below "
            f"{_TAKEN_OVER:g} the noise has not taken a weight over, so look at the error, fine-tune (vd.finetune), "
            "or train longer"
        )
    return SparsityReport(layers, used, skipped, notes, curve)


def _check_goal(
    threshold: float | None, target: float | None, increase: float | None, validation: Validation | None
) -> float | None:
    """The threshold to go by, if it is one that is asked for."""
    given = {"threshold": threshold, "target_sparsity": target, "max_error_increase": increase}
    named = [f"{name}={value!r}" for name, value in given.items() if value is not None]
    if len(named) > 1:
        raise ValueError(
            f"vardrop.sparsify_: give one of threshold, target_sparsity and max_error_increase, got {', '.join(named)}"
        )
    if threshold is not None and not math.isfinite(threshold):
        raise ValueError(f"vardrop.sparsify_: threshold must be a finite log alpha, got {threshold!r}")
    if target is not None and not 0 <= target < 1:
        raise ValueError(f"vardrop.sparsify_: target_sparsity must be at least 0 and below 1, got {target!r}")
    if increase is not None and not 0 <= increase < math.inf:
        raise ValueError(f"vardrop.sparsify_: max_error_increase must be finite and not negative, got {increase!r}")
    if increase is not None and validation is None:
        raise ValueError(
            "vardrop.sparsify_: max_error_increase needs validation, a function of the model or batches (x, y), got "
            "None"
        )
    if validation is not None and not (callable(validation) or isinstance(validation, Iterable)):
        raise ValueError(
            "vardrop.sparsify_: validation must be a function of the model that returns its error, or batches (x, y), "
            f"got {validation!r}"
        )
    return _TAKEN_OVER if not named else threshold


def _untrained(groups: list[Groups]) -> list[str]:
    """Whether the noise is still the one value that a conversion starts from; a bound may also make it one."""
    values = []
    for each in groups:
        noise, config = each.weight.noise.detach(), each.weight.config
        if noise.numel() == 1 or bool((noise != noise.flatten()[0]).any()):
            return []
        values.append(float(noise.flatten()[0]))
        if values[-1] >= getattr(config, "bound", math.inf):
            return []
    told = ", ".join(f"{value:.3g}" for value in dict.fromkeys(values))
    lost = max((lost_step(n) for each in groups if (n := each.weight.noise).dtype in HALVES), default=0.0)
    half = f" (in half precision, where steps below {lost:.2g} are rounded away, keep it in float32)" if lost else ""
    return [
        f"the noise was never trained: it has one value everywhere ({told}), so log alpha only says which weights are "
        f"small; train with vd.ELBO first{half}"
    ]


def _notes(model: nn.Module, groups: list[Groups], order: Order, threshold: float, count: int) -> list[str]:
    notes = []
    if count == order.already:
        largest = order.largest
        bounds = {bound for each in groups if math.isfinite(bound := getattr(each.weight.config, "bound", math.inf))}
        why = (
            f"their posterior bounds log alpha by {max(bounds):.3g} (max_alpha)"
            if bounds and max(bounds) <= threshold
            else "the model may not be trained long enough, or not with the full KL"
        )
        notes.append(f"nothing was removed: the largest log alpha is {largest:.3g}, not above {threshold:.3g}; {why}")
    names: dict[int, list[str]] = {}
    for path, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, RandomWeights):
            for name in module.vardrop_noise:
                names.setdefault(id(module._parameters[name]), []).append(f"{path}.{name}".lstrip("."))  # type: ignore[attr-defined]
    for shared in (shared for shared in names.values() if len(shared) > 1):
        notes.append(f"{', '.join(shared)} are one weight: its zeros are in all of them, and counted once")
    return notes
