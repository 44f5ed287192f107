"""How well an uncertainty tells what a model was not made for from what it was: out-of-distribution detection.

Every score is high for doubtful. All figures are exact functions of the two sets of scores: equal scores count as
equal, and the order in which they come plays no part. What counts as found, the positive class, is a case from
outside; ``positive="in"`` turns this round, as some papers do.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from vardrop.uncertainty import inputs

__all__ = ["Detection", "aupr", "auroc", "compare", "fpr_at", "scores"]


class Detection(NamedTuple):
    """What :func:`scores` measures.

    Attributes:
        auroc: see :func:`auroc`.
        fpr95: see :func:`fpr_at`, at a rate of 0.95.
        aupr: see :func:`aupr`, with the cases outside as the positive ones.
        aupr_in: the same with the cases inside as the positive ones.
    """

    auroc: float
    fpr95: float
    aupr: float
    aupr_in: float


def auroc(inside: Tensor, outside: Tensor) -> float:
    r"""Area under the receiver operating characteristic, by ranks: how often a case outside scores higher.

    .. math:: P(s_{out} > s_{in}) + \tfrac12 P(s_{out} = s_{in})

    0.5 is chance; it does not depend on which of the two is called positive.

    Args:
        inside: ``[N]``, scores of cases that the model was made for.
        outside: ``[M]``, scores of others.

    Raises:
        ValueError: for scores that are not ``[N]`` and ``[M]``, at least one of each, or not numbers.

    Example:
        >>> import torch
        >>> auroc(torch.tensor([0.1, 0.2, 0.5]), torch.tensor([0.5, 0.9]))  # 5 of 6 pairs, and one half
        0.9166666666666666
    """
    inside, outside = _checked(inside, outside)
    ordered = inside.sort().values
    below = torch.searchsorted(ordered, outside)
    up_to = torch.searchsorted(ordered, outside, right=True)
    return int((below + up_to).sum()) / (2 * len(inside) * len(outside))


def fpr_at(inside: Tensor, outside: Tensor, tpr: float = 0.95, positive: str = "out") -> float:
    """The share of false alarms at the highest threshold that finds a share ``tpr`` of the positive cases.

    Nothing is interpolated: with few cases more than ``tpr`` may be found.

    Args:
        inside: ``[N]``.
        outside: ``[M]``.
        tpr: the share of positive cases to be found, in (0, 1].
        positive: ``"out"`` (Hendrycks, Mazeika, Dietterich 2019) or ``"in"`` (Liang, Li, Srikant 2018).

    Raises:
        ValueError: as :func:`auroc`, and for any other ``tpr`` or ``positive``.

    Example:
        >>> import torch
        >>> fpr_at(torch.tensor([0.1, 0.2, 0.6]), torch.tensor([0.5, 0.9]))  # 0.5 has to be found, and 0.6 is above
        0.3333333333333333
    """
    if not 0 < tpr <= 1:
        raise ValueError(f"vardrop.uncertainty.detection: tpr must be above 0 and at most 1, got {tpr}; 0.95 is usual")
    wanted, others = _by_sign(inside, outside, positive)
    found = -int(-tpr * len(wanted) * (1 - 1e-12) // 1)  # the ceiling, but for a product that misses by its last digit
    threshold = wanted.sort(descending=True).values[found - 1]
    return (others >= threshold).double().mean().item()


def aupr(inside: Tensor, outside: Tensor, positive: str = "out") -> float:
    r"""Area under precision against recall as a sum of steps, also called average precision.

    .. math:: \sum_j (R_j - R_{j-1}) P_j

    over the distinct scores, from the highest. Chance is the share of positive cases.

    Args:
        inside: ``[N]``.
        outside: ``[M]``.
        positive: ``"out"`` or ``"in"``.

    Raises:
        ValueError: as :func:`auroc`, and for any other ``positive``.

    Example:
        >>> import torch
        >>> aupr(torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.9]))
        1.0
    """
    wanted, others = _by_sign(inside, outside, positive)
    thresholds = wanted.unique().flip(0)
    hits = len(wanted) - torch.searchsorted(wanted.sort().values, thresholds)
    alarms = len(others) - torch.searchsorted(others.sort().values, thresholds)
    precision = hits.double() / (hits + alarms)
    gained = hits.diff(prepend=hits.new_zeros(1)).double() / len(wanted)
    return (gained * precision).sum().item()


def scores(inside: Tensor, outside: Tensor) -> Detection:
    """All figures of this module for one pair of scores.

    Args:
        inside: ``[N]``.
        outside: ``[M]``.

    Raises:
        ValueError: as :func:`auroc`.

    Example:
        >>> import torch
        >>> scores(torch.tensor([0.1, 0.2]), torch.tensor([0.5, 0.9]))
        Detection(auroc=1.0, fpr95=0.0, aupr=1.0, aupr_in=1.0)
    """
    return Detection(
        auroc(inside, outside), fpr_at(inside, outside), aupr(inside, outside), aupr(inside, outside, "in")
    )


def compare(inside: Any, outside: Any) -> dict[str, Detection]:
    """The figures for every measure of uncertainty that two predictions have; ``pandas.DataFrame`` takes the result.

    Args:
        inside: a Prediction of cases that the model was made for.
        outside: a Prediction of others, by the same model.

    Raises:
        ValueError: if the two are of different kinds.

    Example:
        >>> import torch, vardrop as vd
        >>> net = torch.nn.Sequential(torch.nn.Dropout(0.2), torch.nn.Linear(4, 3))
        >>> x = torch.randn(50, 4)
        >>> near, far = (vd.mc_predict(net, inputs, samples=20, outputs="logits") for inputs in (x, 10 * x))
        >>> sorted(compare(near, far))
        ['confidence', 'expected_entropy', 'mutual_information', 'predictive_entropy', 'variation_ratio']
    """
    if inputs.measures(inside) != inputs.measures(outside):
        raise ValueError(
            f"vardrop.uncertainty.detection: two predictions of the same kind are compared, got {inside.kind!r} "
            f"and {outside.kind!r}; use the same model for both"
        )
    return {by: scores(inputs.measure(inside, by), inputs.measure(outside, by)) for by in inputs.measures(inside)}


def _by_sign(inside: Tensor, outside: Tensor, positive: str) -> tuple[Tensor, Tensor]:
    """The positive scores and the others, such that the positive ones ought to be high."""
    inside, outside = _checked(inside, outside)
    if positive not in ("in", "out"):
        raise ValueError(
            f"vardrop.uncertainty.detection: positive must be 'out' or 'in', got {positive!r}; it is what counts as "
            "found"
        )
    return (outside, inside) if positive == "out" else (-inside, -outside)


def _checked(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    if inside.ndim != 1 or outside.ndim != 1 or not len(inside) or not len(outside):
        raise ValueError(
            "vardrop.uncertainty.detection: one score for every case inside and outside is needed, [N] and [M], got "
            f"{tuple(inside.shape)} and {tuple(outside.shape)}; reduce them to one number a case"
        )
    inside = inputs.exact(inside)
    outside = inputs.exact(outside).to(inside.device)
    for name, values in (("inside", inside), ("outside", outside)):
        if values.isnan().any():
            raise ValueError(
                f"vardrop.uncertainty.detection: every score must be a number, got nan in {int(values.isnan().sum())} "
                f"of the {len(values)} {name}; give what cannot be scored the score inf"
            )
    return inside, outside
