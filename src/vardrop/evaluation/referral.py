"""What is left to the model when its least certain answers go to a person: plain arrays in, plain numbers out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = 200  # of the slider, from nobody to everybody


def referral(
    loss: NDArray[Any], score: NDArray[Any], elsewhere: Mapping[str, NDArray[Any]] | None = None, steps: int = STEPS
) -> dict[str, Any]:
    r"""What the model keeps, and how well it does on it, as the share that goes to a person grows from 0 to 1.

    .. math:: L(s) = \frac{1}{N - h} \sum_{i \notin H} \ell_i, \qquad h = \lfloor sN + \tfrac12 \rfloor

    H are the h examples of highest score. This is the risk-coverage curve (El-Yaniv and Wiener 2010) read from its
    other end: coverage is 1 - h / N. Examples of equal score have the mean loss of all of them, which is what a random
    order among them would give, as in :func:`vardrop.uncertainty.risk_coverage`.

    Args:
        loss: ``[N]``, 0 or 1 for a right or wrong class, a squared error for a number.
        score: ``[N]``, how uncertain the model is, in any unit.
        elsewhere: scores of other examples, by name, of which it is told how many the same threshold hands over.
        steps: equal steps between 0 and 1.

    Returns:
        Columns of ``steps + 1`` entries: ``share`` asked for, ``handed`` and ``kept`` examples, ``loss`` the mean of
        the kept ones and ``ideal`` the lowest there could be (both None where none is kept), ``handed_loss`` the sum
        over those handed over, ``threshold`` the highest score that is kept (None where none is), and ``elsewhere``
        name -> share above the threshold.

    Raises:
        ValueError: if there are no examples, or not as many scores as losses.

    Example:
        >>> import numpy as np
        >>> from vardrop.evaluation.referral import referral
        >>> referral(np.array([0, 1, 0, 0]), np.array([0.1, 0.9, 0.8, 0.2]), steps=4)["loss"]
        [0.25, 0.0, 0.0, 0.0, None]
    """
    loss, score = np.asarray(loss, float), np.asarray(score, float)
    if loss.ndim != 1 or loss.shape != score.shape or not len(loss):
        raise ValueError(
            "vardrop.evaluation: referral needs one loss and one score for each of at least one example, got shapes "
            f"{loss.shape} and {score.shape}"
        )
    total = len(loss)
    _, ties, size = np.unique(score, return_inverse=True, return_counts=True)
    expected = (np.bincount(ties, loss) / size)[ties]  # among equals nobody knows who is wrong
    order = np.argsort(-score, kind="stable")
    by_score = np.concatenate([[0.0], np.cumsum(expected[order])])  # loss that has gone to the person
    at_best = np.concatenate([[0.0], np.cumsum(np.sort(loss)[::-1])])
    shares = np.arange(steps + 1) / steps
    handed = np.minimum(np.floor(shares * total + 0.5).astype(int), total)
    columns: dict[str, Any] = {
        "share": shares.tolist(),
        "handed": handed.tolist(),
        "kept": (total - handed).tolist(),
        "handed_loss": by_score[handed].tolist(),
    }
    for name, gone in (("loss", by_score), ("ideal", at_best)):
        columns[name] = [float(max(gone[-1] - gone[h], 0.0) / (total - h)) if h < total else None for h in handed]
    columns["threshold"] = [float(score[order[h]]) if h < total else None for h in handed]
    columns["elsewhere"] = {
        name: [1.0 if limit is None else float(np.mean(np.asarray(other) > limit)) for limit in columns["threshold"]]
        for name, other in (elsewhere or {}).items()
    }
    return columns


def position_of(columns: Mapping[str, Any], share: float) -> int:
    """The step of :func:`referral` that is nearest to a share."""
    return int(np.argmin(np.abs(np.asarray(columns["share"]) - share)))


def histograms(scores: Mapping[str, NDArray[Any]], bins: int = 40) -> dict[str, Any]:
    """How several sets of scores are distributed, in bins that they have in common.

    Args:
        scores: name -> ``[N]``, finite.
        bins: of equal width from the lowest to the highest score of all, 0 included.

    Returns:
        ``edges`` (one more than bins) and ``shares``: name -> share of the set in each bin.

    Example:
        >>> import numpy as np
        >>> from vardrop.evaluation.referral import histograms
        >>> histograms({"in": np.array([0.0, 0.4]), "out": np.array([1.0, 0.9, 0.2])}, bins=2)["shares"]["in"]
        [1.0, 0.0]
    """
    every = np.concatenate([np.asarray(values, float) for values in scores.values()])
    low, high = min(float(every.min()), 0.0), float(every.max())
    edges = np.linspace(low, high if high > low else low + 1.0, bins + 1)
    shares = {name: (np.histogram(values, edges)[0] / max(len(values), 1)).tolist() for name, values in scores.items()}
    return {"edges": edges.tolist(), "shares": shares}
