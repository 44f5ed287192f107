"""Which cases a model may answer by itself, and which go to a person."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from vardrop.optional import needed
from vardrop.uncertainty import inputs, risk

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from pandas import DataFrame


class Applied(NamedTuple):
    """The two halves of new data: indices, each sorted by uncertainty.

    Attributes:
        kept: the model's own, the most certain first.
        to_person: the most uncertain first.
    """

    kept: Tensor
    to_person: Tensor


@dataclass(frozen=True, eq=False)
class Selection:
    """What :func:`select` found out: the curve of risk against coverage, and the threshold that was chosen on it.

    Attributes:
        uncertainty: ``[N]``, of the validation cases.
        loss: ``[N]``, theirs.
        curve: coverage and risk for every number of cases kept; see :class:`vardrop.uncertainty.RiskCoverage`.
        by: the measure of uncertainty, or None for a tensor of unknown origin.
        threshold: cases up to it are kept. inf keeps all; -inf none, since no threshold met the target.
        bound: what the risk of new cases stays below, if a ``confidence`` was asked for and can be had.
    """

    uncertainty: Tensor
    loss: Tensor
    curve: risk.RiskCoverage
    by: str | None = None
    threshold: float = math.inf
    bound: float | None = None

    @property
    def aurc(self) -> float:
        """Area under the curve."""
        return self.curve.risk.mean().item()

    @property
    def excess_aurc(self) -> float:
        """Area between the curve and that of an oracle."""
        return self.aurc - risk.optimal_aurc(self.loss)

    @property
    def kept(self) -> Tensor:
        """Indices of the cases that the model keeps, the most certain first."""
        return self._split(self.uncertainty).kept

    @property
    def to_person(self) -> Tensor:
        """Indices of the cases that go to a person, the most uncertain first."""
        return self._split(self.uncertainty).to_person

    @property
    def coverage(self) -> float:
        """The share of cases that the model keeps."""
        return len(self.kept) / len(self.loss)

    @property
    def risk(self) -> float:
        """The mean loss of the cases that the model keeps; nan if it keeps none."""
        return self.loss[self.kept].mean().item()

    def at(
        self, *, target_error: float | None = None, share: float | None = None, confidence: float | None = None
    ) -> Selection:
        """The same curve with another threshold; the arguments are those of :func:`select`."""
        if target_error is not None and share is not None:
            raise ValueError(
                "vardrop.select: one of target_error and share decides the threshold, got both; leave one out"
            )
        if confidence is not None and (target_error is None or not 0 < confidence < 1):
            raise ValueError(
                f"vardrop.select: confidence is that of a target_error, above 0 and below 1, got {confidence} with "
                f"target_error={target_error}; give both, for example target_error=0.01, confidence=0.95"
            )
        choice = risk.Choice(math.inf, None)
        if share is not None:
            if not 0 <= share <= 1:
                raise ValueError(
                    f"vardrop.select: share must be between 0 and 1, got {share}; divide a number of cases by all"
                )
            choice = risk.threshold_for_share(self.curve, share)
        elif target_error is not None:
            if not target_error >= 0:
                raise ValueError(
                    f"vardrop.select: target_error must be at least 0, got {target_error}; it is a mean loss"
                )
            if confidence is None:
                choice = risk.threshold_for_risk(self.curve, target_error)
            elif ((self.loss != 0) & (self.loss != 1)).any():
                raise ValueError(
                    "vardrop.select: a confidence needs errors that are 0 or 1, got other losses; for numbers, call "
                    "an error what is too far off: select(prediction, (mean - y).abs() > tolerance)"
                )
            else:
                choice = risk.guaranteed_threshold(self.curve, target_error, confidence)
        return dataclasses.replace(self, threshold=choice.threshold, bound=choice.bound)

    def apply(self, prediction: Any) -> Applied:
        """Split new cases by the threshold.

        Args:
            prediction: a Prediction, or its uncertainties ``[M]`` by the same measure.
        """
        if isinstance(prediction, Tensor):
            return self._split(inputs.exact(prediction))
        if self.by is None:
            raise ValueError(
                "vardrop.select: what was selected by a tensor applies to a tensor of the same measure, got "
                f"{type(prediction).__name__}; give its uncertainty, for example prediction.predictive_entropy"
            )
        return self._split(inputs.exact(inputs.measure(prediction, self.by)))

    def _split(self, uncertainty: Tensor) -> Applied:
        order = uncertainty.argsort(stable=True)
        keep = uncertainty[order] <= self.threshold  # nan is not: who knows nothing asks
        return Applied(order[keep], order[~keep].flip(0))

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw the curve, the oracle's, and the point that was chosen; needs matplotlib."""
        ax = ax or needed("matplotlib.pyplot", "Selection.plot").subplots()[1]
        oracle = risk.risk_coverage(self.loss, self.loss)
        ax.plot(self.curve.coverage.cpu(), self.curve.risk.cpu(), label=f"{self.by or 'uncertainty'}: {self.aurc:.4g}")
        ax.plot(oracle.coverage.cpu(), oracle.risk.cpu(), ":", color="grey", label=f"oracle: {oracle.risk.mean():.4g}")
        if self.coverage:
            ax.plot(self.coverage, self.risk, "o", label=f"{self.coverage:.1%} kept, risk {self.risk:.4g}")
        ax.set(xlabel="coverage: share of cases that the model keeps", ylabel="risk: their mean loss", xlim=(0, 1))
        ax.legend(title="area under the curve")
        return ax

    def to_pandas(self) -> DataFrame:
        """One row a case, in the order they came: uncertainty, loss, and whether it goes to a person."""
        handed = torch.zeros(len(self.loss), dtype=torch.bool)
        handed[self.to_person.cpu()] = True
        columns = {"uncertainty": self.uncertainty, "loss": self.loss, "to_person": handed}
        frame: DataFrame = needed("pandas", "Selection.to_pandas").DataFrame(
            {name: column.cpu().numpy() for name, column in columns.items()}
        )
        return frame

    def __repr__(self) -> str:
        chosen = f"threshold={self.threshold:.4g}, coverage={self.coverage:.4g}, risk={self.risk:.4g}"
        bound = "" if self.bound is None else f", bound={self.bound:.4g}"
        return f"Selection({chosen}{bound}, aurc={self.aurc:.4g}, excess_aurc={self.excess_aurc:.4g}, by={self.by!r})"


