"""What to have labelled next: scores of unlabelled cases, and the choice of a batch.

Letters: T passes, N cases, C classes; p_t the probabilities of pass t, p̄ their mean; H entropy in nats.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vardrop.prediction.measures import mutual_information, predictive_entropy, variation_ratio
from vardrop.uncertainty import inputs
from vardrop.uncertainty.joint_information import batch_bald, check_count

__all__ = ["METHODS", "SCORES", "acquire", "least_confident", "mean_std"]


def mean_std(samples: Tensor) -> Tensor:
    r"""The standard deviation over the passes, averaged over the classes (Kampffmeyer, Salberg, Jenssen 2016).

    .. math:: \frac1C \sum_c \sqrt{E_t[p_{tc}^2] - E_t[p_{tc}]^2}

    Args:
        samples: probabilities of every pass.

    Shape:
        ``[T, N, C]`` -> ``[N]``.

    Example:
        >>> import torch
        >>> mean_std(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.5000])
    """
    return samples.std(0, correction=0).mean(-1)


def least_confident(samples: Tensor) -> Tensor:
    r"""One minus the largest mean probability, :math:`1 - \max_c \bar p_c`.

    Gal, Islam, Ghahramani (2017) call this the variation ratio; that of Freeman (1965), and of this library, counts
    the passes that choose another class.

    Args:
        samples: probabilities of every pass.

    Shape:
        ``[T, N, C]`` -> ``[N]``.

    Example:
        >>> import torch
        >>> least_confident(torch.tensor([[[1.0, 0.0]], [[0.5, 0.5]]]))
        tensor([0.2500])
    """
    return 1 - samples.mean(0).amax(-1)


SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "bald": mutual_information,
    "entropy": predictive_entropy,
    "least_confident": least_confident,
    "mean_std": mean_std,
    "variation_ratio": variation_ratio,
}
METHODS = (*SCORES, "batch_bald", "random")


def acquire(
    samples: Any,
    count: int,
    method: str = "bald",
    *,
    generator: torch.Generator | None = None,
    configurations: int = 1000,
) -> Tensor:
    """Choose which unlabelled cases to have labelled next, by what the passes say about them.

    ``"bald"``, the mutual information of label and weights (Houlsby et al. 2011), looks for cases on which passes that
    are sure of themselves disagree; the batch is that of the highest scores, which may be much alike. ``"batch_bald"``
    counts what they say together (Kirsch, van Amersfoort, Gal 2019) and takes longer.

    Args:
        samples: a Prediction of classes, or the probabilities of every pass, ``[T, N, C]``.
        count: how many to choose, 1 to N.
        method: ``"bald"``, ``"batch_bald"``, ``"entropy"`` (of the mean), ``"least_confident"``, ``"mean_std"``,
            ``"random"``, ``"variation_ratio"``.
        generator: source of random choices. With one, cases of equal score are chosen among at random; without, the
            first of them are taken, and ``"random"`` and ``"batch_bald"`` use torch's default one.
        configurations: of labels, for ``"batch_bald"``; see :func:`vardrop.uncertainty.batch_bald`.

    Shape:
        ``[count]``, int64, the best first.

    Raises:
        ValueError: for an unknown method, more cases than there are, or what are no probabilities ``[T, N, C]``.

    Example:
        >>> import torch, vardrop as vd
        >>> passes = torch.tensor([[0.9, 0.5, 0.4], [0.1, 0.5, 0.6]])  # two passes, of the first of two classes
        >>> samples = torch.stack([passes, 1 - passes], -1)
        >>> vd.acquire(samples, 2)  # they disagree on 0, a little on 2; on 1 each is unsure
        tensor([0, 2])
        >>> vd.acquire(samples, 1, method="batch_bald")
        tensor([0])
    """
    if method not in METHODS:
        raise ValueError(f"vardrop.acquire: method must be one of {', '.join(METHODS)}, got {method!r}")
    if method == "batch_bald":
        return batch_bald(inputs.class_samples(samples), count, configurations, generator).indices
    scores = _scores(samples, method)
    check_count(count, len(scores))
    order = torch.arange(len(scores))
    if generator is not None or method == "random":
        place = "cpu" if generator is None else generator.device
        order = torch.randperm(len(scores), generator=generator, device=place)
    order = order.to(scores.device)
    return order[scores[order].argsort(descending=True, stable=True)[:count]]


_OF_PREDICTION = {"bald": "mutual_information", "entropy": "predictive_entropy", "variation_ratio": "variation_ratio"}


def _scores(samples: Any, method: str) -> Tensor:
    """``[N]``; a prediction has most of them without its samples."""
    if isinstance(samples, Tensor):
        p = inputs.checked_samples(samples)
        return torch.zeros(p.shape[1], device=p.device) if method == "random" else SCORES[method](p)
    if method == "random":
        return torch.zeros(len(samples.mean))
    if method == "least_confident":
        return inputs.measure(samples, "confidence")
    if method in _OF_PREDICTION:
        return inputs.measure(samples, _OF_PREDICTION[method])
    return SCORES[method](inputs.class_samples(samples))
