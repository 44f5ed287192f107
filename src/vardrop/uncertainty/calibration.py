"""Whether probabilities are what they say: proper scores, and confidence against accuracy.

Letters: N cases, C classes, B bins. All functions take probabilities ``[N, C]``, the mean of the passes for a
stochastic model, and class indices ``[N]``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from vardrop.optional import needed
from vardrop.uncertainty.inputs import checked_labels, checked_probabilities

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["BrierParts", "Reliability", "brier", "brier_parts", "classwise_ece", "ece", "mce", "nll", "reliability"]

BINNINGS = ("width", "mass")


def nll(probabilities: Tensor, labels: Tensor) -> float:
    """Mean negative log-probability of the labels, in nats; inf if one of them was called impossible.

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]``.

    Raises:
        ValueError: for what are no probabilities or no labels.

    Example:
        >>> import torch
        >>> round(nll(torch.tensor([[0.5, 0.5], [0.9, 0.1]]), torch.tensor([0, 0])), 4)
        0.3993
    """
    p, y = _checked(probabilities, labels)
    return -p.gather(1, y[:, None]).log().mean().item()


def brier(probabilities: Tensor, labels: Tensor) -> float:
    r"""The score of Brier (1950), between 0 and 2: :math:`\frac1N \sum_i \sum_c (p_{ic} - [y_i = c])^2`.

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]``.

    Raises:
        ValueError: for what are no probabilities or no labels.

    Example:
        >>> import torch
        >>> brier(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
        0.25
    """
    p, y = _checked(probabilities, labels)
    return (p - _one_hot(y, p)).square().sum(1).mean().item()


class BrierParts(NamedTuple):
    """What :func:`brier_parts` returns: score = reliability − resolution + uncertainty + within, exactly.

    Attributes:
        score: of Brier.
        reliability: how far the frequencies in the bins are from the forecasts; 0 if calibrated.
        resolution: how far the frequencies in the bins are from those of all cases; high is good.
        uncertainty: of the labels themselves, whatever the forecast.
        within: what the differences of forecasts within a bin add; negative where they tell something.
    """

    score: float
    reliability: float
    resolution: float
    uncertainty: float
    within: float


def brier_parts(probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "width") -> BrierParts:
    r"""The parts of the score of Brier (Murphy 1973), for every class by itself, and added up.

    .. math:: \sum_c \Big[ \sum_b \tfrac{n_b}{N} (\bar p_b - \bar y_b)^2 - \sum_b \tfrac{n_b}{N} (\bar y_b - \bar y)^2
              + \bar y (1 - \bar y) + \tfrac1N \sum_b \sum_{i \in b}
              \{(p_i - \bar p_b)^2 - 2 (p_i - \bar p_b)(y_i - \bar y_b)\} \Big]

    The last sum, of Stephenson, Coelho, Jolliffe (2008), is zero if all forecasts of a bin are equal, and without it
    the parts would not add up.

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]``.
        bins: B, for the probabilities of every class.
        binning: as for :func:`reliability`.

    Raises:
        ValueError: for what are no probabilities, no labels or no bins.

    Example:
        >>> import torch
        >>> parts = brier_parts(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), torch.tensor([0, 0]))
        >>> parts.reliability - parts.resolution + parts.uncertainty + parts.within == parts.score
        True
    """
    p, y = _checked(probabilities, labels)
    parts = torch.zeros(4, dtype=p.dtype, device=p.device)
    for forecast, event in zip(p.T, _one_hot(y, p).T, strict=True):
        table = _table(forecast, event, bins, binning)
        share, rate = table.cases.to(p.dtype) / len(p), event.mean()
        mean_p, mean_y = table.confidence.nan_to_num(), table.accuracy.nan_to_num()
        apart = forecast - mean_p[table.where]
        parts += torch.stack([
            (share * (mean_p - mean_y).square()).sum(),
            (share * (mean_y - rate).square()).sum(),
            rate * (1 - rate),
            (apart * (apart - 2 * (event - mean_y[table.where]))).mean(),
        ])  # fmt: skip
    reliability_, resolution, uncertainty, within = parts.tolist()
    return BrierParts(brier(probabilities, labels), reliability_, resolution, uncertainty, within)


@dataclass(frozen=True, eq=False)
class Reliability:
    """The data of a reliability diagram, and the errors that are read off it.

    Attributes:
        edges: ``[B + 1]``, of the bins; a bin has its upper edge, and the first its lower one too.
        count: ``[B]``, cases in every bin.
        confidence: ``[B]``, their mean confidence; nan in an empty bin.
        accuracy: ``[B]``, the share of them that is right; nan in an empty bin.
    """

    edges: Tensor
    count: Tensor
    confidence: Tensor
    accuracy: Tensor

    @property
    def gap(self) -> Tensor:
        """Confidence less accuracy, ``[B]``: above 0 for overconfident, 0 in an empty bin."""
        return (self.confidence - self.accuracy).nan_to_num()

    @property
    def ece(self) -> float:
        """Expected calibration error: the mean of the absolute gaps over the cases."""
        return (self.count * self.gap.abs()).sum().item() / self.count.sum().item()

    @property
    def mce(self) -> float:
        """Maximum calibration error: the largest absolute gap, however few cases it has."""
        return self.gap.abs().max().item()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw accuracy and gap of every bin; needs matplotlib."""
        ax = ax or needed("matplotlib.pyplot", "uncertainty.Reliability.plot").subplots()[1]
        left, width = self.edges[:-1].cpu().numpy(), self.edges.diff().cpu().numpy()
        ax.bar(left, self.accuracy.nan_to_num().cpu().numpy(), width, align="edge", edgecolor="white", label="accuracy")
        ax.plot(self.confidence.cpu(), self.confidence.cpu(), "k_", label="mean confidence")
        ax.plot([0, 1], [0, 1], ":", color="grey")
        ax.set(xlabel="confidence", ylabel="accuracy", xlim=(0, 1), ylim=(0, 1), title=f"ECE {self.ece:.4f}")
        ax.legend(loc="upper left")
        return ax