def select(
    prediction: Any,
    labels: Tensor,
    *,
    by: str | None = None,
    target_error: float | None = None,
    share: float | None = None,
    confidence: float | None = None,
) -> Selection:
    """Choose on validation data which cases a model keeps and which go to a person: selective prediction.

    Cases are ranked by their uncertainty. The threshold is the one that keeps most cases at a target error, or that
    hands over a given share; without either, all are kept and the result is the curve. Cases of equal uncertainty are
    kept or handed over together.

    A target error that is met on the validation cases is met on new ones about half of the time. With a
    ``confidence``, the threshold is that of selection with guaranteed risk (Geifman and El-Yaniv 2017): the error of
    new cases of the same kind is below the target, and below the ``bound`` of the result, in that share of validation
    sets.

    Args:
        prediction: a Prediction, or uncertainties ``[N]``, high for doubtful.
        labels: ``[N]``. With a Prediction the labels or targets: wrong classes, or squared errors, are the losses.
            Booleans are errors; with a tensor of uncertainties, floats are losses of any kind.
        by: the measure of a Prediction: ``"predictive_entropy"`` (the default), ``"expected_entropy"``,
            ``"mutual_information"``, ``"variation_ratio"``, ``"confidence"`` (one minus the largest probability); for
            values ``"variance"`` (the default) or ``"std"``.
        target_error: the mean loss that the kept cases may have at most.
        share: of the cases that may go to a person at most, in [0, 1].
        confidence: of the target error, in (0, 1); None for no guarantee.

    Raises:
        ValueError: for shapes that do not fit, an unknown measure, or thresholds that contradict each other.
        TypeError: for labels without a Prediction, or of another kind than the prediction.

    Example:
        >>> import torch, vardrop as vd
        >>> uncertainty = torch.tensor([0.9, 0.1, 0.4, 0.2])
        >>> chosen = vd.select(uncertainty, torch.tensor([True, False, True, False]), target_error=0.1)
        >>> chosen.to_person, chosen.coverage, chosen.risk
        (tensor([0, 2]), 0.5, 0.0)
        >>> chosen.apply(torch.tensor([0.15, 0.8])).to_person
        tensor([1])
        >>> chosen.at(share=0.25).risk < chosen.at(share=0).risk
        True
    """
    if not isinstance(labels, Tensor):
        raise TypeError(
            f"vardrop.select: labels must be a tensor, got a {type(labels).__name__}; write torch.as_tensor(labels)"
        )
    if isinstance(prediction, Tensor):
        if by is not None:
            raise ValueError(
                f"vardrop.select: by is a measure of a Prediction, got {by!r} with a tensor; leave by out, or give the "
                "prediction"
            )
        if not (labels.is_floating_point() or labels.dtype == torch.bool):
            raise TypeError(
                "vardrop.select: beside a tensor of uncertainties errors are needed, booleans or floats, got "
                f"{labels.dtype}; give predicted != labels"
            )
        uncertainty, loss = prediction, labels
    else:
        by = by or inputs.measures(prediction)[0]
        uncertainty, loss = inputs.measure(prediction, by), inputs.losses(prediction, labels)
    uncertainty, loss = risk.checked(uncertainty, loss)
    return Selection(uncertainty, loss, risk.risk_coverage(uncertainty, loss), by).at(
        target_error=target_error, share=share, confidence=confidence
    )
