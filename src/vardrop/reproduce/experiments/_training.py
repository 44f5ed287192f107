"""One training run of a comparison: Adam, temporal averaging, and the epoch that validation rows choose."""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.data import Data, load, split_validation
from vardrop.training import Averages
from vardrop.training.evaluation import Scores, evaluate
from vardrop.training.task import Categorical, Gaussian, Task

AT_BOUND = 0.99  # α from here on counts as at its bound of 1, near which Adam's steps keep it moving
Pair = tuple[Tensor, Tensor]  # examples and targets
_NOTHING = Scores(math.inf, math.inf)


class Parts(NamedTuple):
    """The rows to train on, those that choose, and those that are looked at once, at the end."""

    train: Pair
    validation: Pair
    test: Pair
    data: Data  # whose train_x are the rows to train on


@dataclass(frozen=True)
class Plan:
    """How a network is trained.

    Args:
        epochs: passes over the training rows.
        batch: rows of a step.
        lr: learning rate of Adam.
        average: decay of the average over the weights of all steps.
        looks: how many times, evenly spread over the epochs, validation rows are looked at.
    """

    epochs: int
    batch: int
    lr: float = 1e-3
    average: float = 0.999
    looks: int | None = None  # after every epoch

    def is_look(self, epoch: int) -> bool:
        """Whether validation rows are looked at after an epoch; the first is 1."""
        looks = min(self.looks or self.epochs, self.epochs)
        return epoch * looks // self.epochs > (epoch - 1) * looks // self.epochs


@dataclass
class Best:
    """The averaged weights that validation rows prefer so far."""

    key: tuple[float, float] = (math.inf, math.inf)
    epoch: int = 0
    scores: Scores = _NOTHING
    values: list[Tensor] = dataclasses.field(default_factory=list)


@functools.lru_cache(maxsize=1)  # cells of one data set follow each other
def _read(name: str, split: int) -> Data:
    return load(name, split=split)


def parts(
    name: str,
    validation: int | float,
    seed: int,
    device: str,
    examples: int | None = None,
    split: int = 0,
    standardise: bool = False,
) -> Parts:
    """A data set, split by a seed.

    Args:
        name: for :func:`vardrop.data.load`.
        validation: how many of the training rows choose the epoch: a number, or a share below 1.
        seed: of the rows that are drawn, and of those that are kept back.
        device: where to keep them.
        examples: how many of the training rows there are at all, validation rows among them; None for every one.
        split: for :func:`vardrop.data.load`.
        standardise: give every channel of images mean 0 and standard deviation 1 over the training rows.
    """
    data = _read(name, split)
    if examples is not None:
        order = torch.randperm(len(data.train_x), generator=torch.Generator().manual_seed(seed))[:examples]
        data = dataclasses.replace(data, train_x=data.train_x[order], train_y=data.train_y[order])
    data, x, y = split_validation(data, validation, seed)
    if standardise:
        std, mean = torch.std_mean(data.train_x, (0, 2, 3), keepdim=True)
        x = (x - mean) / std
        data = dataclasses.replace(data, train_x=(data.train_x - mean) / std, test_x=(data.test_x - mean) / std)
    pairs = (data.train_x, data.train_y), (x, y), (data.test_x, data.test_y)
    train, kept, test = ((a.to(device), b.to(device)) for a, b in pairs)
    return Parts(train, kept, test, data)


def fit(network: nn.Module, kl_scale: float, some: Parts, plan: Plan, seed: int) -> tuple[Task, dict[str, Best], float]:
    """Train a network in place on the evidence lower bound.

    Args:
        network: from :func:`vardrop.methods.prepare`, on the device of the rows.
        kl_scale: the weight of the divergence.
        some: the rows.
        plan: how long, and how.
        seed: of the order of the rows and of the noise, which does not depend on the numbers that the weights took.

    Returns:
        The network with its likelihood; the averaged weights with the smallest error, and those with the smallest nll,
        on validation rows (:func:`take` puts them in); seconds.

    Raises:
        FloatingPointError: if the loss was never finite when validation rows were looked at.
    """
    x, y = some.train
    task = begin(network, some)
    elbo = vd.ELBO(task.network, len(x), kl_scale)
    optimizer = adam(task, plan.lr)
    averages = Averages(task.parameters(), plan.average)
    order = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    best = {"error": Best(), "nll": Best()}
    start = time.perf_counter()
    task.train()
    for epoch in range(1, plan.epochs + 1):
        for rows in torch.randperm(len(x), generator=order).to(x.device).split(plan.batch):
            step(elbo(task(x[rows], y[rows])[1].mean()), optimizer, averages)
        if plan.is_look(epoch):
            with averages.swapped_in():
                scores = evaluate(task, task, *some.validation)
            look(best, epoch, scores, averages.values)
    all_found(best, plan.epochs)
    return task, best, time.perf_counter() - start


def begin(network: nn.Module, some: Parts) -> Task:
    """A network with the likelihood of its rows, on their device."""
    y = some.train[1]
    likelihood = Gaussian(y) if some.data.task == "regression" else Categorical()
    return Task(network, likelihood).to(y.device)


def adam(tasks: nn.Module, lr: float) -> torch.optim.Adam:
    """Adam for one task or several; a log precision learns ten times as fast, as in :mod:`vardrop.training`."""
    named = list(tasks.named_parameters())
    precisions = [p for name, p in named if "likelihood." in name]
    others = [p for name, p in named if "likelihood." not in name]
    groups = [{"params": others, "lr": lr}, {"params": precisions, "lr": 10 * lr}]
    return torch.optim.Adam([group for group in groups if group["params"]], fused=True)


def step(loss: Tensor, optimizer: torch.optim.Optimizer, averages: Averages) -> None:
    """One step down the loss, which the averages take in."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    averages.update()


@torch.no_grad()
def look(best: dict[str, Best], epoch: int, scores: Scores, values: list[Tensor]) -> None:
    """Keep the averaged weights where validation rows like them better than all before."""
    keys = {"error": (scores.mistake, scores.nll), "nll": (scores.nll, scores.mistake)}
    for name, key in keys.items():
        if key < best[name].key:
            best[name] = Best(key, epoch, scores, [value.clone() for value in values])


def all_found(best: dict[str, Best], epochs: int) -> None:
    """Raise where no look at validation rows gave a finite number."""
    if not all(kept.values for kept in best.values()):
        raise FloatingPointError(
            f"vardrop.reproduce: the loss of a network must stay finite, got none that was after {epochs} epochs; "
            "do not trust the others of this experiment either"
        )


@torch.no_grad()
def take(task: Task, best: Best) -> Task:
    """Put averaged weights into a network."""
    for parameter, value in zip(task.parameters(), best.values, strict=True):
        parameter.copy_(value)
    return task


def learned_rates(network: nn.Module) -> list[tuple[float, float]]:
    """Of every layer in order: the mean dropout rate p = α / (1 + α), and the share of its α at the bound of 1."""
    return [
        ((alpha / (1 + alpha)).mean().item(), (alpha >= AT_BOUND).double().mean().item())
        for alpha in vd.dropout_rates(network, as_="alpha").values()
    ]
