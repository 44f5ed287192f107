"""Regression on many splits at once: the members of one ensemble are the networks of the splits.

Legend: K members, N rows, B rows of a minibatch, D features, T passes; targets in standard deviations of the training
rows until they are scored.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.reproduce.experiments._uci_noise import best_noise, best_precision, log_density, scores

_LOOK, _MEMORY = 10, 0.1  # steps between two looks at rows that are left out; weight of the newest look
_ROWS_AT_ONCE = 2048  # of a member in one pass: what fits into a cache
VALIDATION_SAMPLES = 100  # passes over the rows that choose the precision


class Network(nn.Module):
    """One hidden layer, dropout before both linear layers, and the precision τ of the observations, learned with it."""

    def __init__(self, features: int, hidden: int, rate: float) -> None:
        super().__init__()
        self.body = nn.Sequential(
            vd.layers.Dropout(rate), nn.Linear(features, hidden), nn.ReLU(),
            vd.layers.Dropout(rate), nn.Linear(hidden, 1),
        )  # fmt: skip
        self.log_precision = nn.Parameter(torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The precision at the start: that of a network which says nothing."""
        nn.init.zeros_(self.log_precision)

    def forward(self, x: Tensor) -> Tensor:
        """``[B, D]`` -> ``[B]``."""
        return self.body(x).squeeze(-1)


