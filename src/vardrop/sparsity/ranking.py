"""Which weights go first: groups that share a rate, ordered by it."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vardrop.weights.modules import NoisyWeight, noisy_weights


class Groups(NamedTuple):
    """The entries of one weight that share an α, and so go together.

    ``group`` has the shape of the weight and says which group an entry is of; ``log_alpha`` and ``magnitude`` (mean of
    |θ|) are ``[groups]``, infinite and 0 for groups that are zero already.
    """

    weight: NoisyWeight
    group: Tensor
    log_alpha: Tensor
    magnitude: Tensor


def _check_single(weight: NoisyWeight) -> None:
    """Refuse the stacked weights of an ensemble, whose α mean other things in every member."""
    if weight.mean.ndim > len(weight.geometry.shape):
        raise ValueError(
            f"vardrop.sparsity: {weight.name} must be the weight of one network, got those of {len(weight.mean)} "
            "members of a vd.Ensemble; take them one by one, from ensemble.members()"
        )


def log_alpha_of(weight: NoisyWeight) -> Tensor:
    """log α of every entry of a weight."""
    _check_single(weight)
    _, mean, noise, config, geometry = weight
    log_alpha = config.log_alpha(mean.detach(), noise.detach(), geometry).float()
    return geometry.spread(log_alpha, getattr(config, "unit", "input")).expand(mean.shape)


def groups_of(model: nn.Module) -> tuple[list[Groups], dict[str, str]]:
    """Of every random weight of a model with learned noise; for the others, why not."""
    found, skipped = [], {}
    for weight in noisy_weights(model):
        name, mean, noise, config, geometry = weight
        _check_single(weight)
        if not config.learned:
            skipped[name] = f"has the fixed rates of a {type(config).__name__}, which say nothing about its weights"
            continue
        log_alpha = config.log_alpha(mean.detach(), noise.detach(), geometry).float().flatten().clone()
        count = torch.arange(log_alpha.numel(), device=mean.device)
        shaped = count.view(noise.shape)
        index = geometry.spread(shaped, getattr(config, "unit", "input")).expand(mean.shape)
        magnitude = torch.zeros_like(log_alpha).index_add_(0, index.flatten(), mean.detach().abs().float().flatten())
        log_alpha[magnitude == 0] = math.inf
        found.append(Groups(weight, index, log_alpha, magnitude * (log_alpha.numel() / mean.numel())))
    return found, skipped


class Order:
    """All groups of a model by falling log α, of equal ones the smaller first; a *count* is how many have gone."""

    def __init__(self, groups: list[Groups]) -> None:
        self.groups = groups
        log_alpha = torch.cat([each.log_alpha.cpu() for each in groups])
        magnitude = torch.cat([each.magnitude.cpu() for each in groups])
        sizes = torch.cat([torch.full_like(g.log_alpha, g.group.numel() // len(g.log_alpha)).cpu() for g in groups])
        by_size = magnitude.argsort(stable=True)
        self.order = by_size[log_alpha[by_size].argsort(descending=True, stable=True)]
        self.rank = torch.empty_like(self.order)
        self.rank[self.order] = torch.arange(len(self.order))
        self.log_alpha = log_alpha[self.order]
        self.gone = sizes[self.order].double().cumsum(0)  # weights gone after each group
        self.total = len(self.order)
        self.already = int(self.log_alpha.isinf().sum())

    @property
    def largest(self) -> float:
        """The largest log α of a weight that is not zero."""
        return float(self.log_alpha[self.already]) if self.already < self.total else -math.inf

    def above(self, threshold: float) -> int:
        """How many groups are above a threshold."""
        return int((self.log_alpha > threshold).sum())

    def reaching(self, sparsity: float) -> int:
        """How many groups have to go for a sparsity of at least so much."""
        wanted = sparsity * float(self.gone[-1])
        return max(self.already, int((self.gone < wanted - 1e-6).sum()) + 1 if wanted > 0 else 0)

    def threshold(self, count: int) -> float:
        """log α between what is gone and what is left; infinite if nothing is gone but what was zero already."""
        if count <= self.already:
            return math.inf
        return float(self.log_alpha[count - 1])

    def sparsity(self, count: int) -> float:
        """Which part of all weights is gone."""
        return float(self.gone[count - 1] / self.gone[-1]) if count else 0.0

    def _removed(self, count: int) -> list[Tensor]:
        """For every weight, which of its groups are gone."""
        return list((self.rank < count).split([len(each.log_alpha) for each in self.groups]))

    def emptied(self, count: int) -> list[str]:
        """The weights of which nothing is left, and was before."""
        return [
            each.weight.name
            for each, removed in zip(self.groups, self._removed(count), strict=True)
            if removed.all() and not each.log_alpha.isinf().all()
        ]

    def masks(self, count: int) -> list[Tensor]:
        """For every weight, which of its entries are gone."""
        return [
            removed.to(each.group.device)[each.group]
            for each, removed in zip(self.groups, self._removed(count), strict=True)
        ]
