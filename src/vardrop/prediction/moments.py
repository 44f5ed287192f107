"""What is kept of the passes as they come: moments, and for classes entropies and votes. No pass is needed twice."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vardrop.prediction.measures import entropy, votes, wide

KINDS = ("logits", "probabilities", "log_probabilities", "values")


class Turned(NamedTuple):
    """Outputs of some passes as what they are about: values, or probabilities with their logarithms."""

    samples: Tensor
    log_probabilities: Tensor | None = None


def turn(outputs: Tensor, kind: str | None, class_dim: int) -> Turned:
    """The outputs ``[T, N, ...]`` of some passes as values, or as probabilities of classes."""
    if kind not in KINDS[:3]:
        return Turned(outputs if outputs.is_floating_point() else outputs.float())
    dim = class_dim if class_dim < 0 else class_dim + 1
    if not (outputs.is_floating_point() and -outputs.ndim + 2 <= class_dim < outputs.ndim - 1 and class_dim):
        raise ValueError(
            f"vardrop.mc_predict: outputs={kind!r} must be floating point with classes on dimension {class_dim} behind "
            f"the examples, got {outputs.dtype} of shape {tuple(outputs.shape[1:])}; say where with class_dim="
        )
    if outputs.shape[dim] < 2:
        raise ValueError(
            f"vardrop.mc_predict: outputs={kind!r} must have two classes or more on dimension {class_dim}, got shape "
            f"{tuple(outputs.shape[1:])}; for one logit z that means yes or no, give the model outputs (0, z)"
        )
    exact = wide(outputs, narrow=outputs.ndim > 3)  # a map of classes at every place is long
    if kind == "logits":
        logs = exact.log_softmax(dim)
        return Turned(logs.exp(), logs)
    if kind == "log_probabilities":
        return Turned(_summing_to_one(exact.exp(), kind, dim), exact)
    return Turned(_summing_to_one(exact, kind, dim))


def _summing_to_one(probabilities: Tensor, kind: str, dim: int) -> Tensor:
    worst = (probabilities.sum(dim) - 1).abs().amax().item() if probabilities.numel() else 0.0
    lowest = probabilities.amin().item() if probabilities.numel() else 0.0
    if worst > 0.02 or lowest < 0:  # in half precision a sum over many classes is off by a per cent
        raise ValueError(
            f"vardrop.mc_predict: outputs={kind!r} must be probabilities that sum to 1 over the classes, got sums up "
            f"to {worst:.2g} off and entries down to {lowest:.2g}; for raw scores say outputs='logits'"
        )
    return probabilities


class Moments:
    """Mean and variance of passes that come in chunks (Chan, Golub, LeVeque 1979), joined in float64 where it exists.

    Attributes:
        count: passes seen.
        mean: of them.
        variance: of them, not an estimate from them: divided by their number.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.variance = torch.empty(0)

    def add(self, chunk: Tensor) -> None:
        """``[T', N, ...]``: some more passes."""
        count, before = len(chunk), self.count
        if chunk.dtype.itemsize < 4:
            chunk = chunk.float()
        if count == 1 or not chunk.numel():
            mean = chunk[0].clone()
            variance = torch.zeros_like(mean)
        else:
            variance, mean = torch.var_mean(chunk, 0, correction=0)
        self.count += count
        if before:
            share, step = count / self.count, wide(mean) - wide(self.mean)
            mean = wide(self.mean) + step * share
            spread = wide(variance) * share + step.square() * (share * (1 - share))
            variance = wide(self.variance) * (1 - share) + spread
        self.mean, self.variance = mean, variance


@dataclass(frozen=True)
class Summary:
    """What is left of all passes over one batch, or over several after :func:`joined`.

    Attributes:
        mean: ``[N, ...]``.
        variance: ``[N, ...]``.
        samples: ``[T, N, ...]``, or None if they were not kept.
        predictive_entropy: ``[N, ...]`` without the classes, as the next two; None without classes.
        expected_entropy: of the passes by themselves.
        mutual_information: the difference.
        votes: ``[N, C, ...]``: how many passes choose a class; None without classes.
    """

    mean: Tensor
    variance: Tensor
    samples: Tensor | None = None
    predictive_entropy: Tensor | None = None
    expected_entropy: Tensor | None = None
    mutual_information: Tensor | None = None
    votes: Tensor | None = None

    def to(self, device: Any) -> Summary:
        """The same on another device."""
        moved: Any = {name: None if part is None else part.to(device) for name, part in vars(self).items()}
        return Summary(**moved)


def joined(summaries: list[Summary]) -> Summary:
    """The summaries of several batches as one, along the examples."""
    if len(summaries) == 1:
        return summaries[0]
    whole: Any = {}
    for name in vars(summaries[0]):
        parts = [getattr(summary, name) for summary in summaries]
        whole[name] = None if parts[0] is None else torch.cat(parts, 1 if name == "samples" else 0)
    return Summary(**whole)


class Collector:
    """Takes the passes over one batch, chunk by chunk."""

    def __init__(self, kind: str | None, class_dim: int, keep: bool) -> None:
        self.kind, self.class_dim, self.keep = kind, class_dim, keep
        self.moments = Moments()
        self.kept: list[Tensor] = []
        self.entropies: Tensor | None = None
        self.votes: Tensor | None = None
        self.dtype = torch.float32

    def add(self, outputs: Tensor) -> None:
        """``[T', N, ...]``: the outputs of some more passes."""
        samples, logs = turn(outputs, self.kind, self.class_dim)
        classes = self.kind in KINDS[:3]
        narrow = classes and outputs.dtype.itemsize < 4  # probabilities want more digits than half a float has
        self.dtype = outputs.dtype if outputs.is_floating_point() and not narrow else torch.float32
        self.moments.add(samples)
        if self.keep:
            self.kept.append(samples.to(self.dtype))
        if classes:
            dim = self.class_dim if self.class_dim < 0 else self.class_dim + 1
            entropies = wide(entropy(samples, dim, logs)).sum(0)
            chosen = votes(samples, self.class_dim)
            self.entropies = entropies if self.entropies is None else self.entropies + entropies
            self.votes = chosen if self.votes is None else self.votes + chosen

    def summary(self) -> Summary:
        """All of it, in the type of the outputs, or in float32 where theirs is narrower."""
        moments, dtype = self.moments, self.dtype if self.dtype.itemsize >= 4 else torch.float32
        kept = None if not self.keep else self.kept[0].contiguous() if len(self.kept) == 1 else torch.cat(self.kept)
        found = Summary(moments.mean.to(dtype), moments.variance.to(dtype), kept)
        if self.entropies is None:
            return found
        expected = self.entropies / moments.count
        total = entropy(moments.mean, self.class_dim)
        difference = (total - expected).clamp_min(0)  # below 0 only by rounding
        return replace(
            found,
            predictive_entropy=total.to(dtype),
            expected_entropy=expected.to(dtype),
            mutual_information=difference.to(dtype),
            votes=self.votes,
        )


def check_numbers(mean: Tensor, owner: str) -> None:
    """Refuse outputs whose mean over the passes ``[N, ...]`` is not a number somewhere."""
    wrong = mean.isnan()
    if bool(wrong.any()):
        examples = int(wrong.flatten(1).any(1).sum()) if wrong.ndim > 1 else int(wrong.sum())
        raise ValueError(
            f"vardrop.{owner}: outputs must be numbers, got nan for {examples} of {len(wrong)} examples; look at the "
            "inputs, and at the model in evaluation"
        )