@dataclass(frozen=True)
class Table:
    """The rows of every split: the same number in each.

    Attributes:
        x: ``[splits, N, D]``.
        y: ``[splits, N]``, in the units of the data.
        test_x: ``[splits, M, D]``.
        test_y: ``[splits, M]``.
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor

    def to(self, device: str) -> Table:
        """The same on a device."""
        return Table(*(part.to(device) for part in (self.x, self.y, self.test_x, self.test_y)))


@dataclass(frozen=True)
class Plan:
    """How long and how a network is trained."""

    steps: int
    batch: int
    rate: float  # of the optimiser, at its highest
    kl_scale: float = 1.0


class Batches:
    """Minibatches for every member from permutations of its own rows, one after the other."""

    def __init__(self, rows: Tensor, batch: int, generator: torch.Generator) -> None:
        self.rows, self.batch, self.generator = rows, min(batch, rows.shape[1]), generator
        self.at = rows.shape[1]
        self.order = rows

    def next(self) -> Tensor:
        """Indices of rows, ``[K, B]``."""
        if self.at + self.batch > self.rows.shape[1]:
            keys = torch.rand(self.rows.shape, generator=self.generator, device=self.rows.device)
            self.order, self.at = self.rows.gather(1, keys.argsort(1)), 0
        self.at += self.batch
        return self.order[:, self.at - self.batch : self.at]


def fit(
    ensemble: vd.Ensemble,
    table: Table,
    splits: Tensor,
    rows: list[Tensor],
    plan: Plan,
    seed: int,
    left: Tensor | None = None,
) -> None:
    """Train all members at once, each on its own minibatches.

    Adam with a cosine from the highest rate to nothing. A member's loss is multiplied by its number of rows relative to
    the largest: with the divergences beside it that is its own ELBO, and Adam does not mind the factor.

    Args:
        ensemble: of :class:`Network`.
        table: the data, targets in standard deviations.
        splits: the split of every member, ``[K]``.
        rows: groups of members in order, with the training rows of each: ``[members of the group, N]``.
        plan: steps, batch and rate.
        seed: of the minibatches.
        left: rows of every split that the last group has not got. They decide the precision, for this group and for the
            first: it is one over their mean square error in noisy passes, and follows it through training. A precision
            fitted to training rows grows as they are learned by heart, and takes the weight from the divergence. None
            for a precision that is learned with the network.
    """
    generator = torch.Generator(table.x.device).manual_seed(seed)
    groups = [Batches(some, plan.batch, generator) for some in rows]
    batch = min(group.batch for group in groups)
    count = torch.cat([torch.full((len(some),), float(some.shape[1])) for some in rows]).to(table.x.device)
    elbo = vd.ELBO(ensemble, num_data=int(count.max()), kl_scale=plan.kl_scale)
    log_precision: Tensor = ensemble.stacked.log_precision  # type: ignore[assignment]
    if left is not None:
        log_precision.requires_grad_(False)
        others = Batches(left, batch, generator)
        square = torch.ones(len(left), device=left.device)  # of the error, a running mean
    optimizer = torch.optim.Adam([p for p in ensemble.parameters() if p.requires_grad], lr=plan.rate, fused=True)
    ramp = max(1, min(100, plan.steps // 10))

    def shape(step: int) -> float:
        return min(1.0, (step + 1) / ramp) * 0.5 * (1 + math.cos(math.pi * step / plan.steps))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    at = splits.unsqueeze(1)
    weight = (count / count.max()).unsqueeze(1)
    ensemble.train()
    for step in range(plan.steps):
        if left is not None and step % _LOOK == 0:
            with torch.no_grad():
                index = others.next().repeat(2, 1)
                error = (ensemble(table.x[at, index], per_member=True) - table.y[at, index])[len(left) :]
                square.lerp_(error.square().mean(1), max(_MEMORY, _LOOK / (step + _LOOK)))
                log_precision.copy_(-square.log().repeat(2))
        index = torch.cat([group.next()[:, :batch] for group in groups])
        y = table.y[at, index]
        out = ensemble(table.x[at, index], per_member=True)
        nll = 0.5 * (log_precision.exp().unsqueeze(1) * (out - y).square() - log_precision.unsqueeze(1))
        loss = elbo((nll * weight).mean(1).sum())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def passes(ensemble: vd.Ensemble, x: Tensor, samples: int) -> Tensor:
    """What every member says in T passes with its noise on: x ``[K, M, D]`` -> ``[K, T, M]``."""
    ensemble.train()  # there is no layer in it that does anything else in training
    at_once = max(1, min(samples, _ROWS_AT_ONCE // x.shape[1]))
    parts = []
    for start in range(0, samples, at_once):
        count = min(at_once, samples - start)
        many = x.repeat(1, count, 1)  # [K, T' * M, D]
        parts.append(ensemble(many, per_member=True).view(len(x), count, -1))
    return torch.cat(parts, 1)


def read(name: str, splits: int) -> Table:
    """All splits of a UCI set, or as many random ones of scikit-learn's diabetes data.

    Raises:
        ValueError: if the splits differ in their number of rows.
    """
    if name == "diabetes":
        return _diabetes(splits)
    from vardrop.data import load

    data = [load(name, split=split) for split in range(splits)]
    counts = sorted({(len(d.train_y), len(d.test_y)) for d in data})
    if len(counts) > 1:
        raise ValueError(f"vardrop.reproduce: the splits of {name} must have equally many rows, got {counts}")
    return Table(*(torch.stack([getattr(d, f) for d in data]) for f in ("train_x", "train_y", "test_x", "test_y")))


def _diabetes(splits: int) -> Table:
    from sklearn.datasets import load_diabetes

    x, y = (torch.tensor(part, dtype=torch.float32) for part in load_diabetes(return_X_y=True))
    x = (x - x.mean(0)) / x.std(0)
    order = torch.rand(splits, len(x), generator=torch.Generator().manual_seed(0)).argsort(1)
    train, test = order[:, :-44], order[:, -44:]
    return Table(x[train], y[train], x[test], y[test])


@dataclass(frozen=True)
class Standardised:
    """A table with targets in standard deviations of the training rows, and what that was."""

    table: Table
    std: Tensor  # [splits]

    @classmethod
    def of(cls, table: Table) -> Standardised:
        """From the units of the data."""
        mean, std = table.y.mean(1, keepdim=True), table.y.std(1, keepdim=True)
        return cls(Table(table.x, (table.y - mean) / std, table.test_x, (table.test_y - mean) / std), std.squeeze(1))


def held_out(table: Table, seed: int) -> tuple[Tensor, Tensor]:
    """Rows of every split for training, and the last fifth, for what has to be chosen: ``[splits, ...]`` each."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(table.y.shape, generator=generator).argsort(1).to(table.y.device)
    kept = int(0.8 * table.y.shape[1])
    return order[:, :kept], order[:, kept:]


