"""Risk against coverage, as pure functions: what is left to the model if the least certain cases go to a person.

Letters: N cases; u_i the uncertainty of case i, high for doubtful; l_i its loss, 0 or 1 for right or wrong, or any
error such as a square. Cases of equal uncertainty cannot be told apart, so none of these figures depends on the order
in which they come: each stands with the mean loss of its ties, which is the expectation over all their orders.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vardrop.uncertainty.inputs import exact


class RiskCoverage(NamedTuple):
    """The curve of :func:`risk_coverage`, by falling certainty.

    Attributes:
        coverage: ``[N]``, the share of cases that the model keeps: 1/N, 2/N, ... 1.
        risk: ``[N]``, the mean loss among them.
        thresholds: ``[G]``, the distinct uncertainties, ascending: keeping all cases up to one of them is possible.
        kept: ``[G]``, int64, how many cases that keeps; ``coverage[kept - 1]`` is their share.
    """

    coverage: Tensor
    risk: Tensor
    thresholds: Tensor
    kept: Tensor


def risk_coverage(uncertainty: Tensor, loss: Tensor) -> RiskCoverage:
    r"""Risk among the k most certain cases, for every k (El-Yaniv and Wiener 2010).

    .. math:: r_k = \frac{1}{k} \sum_{i: \text{rank}(u_i) \le k} l_i

    Within ties the risk is its expectation over their orders.

    Args:
        uncertainty: ``[N]``, high for doubtful.
        loss: ``[N]``, errors as booleans, or any loss in its own units.

    Raises:
        ValueError: for shapes that are not ``[N]``, N at least 1, or entries that are not numbers.

    Example:
        >>> import torch
        >>> curve = risk_coverage(torch.tensor([0.9, 0.1, 0.5, 0.2]), torch.tensor([1.0, 0.0, 1.0, 0.0]))
        >>> curve.risk
        tensor([0.0000, 0.0000, 0.3333, 0.5000], dtype=torch.float64)
    """
    uncertainty, loss = checked(uncertainty, loss)
    thresholds, group, size = torch.unique(uncertainty, sorted=True, return_inverse=True, return_counts=True)
    mean = torch.zeros_like(thresholds).index_add_(0, group, loss) / size
    k = torch.arange(1, len(loss) + 1, dtype=torch.float64, device=loss.device)
    risk = torch.repeat_interleave(mean, size).cumsum(0) / k
    return RiskCoverage(k / len(loss), risk, thresholds, size.cumsum(0))


def aurc(uncertainty: Tensor, loss: Tensor) -> float:
    r"""Area under the risk-coverage curve, :math:`\frac1N \sum_k r_k` (Geifman, Uziel, El-Yaniv 2019). Lower is better.

    Args:
        uncertainty: ``[N]``.
        loss: ``[N]``.

    Raises:
        ValueError: as :func:`risk_coverage`.

    Example:
        >>> import torch
        >>> aurc(torch.tensor([1.0, 2.0]), torch.tensor([0.0, 1.0]))
        0.25
    """
    return risk_coverage(uncertainty, loss).risk.mean().item()


def optimal_aurc(loss: Tensor) -> float:
    """The area of an oracle whose uncertainty is the loss itself: no order of these cases has a smaller one.

    Args:
        loss: ``[N]``.

    Raises:
        ValueError: as :func:`risk_coverage`.

    Example:
        >>> import torch
        >>> optimal_aurc(torch.tensor([1.0, 0.0]))
        0.25
    """
    return aurc(loss, loss)


def excess_aurc(uncertainty: Tensor, loss: Tensor) -> float:
    """E-AURC: how far the area is above that of the oracle, so that models of unequal accuracy can be compared.

    Args:
        uncertainty: ``[N]``.
        loss: ``[N]``.

    Raises:
        ValueError: as :func:`risk_coverage`.

    Example:
        >>> import torch
        >>> excess_aurc(torch.tensor([2.0, 1.0]), torch.tensor([0.0, 1.0]))
        0.5
    """
    return aurc(uncertainty, loss) - optimal_aurc(loss)


def upper_bound(errors: int, cases: int, confidence: float) -> float:
    r"""The one-sided Clopper-Pearson bound: the largest error rate that so few errors do not rule out.

    The b that solves :math:`\sum_{j \le e} \binom{n}{j} b^j (1 - b)^{n - j} = 1 - \text{confidence}`; 1 if all cases
    are errors. Newton would be faster than this bisection, and needs care at both ends.

    Args:
        errors: e, the errors that were seen.
        cases: n, among how many cases.
        confidence: in (0, 1), how often the true rate is to be below the bound.

    Example:
        >>> round(upper_bound(0, 100, 0.95), 4)  # 1 - 0.05 ** (1 / 100)
        0.0295
    """
    if errors >= cases:
        return 1.0
    j = torch.arange(errors + 1, dtype=torch.float64)
    n = torch.tensor(float(cases), dtype=torch.float64)
    ways = torch.lgamma(n + 1) - torch.lgamma(j + 1) - torch.lgamma(n - j + 1)
    low, high = errors / cases, 1.0
    for _ in range(60):
        b = (low + high) / 2
        if b in (low, high):
            break
        tail = torch.logsumexp(ways + j * math.log(b) + (n - j) * math.log1p(-b), 0).item()
        low, high = (b, high) if tail > math.log1p(-confidence) else (low, b)
    return high


class Choice(NamedTuple):
    """A threshold: cases up to it are kept. ``bound`` holds for their risk with the confidence asked for, or is None.

    A threshold of -inf keeps no case: none was safe.
    """

    threshold: float
    bound: float | None


def threshold_for_risk(curve: RiskCoverage, target: float) -> Choice:
    """The threshold that keeps most cases among those whose risk, on these very cases, is at most the target.

    Args:
        curve: of :func:`risk_coverage`.
        target: in the units of the loss.

    Example:
        >>> import torch
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.0, 0.0, 1.0]))
        >>> round(threshold_for_risk(curve, 0.1).threshold, 3)
        0.2
    """
    # a risk that is a mean of rounded numbers may miss an equal target by its last digit
    possible = (curve.risk[curve.kept - 1] <= target * (1 + 1e-12)).nonzero()
    return Choice(curve.thresholds[possible[-1]].item() if len(possible) else -math.inf, None)


def guaranteed_threshold(curve: RiskCoverage, target: float, confidence: float) -> Choice:
    """A threshold whose risk on new cases of the same kind is at most the target, with the given confidence.

    Selection with guaranteed risk (Geifman and El-Yaniv 2017, algorithm 1): a binary search over the thresholds, with
    the :func:`upper_bound` of each of its ⌈log₂(G + 1)⌉ steps at its share of the doubt. The threshold that keeps most
    among those whose bound was met is taken. For losses of 0 and 1.

    Args:
        curve: of :func:`risk_coverage`, of losses that are 0 or 1.
        target: the error rate to stay below.
        confidence: in (0, 1).

    Example:
        >>> import torch
        >>> curve = risk_coverage(torch.arange(300.0), torch.arange(300) >= 250)
        >>> guaranteed_threshold(curve, 0.05, 0.95).threshold < 262  # where the share of errors is 0.05
        True
    """
    doubt = (1 - confidence) / max(1, math.ceil(math.log2(len(curve.kept) + 1)))
    low, high, best = 0, len(curve.kept) - 1, Choice(-math.inf, None)
    while low <= high:
        middle = (low + high) // 2
        kept = int(curve.kept[middle])
        bound = upper_bound(round(curve.risk[kept - 1].item() * kept), kept, 1 - doubt)
        if bound <= target:
            best, low = Choice(curve.thresholds[middle].item(), bound), middle + 1
        else:
            high = middle - 1
    return best


def threshold_for_share(curve: RiskCoverage, share: float) -> Choice:
    """The threshold that hands over as many cases as it can, and not more than the share; ties stay together.

    Args:
        curve: of :func:`risk_coverage`.
        share: in [0, 1], of the cases.

    Example:
        >>> import torch
        >>> curve = risk_coverage(torch.tensor([0.1, 0.2, 0.3, 0.3]), torch.zeros(4))
        >>> round(threshold_for_share(curve, 0.25).threshold, 3)  # the two last are tied: half or none
        0.3
    """
    n = len(curve.coverage)
    handed = n - torch.cat([curve.kept.new_zeros(1), curve.kept])
    first = int((handed <= share * n + 1e-9).nonzero()[0])
    return Choice(curve.thresholds[first - 1].item() if first else -math.inf, None)


def checked(uncertainty: Tensor, loss: Tensor) -> tuple[Tensor, Tensor]:
    """Both as float64, if they are pairs of numbers."""
    if uncertainty.ndim != 1 or uncertainty.shape != loss.shape or not len(loss):
        raise ValueError(
            "vardrop.uncertainty: an uncertainty and a loss for every case are needed, both [N], got "
            f"{tuple(uncertainty.shape)} and {tuple(loss.shape)}; reduce them to one number a case"
        )
    wide = exact(uncertainty)
    losses = exact(loss).to(wide.device)
    for name, values in (("uncertainty", wide), ("loss", losses)):
        if values.isnan().any():
            raise ValueError(
                f"vardrop.uncertainty: every {name} must be a number, got nan in {int(values.isnan().sum())} of "
                f"{len(values)} cases; leave these out, or hand them to a person"
            )
    return wide, losses
