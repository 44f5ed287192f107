"""Networks of one architecture that differ in their seed, trained in one vmapped step (for graphics processors).

Legend: K networks, N training rows of each, B rows of a minibatch.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

import vardrop as vd
from vardrop.reproduce.experiments._training import Best, Parts, Plan, adam, all_found, begin, look, step
from vardrop.training import Averages
from vardrop.training.evaluation import evaluate
from vardrop.training.task import Task


def fit_together(
    networks: Sequence[nn.Module], kl_scale: float, some: Sequence[Parts], plan: Plan, seeds: Sequence[int]
) -> list[tuple[Task, dict[str, Best], float]]:
    r"""Train networks in one step as :func:`vardrop.reproduce.experiments._training.fit` trains each by itself.

    .. math:: loss = \sum_k \Big( \overline{nll}_k + scale \cdot \frac{KL_k}{N} \Big)

    Adam works on each parameter by itself, so the sum trains every network on its own bound (eq. 1). The order of the
    rows is that of a network trained by itself, so without noise the networks are the same; the noise is another in
    every network and starts from the first seed.

    Args:
        networks: as one by one, all of one architecture, without BatchNorm.
        kl_scale: as there.
        some: the rows of every network, as many of each.
        plan: as there.
        seeds: one for every network.

    Returns:
        What ``fit`` returns, for every network; seconds are its share.

    Raises:
        FloatingPointError: if a loss was never finite when validation rows were looked at.
    """
    ensemble = vd.Ensemble.from_modules([begin(net, part) for net, part in zip(networks, some, strict=True)])
    x, y = (torch.stack([part.train[i] for part in some]) for i in (0, 1))
    device = x.device
    elbo = vd.ELBO(ensemble, x.shape[1], kl_scale)
    optimizer = adam(ensemble, plan.lr)
    averages = Averages(ensemble.parameters(), plan.average)
    orders = [torch.Generator().manual_seed(seed) for seed in seeds]
    each = torch.arange(len(seeds), device=device)[:, None]
    torch.manual_seed(seeds[0])
    best = [{"error": Best(), "nll": Best()} for _ in seeds]
    start = time.perf_counter()
    ensemble.train()
    for epoch in range(1, plan.epochs + 1):
        shuffled = torch.stack([torch.randperm(x.shape[1], generator=order) for order in orders]).to(device)
        for rows in shuffled.split(plan.batch, dim=1):
            _, nll = ensemble(x[each, rows], y[each, rows], per_member=True)
            step(elbo(nll.mean(1).sum()), optimizer, averages)
        if plan.is_look(epoch):
            with averages.swapped_in():
                members: list[Any] = ensemble.members()
            for found, member, part in zip(best, members, some, strict=True):
                look(found, epoch, evaluate(member, member, *part.validation), list(member.parameters()))
    seconds = (time.perf_counter() - start) / len(seeds)
    for found in best:
        all_found(found, plan.epochs)
    trained: list[Any] = ensemble.members()
    return [(member, found, seconds) for member, found in zip(trained, best, strict=True)]