def reliability(probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "width") -> Reliability:
    """Confidence (the largest probability) against accuracy, in bins (Guo et al. 2017).

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]``.
        bins: B.
        binning: ``"width"``, B equal parts of [0, 1], or ``"mass"``, about N / B cases in each. Equal confidences
            always share a bin, so with ``"mass"`` and many ties some bins are large and others empty.

    Raises:
        ValueError: for what are no probabilities, no labels or no bins.

    Example:
        >>> import torch
        >>> found = reliability(torch.tensor([[0.5, 0.5], [0.2, 0.8]]), torch.tensor([0, 1]), bins=4)
        >>> found.count, found.accuracy
        (tensor([0, 1, 0, 1]), tensor([nan, 1., nan, 1.], dtype=torch.float64))
    """
    p, y = _checked(probabilities, labels)
    confidence, predicted = p.max(1)
    table = _table(confidence, (predicted == y).double(), bins, binning)
    return Reliability(table.edges, table.cases, table.confidence, table.accuracy)


def ece(probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "width") -> float:
    r"""Expected calibration error of the predicted class, :math:`\sum_b \frac{n_b}{N} |conf_b - acc_b|`.

    Not 0 for a calibrated model on finitely many cases: every bin's accuracy scatters. More so with more bins.

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]``.
        bins: B.
        binning: as for :func:`reliability`.

    Raises:
        ValueError: for what are no probabilities, no labels or no bins.

    Example:
        >>> import torch
        >>> round(ece(torch.tensor([[0.9, 0.1], [0.9, 0.1]]), torch.tensor([0, 1])), 4)
        0.4
    """
    return reliability(probabilities, labels, bins, binning).ece


def mce(probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "width") -> float:
    r"""Maximum calibration error of the predicted class, :math:`\max_b |conf_b - acc_b|`.

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]``.
        bins: B.
        binning: as for :func:`reliability`.

    Raises:
        ValueError: for what are no probabilities, no labels or no bins.

    Example:
        >>> import torch
        >>> round(mce(torch.tensor([[0.9, 0.1], [0.4, 0.6]]), torch.tensor([1, 1])), 4)
        0.9
    """
    return reliability(probabilities, labels, bins, binning).mce


def classwise_ece(probabilities: Tensor, labels: Tensor, bins: int = 15, binning: str = "width") -> float:
    """Expected calibration error of every class's probability, averaged over the classes (Nixon et al. 2019).

    Args:
        probabilities: ``[N, C]``.
        labels: ``[N]``.
        bins: B.
        binning: as for :func:`reliability`.

    Raises:
        ValueError: for what are no probabilities, no labels or no bins.

    Example:
        >>> import torch
        >>> round(classwise_ece(torch.tensor([[0.75, 0.25]] * 4), torch.tensor([0, 0, 0, 1])), 4)
        0.0
    """
    p, y = _checked(probabilities, labels)
    tables = [_table(q, event, bins, binning) for q, event in zip(p.T, _one_hot(y, p).T, strict=True)]
    errors = [(t.cases * (t.confidence - t.accuracy).nan_to_num().abs()).sum() / len(p) for t in tables]
    return torch.stack(errors).mean().item()


class _Table(NamedTuple):
    edges: Tensor  # [B + 1]
    where: Tensor  # [N], the bin of every case
    cases: Tensor  # [B], how many
    confidence: Tensor  # [B]
    accuracy: Tensor  # [B]


def _table(p: Tensor, event: Tensor, bins: int, binning: str) -> _Table:
    """Forecasts ``[N]`` and events ``[N]`` (0 or 1) by bins."""
    if binning not in BINNINGS or bins < 1:
        raise ValueError(
            f"vardrop.uncertainty.calibration: at least 1 bin of equal 'width' or 'mass' is needed, got bins={bins}, "
            f"binning={binning!r}; 15 bins of equal width are usual"
        )
    edges = torch.linspace(0, 1, bins + 1, dtype=p.dtype, device=p.device)
    if binning == "mass":
        last = (torch.arange(1, bins, device=p.device) * len(p)).div(bins, rounding_mode="floor") - 1
        edges[1:-1] = torch.where(last >= 0, p.sort().values[last.clamp(min=0)], 0)
    where = torch.searchsorted(edges[1:-1].contiguous(), p.contiguous())
    count = torch.bincount(where, minlength=bins)
    means = [torch.zeros(bins, dtype=p.dtype, device=p.device).index_add_(0, where, v) / count for v in (p, event)]
    return _Table(edges, where, count, *means)


def _one_hot(labels: Tensor, p: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(labels, p.shape[1]).to(p.dtype)


def _checked(probabilities: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    p = checked_probabilities(probabilities)
    return p, checked_labels(labels, *p.shape).to(p.device)
