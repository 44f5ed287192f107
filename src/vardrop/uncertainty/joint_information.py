r"""BatchBALD: the batch of cases that together tell most about the model (Kirsch, van Amersfoort, Gal 2019).

Letters: T passes with weights w_t, N cases, C classes, S configurations of the labels y_1 ... y_m of the cases chosen
so far. The case chosen next is the one with the largest

.. math:: I(y; w \mid y_1 \dots y_m) = E_{y_1 \dots y_m} H[p(y \mid y_1 \dots y_m)] - E_t H[p(y \mid w_t)],
          \qquad p(y \mid y_1 \dots y_m) = \sum_t \pi_t \, p(y \mid w_t), \quad \pi_t \propto \prod_j p(y_j \mid w_t)

which adds up to the joint mutual information I(y_1 ... y_m; w). Written in this way nothing underflows in long
batches: the posterior over the passes comes from log-likelihoods, and no joint probability is ever needed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from vardrop.uncertainty.inputs import checked_samples

_ENTRIES = 1 << 22  # float64 numbers of the largest intermediate tensor: 32 MiB
_AT_ONCE = 256  # candidates looked at together; the bounds spare most of the others


class Batch(NamedTuple):
    """What :func:`batch_bald` chooses.

    Attributes:
        indices: ``[count]``, int64, in the order in which they were chosen.
        gains: ``[count]``, nats: what each adds to the mutual information of those before it. Their sum is that of
            the batch.
    """

    indices: Tensor
    gains: Tensor


def batch_bald(
    samples: Tensor, count: int, configurations: int = 1000, generator: torch.Generator | None = None
) -> Batch:
    """The greedy batch, which has at least 1 - 1/e of the information of the best one.

    All configurations of the labels are counted while there are at most ``configurations`` of them; from then on about
    as many are drawn, equally many from every pass. A case adds the less the more has been chosen, so cases whose last
    gain is below the best new one are not looked at again.

    Args:
        samples: ``[T, N, C]``, probabilities of every pass.
        count: how many to choose, 1 to N.
        configurations: S at most; the standard error of a gain falls as 1/√S, time and memory grow with S.
        generator: source of the draws; torch's default one if None.

    Raises:
        ValueError: for other shapes, or counts.

    Example:
        >>> import torch
        >>> said = torch.tensor([[0.9, 0.1], [0.1, 0.9]])  # two passes that disagree
        >>> samples = torch.stack([said, said, torch.full((2, 2), 0.5)], 1)  # about two equal cases; not on a third
        >>> batch = batch_bald(samples, 2)
        >>> batch.indices, batch.gains
        (tensor([0, 1]), tensor([0.3681, 0.1463], dtype=torch.float64))
    """
    p = checked_samples(samples)
    passes, cases, classes = p.shape
    check_count(count, cases)
    if configurations < 1:
        raise ValueError(
            f"vardrop.acquire: configurations must be at least 1, got {configurations}; 1000 is usual for BatchBALD"
        )
    p = p / p.sum(-1, keepdim=True)
    expected = torch.special.entr(p).sum(-1).mean(0)
    bounds = torch.full((cases,), math.inf, dtype=p.dtype, device=p.device)
    labels = _Labels(passes, configurations, p.device, generator)
    indices, gains = [], []
    for _ in range(count):
        best, at = -math.inf, -1
        size = max(1, min(_AT_ONCE, _ENTRIES // (classes * max(passes, len(labels.weights)))))
        for part in bounds.argsort(descending=True, stable=True).split(size):
            if bounds[part[0]] <= best:
                break
            fresh = labels.entropy_of(p[:, part]) - expected[part]
            bounds[part] = torch.where(bounds[part].isneginf(), -math.inf, fresh)
            top = bounds[part].max(0)
            if top.values > best:
                best, at = top.values.item(), int(part[top.indices])
        indices.append(at)
        gains.append(best)
        bounds[at] = -math.inf
        if len(indices) < count:
            labels.add(p[:, at])
    return Batch(torch.tensor(indices, device=p.device), torch.tensor(gains, dtype=p.dtype, device=p.device))


class _Labels:
    """Configurations of the labels chosen so far: all of them, or draws.

    ``log_likelihood`` is ``[T, S]``, log p(y_1 ... y_m | w_t); ``weights`` ``[S]`` are the probabilities of the
    configurations, or 1/S; ``drawn_from`` ``[S]`` is the pass that a draw came from, None as long as all are there.
    """

    def __init__(self, passes: int, most: int, device: torch.device, generator: torch.Generator | None) -> None:
        self.most, self.generator = most, generator
        self.log_likelihood = torch.zeros(passes, 1, dtype=torch.float64, device=device)
        self.weights = torch.ones(1, dtype=torch.float64, device=device)
        self.drawn_from: Tensor | None = None

    def given(self, p: Tensor) -> Tensor:
        """p(y | y_1 ... y_m) in every configuration: ``[T, n, C]`` -> ``[S, n, C]``."""
        return (self.log_likelihood.softmax(0).T @ p.flatten(1)).unflatten(1, p.shape[1:])

    def entropy_of(self, p: Tensor) -> Tensor:
        """E H[p(y | y_1 ... y_m)], ``[T, n, C]`` -> ``[n]``."""
        q = self.given(p)
        minus = q.clamp(min=1e-300).log_().mul_(q)  # q log q: a third of the time of torch.special.entr
        return -(self.weights @ minus.flatten(1)).view(p.shape[1:]).sum(-1)

    def add(self, p: Tensor) -> None:
        """One more case, ``[T, C]``, whose label is not known."""
        classes = p.shape[1]
        if self.drawn_from is None and len(self.weights) * classes <= self.most:
            probability = self.weights[:, None] * self.given(p[:, None]).squeeze(1)  # [S, C]
            possible = probability.flatten() > 0
            joint = self.log_likelihood[:, :, None] + p.log()[:, None]
            self.log_likelihood, self.weights = joint.flatten(1)[:, possible], probability.flatten()[possible]
            return
        if self.drawn_from is None:
            self.drawn_from = self._start_drawing(len(p))
        label = self._draw(p[self.drawn_from], 1).squeeze(1)
        self.log_likelihood = self.log_likelihood + p.log()[:, label]

    def _start_drawing(self, passes: int) -> Tensor:
        """Draw configurations, equally many from every pass; says from which each is."""
        each = max(1, self.most // passes)
        drawn = self._draw(self.log_likelihood.exp(), each).flatten()  # [T * each]
        self.log_likelihood = self.log_likelihood[:, drawn]
        self.weights = torch.full((len(drawn),), 1 / len(drawn), dtype=torch.float64, device=drawn.device)
        return torch.arange(passes, device=drawn.device).repeat_interleave(each)

    def _draw(self, p: Tensor, each: int) -> Tensor:
        place = p.device if self.generator is None else self.generator.device
        return torch.multinomial(p.to(place), each, replacement=True, generator=self.generator).to(p.device)


def check_count(count: int, cases: int) -> None:
    """Refuse to choose none, or more than there are."""
    if isinstance(count, bool) or not isinstance(count, int) or not 1 <= count <= cases:
        raise ValueError(
            f"vardrop.acquire: count must be a whole number from 1 to the {cases} cases there are, got {count}; score "
            "more cases, or choose fewer"
        )