def _at(values: Tensor, splits: Tensor, rows: Tensor) -> Tensor:
    return values[splits.unsqueeze(1), rows]


def learned(table: Table, plan: Plan, hidden: int, samples: int, seed: int) -> list[dict[str, float]]:
    """Type A variational dropout for every split, and a twin for its precision; a row for every split.

    ``ll_fixed`` is the log-density under one precision for all rows, fitted to the same rows.
    """
    data = Standardised.of(table)
    table, splits = data.table, torch.arange(len(data.std), device=table.y.device)
    network = Network(table.x.shape[-1], hidden, rate=0.0)
    vd.convert_(network, vd.VariationalDropout(type="A", sharing="neuron", rate=0.01))
    ensemble = vd.Ensemble(network, members=2 * len(splits), seed=seed).to(table.y.device)
    every = torch.arange(table.y.shape[1], device=table.y.device).expand(table.y.shape)
    kept, left = held_out(table, seed)
    fit(ensemble, table, torch.cat([splits, splits]), [every, kept], plan, seed, left)
    members = ensemble.members()
    own, twins = (vd.Ensemble.from_modules(half) for half in (members[: len(splits)], members[len(splits) :]))
    said = passes(twins, _at(table.x, splits, left), min(samples, VALIDATION_SAMPLES))
    y = _at(table.y, splits, left)
    tested = passes(own, table.test_x, samples)
    rows = scores(tested, table.test_y, data.std, *best_noise(said, y))
    for row, fixed in zip(rows, scores(tested, table.test_y, data.std, best_precision(said, y)), strict=True):
        row["ll_fixed"] = fixed["ll"]
    rates = vd.dropout_rates(own)
    for which, of_layer in zip(("input_rate", "hidden_rate"), rates.values(), strict=True):
        for row, mean in zip(rows, of_layer.mean(1).tolist(), strict=True):
            row[which] = mean
    return rows


def searched(
    table: Table, plan: Plan, hidden: int, samples: int, seed: int, rates: tuple[float, ...]
) -> list[dict[str, float]]:
    """MC dropout for every split at the rate, and with the precision, that its validation rows prefer.

    The networks of the search get half the steps.
    """
    data = Standardised.of(table)
    table, splits = data.table, torch.arange(len(data.std), device=table.y.device)
    kept, left = held_out(table, seed)
    x, y = _at(table.x, splits, left), _at(table.y, splits, left)
    densities, precisions = [], []
    for rate in rates:
        ensemble = _networks(table, hidden, rate, len(splits), seed)
        fit(ensemble, table, splits, [kept], replace(plan, steps=plan.steps // 2), seed)
        said = passes(ensemble, x, min(samples, VALIDATION_SAMPLES))
        precisions.append(best_precision(said, y))
        densities.append(log_density(said, y, precisions[-1]))
    best = torch.stack(densities).argmax(0)
    log_precision = torch.stack(precisions).gather(0, best.unsqueeze(0)).squeeze(0)
    said = torch.empty(len(splits), samples, table.test_y.shape[1], device=table.y.device)
    every = torch.arange(table.y.shape[1], device=table.y.device)
    for index in best.unique().tolist():
        some = splits[best == index]
        ensemble = _networks(table, hidden, rates[index], len(some), seed + 1)
        fit(ensemble, table, some, [every.expand(len(some), -1)], plan, seed)
        said[some] = passes(ensemble, table.test_x[some], samples)
    rows = scores(said, table.test_y, data.std, log_precision)
    return [{**row, "hidden_rate": rates[index]} for row, index in zip(rows, best.tolist(), strict=True)]


def _networks(table: Table, hidden: int, rate: float, members: int, seed: int) -> vd.Ensemble:
    network = Network(table.x.shape[-1], hidden, rate)
    return vd.Ensemble(network, members=members, seed=seed).to(table.y.device)
