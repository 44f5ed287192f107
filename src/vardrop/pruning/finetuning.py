"""Some epochs more for a network with zeros, which stay; the best of them by the validation rows."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import torch

from vardrop.data import Data
from vardrop.objective import ELBO
from vardrop.sparsity.finetune import finetune
from vardrop.training.config import Config
from vardrop.training.evaluation import evaluate
from vardrop.training.task import Task, measure
from vardrop.weights.estimators import estimator

_SLOWER = 0.1  # times the learning rate of the run: the weights are near their place


def learning_rate(config: Config, asked: float | None) -> float:
    """What is asked for, or a tenth of the run's."""
    return _SLOWER * config.lr if asked is None else asked


def train_on(
    task: Task, data: Data, validation: Any, config: Config, epochs: int, lr: float
) -> Iterator[dict[str, Any]]:
    """Train with the objective of the run, its noise on, and every zero weight kept at zero.

    Args:
        task: what was sparsified; in the end it has the best weights by ``validation``, which may be those it came
            with, or the last if there are no validation rows.
        data: rows to train on, without those of validation.
        validation: x and y, or None.
        config: of the run.
        epochs: how many.
        lr: Adam's.

    Yields:
        After every epoch its number, training nll and validation scores.

    Raises:
        FloatingPointError: if the loss is no longer finite.
    """
    kind = next(task.parameters()).dtype
    x, y = data.train_x.to(kind), data.train_y
    held = None if validation is None else (validation[0].to(kind), validation[1])
    elbo = ELBO(task.network, len(x), config.kl_weight)
    optimizer = torch.optim.Adam(task.parameters(), lr=lr)
    order = torch.Generator().manual_seed(config.seed)
    best: tuple[float, float] | None = None
    state = copy.deepcopy(task.state_dict())
    if held is not None:
        scores = evaluate(task, task, *held)
        best = (scores.mistake, scores.nll)
    with torch.random.fork_rng(devices=[]), finetune(task.network):
        torch.manual_seed(config.seed)
        for epoch in range(1, epochs + 1):
            nll = _epoch(task, x, y, elbo, optimizer, order, config)
            line: dict[str, Any] = {"epoch": epoch, "train_nll": nll}
            if held is not None:
                scores = evaluate(task, task, *held)
                line |= {"val_nll": scores.nll, f"val_{measure(data.task)}": scores.mistake}
            line["kept"] = held is None or best is None or (scores.mistake, scores.nll) < best
            if line["kept"]:
                state = copy.deepcopy(task.state_dict())
                best = None if held is None else (scores.mistake, scores.nll)
            yield line
    task.load_state_dict(state)
    task.eval()


def _epoch(
    task: Task,
    x: torch.Tensor,
    y: torch.Tensor,
    elbo: ELBO,
    optimizer: torch.optim.Optimizer,
    order: torch.Generator,
    config: Config,
) -> float:
    """Every row once; the mean nll on the way."""
    task.train()
    total = 0.0
    with estimator(config.estimator):
        for rows in torch.randperm(len(x), generator=order).split(config.batch_size):
            nll = task(x[rows], y[rows])[1].mean()
            optimizer.zero_grad()
            elbo(nll).backward()
            optimizer.step()
            total += nll.item() * len(rows)
    task.eval()
    if not math.isfinite(total):
        raise FloatingPointError(
            "vardrop.prune: the loss must stay finite while fine-tuning, got one that did not; a lower --finetune-lr "
            "often helps"
        )
    return total / len(x)
