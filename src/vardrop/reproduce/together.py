"""The seeds of a cell trained together: networks of one method and model, in one vmapped step.

Legend: K networks, N training rows of each, B rows of a minibatch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import vardrop as vd
from vardrop.data import Data, split_validation
from vardrop.methods import METHODS, prepare
from vardrop.training import Averages
from vardrop.training.task import Categorical, Gaussian, Task, measure

_AT_ONCE = 1024  # rows of each network in a pass without gradients


def train_together(
    method: str,
    model: str,
    data: Data,
    seeds: Sequence[int],
    epochs: int,
    batch_size: int = 128,
    lr: float = 1e-3,
    device: str = "cpu",
    *,
    sharing: str | None = None,
    validation: int | float = 0.1,
    average: float = 0.999,
) -> list[dict[str, Any]]:
    r"""Train a network for every seed, all of them in one step, as if each were trained by itself.

    .. math:: loss = \sum_k \Big( \overline{nll}_k + scale \cdot \frac{KL_k}{N} \Big)

    Adam works on each parameter by itself, so the sum trains every network on its own bound (eq. 1). A seed decides
    what it decides in :func:`vardrop.training.train`: the initial weights, the rows that are kept back and the order of
    the others; without noise the networks are the same. The noise is different in every network. Validation rows see
    the average over the weights of all steps, after every epoch, and choose an epoch for each network; that one is
    tested.

    Args:
        method: a key of :data:`vardrop.methods.METHODS`.
        model: see :func:`vardrop.models.build`.
        data: with N rows and those kept back in ``train_x``; what is kept back is chosen here.
        seeds: one for every network.
        epochs: how many; all of them are run.
        batch_size: B.
        lr: of Adam.
        device: where.
        sharing: of learned rates; None for the method's own choice.
        validation: rows to keep back, a number (int) or a share (float).
        average: decay of the average over the weights of all steps, in [0, 1).

    Returns:
        For every seed a dict: ``seed``, ``test_error`` (``test_rmse`` in regression), ``test_nll``, ``val_error``,
        ``val_nll``, ``best_epoch``, ``rates`` (name of the weight -> its mean rate) and ``seconds`` (its share).

    Raises:
        ValueError: without a seed, with one twice, for epochs or a batch below 1, or whatever
            :func:`vardrop.methods.prepare` refuses.
        FloatingPointError: if a loss is no longer finite.

    Example:
        >>> from vardrop.data import load
        >>> from vardrop.reproduce.together import train_together
        >>> rows = train_together("vd-a2", "mlp:1x16", load("digits"), seeds=[0, 1], epochs=2)
        >>> [row["seed"] for row in rows], sorted(rows[0]["rates"])
        ([0, 1], ['2.weight', '5.weight'])
    """
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(
            f"vardrop.train_together: seeds must be one or more, and all different, got {list(seeds)}; two networks of "
            "one seed would be the same"
        )
    if epochs < 1 or batch_size < 1:
        raise ValueError(
            f"vardrop.train_together: epochs and batch_size must be 1 or more, got {epochs} and {batch_size}"
        )
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[torch.device(device)] if torch.device(device).type == "cuda" else []):
        run = _Together(method, model, data, seeds, (batch_size, lr, average), device, sharing, validation)
        for epoch in range(1, epochs + 1):
            run.epoch(epoch)
            run.validate(epoch)
        rows = run.test()
    share = (time.perf_counter() - start) / len(seeds)
    return [{**row, "seconds": share} for row in rows]


class _Together:
    """K networks, and what they need between two epochs."""

    def __init__(
        self,
        method: str,
        model: str,
        data: Data,
        seeds: Sequence[int],
        settings: tuple[int, float, float],
        device: str,
        sharing: str | None,
        validation: int | float,
    ) -> None:
        self.seeds, self.kind = list(seeds), measure(data.task)
        self.batch_size, lr, average = settings
        self.x, self.y, self.test_x, self.test_y = (
            part.to(device) for part in (data.train_x, data.train_y, data.test_x, data.test_y)
        )
        self.rows, self.left = _split(data, seeds, validation)
        self.orders = [torch.Generator().manual_seed(seed) for seed in seeds]
        tasks = []
        for seed, rows in zip(seeds, self.rows, strict=True):
            torch.manual_seed(seed)
            network, self.kl_scale, _ = prepare(method, model, data.shape, data.outputs, sharing)
            likelihood = Gaussian(data.train_y[rows]) if data.task == "regression" else Categorical()
            tasks.append(Task(network, likelihood).to(device))
        self.likelihoods = [task.likelihood for task in tasks]
        self.ensemble = vd.Ensemble.from_modules(tasks)
        of_noise = [p for name, p in self.ensemble.named_parameters() if ".likelihood." in name]
        others = [p for name, p in self.ensemble.named_parameters() if ".likelihood." not in name]
        groups = [{"params": others, "lr": lr}, {"params": of_noise, "lr": 10 * lr}]  # as in vardrop.training
        self.adam = torch.optim.Adam([group for group in groups if group["params"]], fused=True)
        steps = math.ceil(self.rows.shape[1] / self.batch_size)
        self.warmup = METHODS[method].warmup
        self.elbo = vd.ELBO(self.ensemble, self.rows.shape[1], self.kl_scale, self.warmup * steps)
        self.averages = Averages(self.ensemble.parameters(), average)
        self.best = [value.clone() for value in self.averages.values]
        self.scores = [(math.inf, math.inf)] * len(tasks)
        self.best_epochs = [0] * len(tasks)

    def epoch(self, epoch: int) -> None:
        """Every training row of every network once."""
        order = torch.stack([torch.randperm(self.rows.shape[1], generator=order) for order in self.orders])
        shuffled = self.rows.gather(1, order).to(self.x.device)
        total = torch.zeros(len(self.seeds), device=self.x.device)
        self.ensemble.train()
        for rows in shuffled.split(self.batch_size, dim=1):
            _, nll = self.ensemble(self.x[rows], self.y[rows], per_member=True)
            means = nll.mean(1)
            loss = self.elbo(means.sum())
            self.adam.zero_grad()
            loss.backward()
            self.adam.step()
            self.averages.update()
            total += means.detach()
        lost = [seed for seed, finite in zip(self.seeds, total.isfinite().tolist(), strict=True) if not finite]
        if lost:
            raise FloatingPointError(
                f"vardrop.train_together: the loss must stay finite, got another in epoch {epoch} with seed {lost[0]}; "
                "a lower lr often helps"
            )

    def validate(self, epoch: int) -> None:
        """Keep the averaged weights of the networks whose validation rows like them best so far."""
        left = self.left.to(self.x.device)
        with self.averages.swapped_in():
            found = self._evaluate(
                left.shape[1], lambda at: (self.x[left[:, at]], self.y[left[:, at]]), per_member=True
            )
        warming = epoch <= self.warmup  # another objective: kept only for want of a better one
        better = [warming or score < best for score, best in zip(found, self.scores, strict=True)]
        for k in (k for k, is_better in enumerate(better) if is_better):
            self.best_epochs[k] = epoch
            self.scores[k] = (math.inf, math.inf) if warming else found[k]
        chosen = torch.tensor(better, device=self.x.device)
        for kept, value in zip(self.best, self.averages.values, strict=True):
            kept.copy_(torch.where(chosen.view(-1, *[1] * (kept.ndim - 1)), value, kept))

    @torch.no_grad()
    def _evaluate(
        self, count: int, take: Callable[[slice], tuple[Tensor, Tensor]], per_member: bool
    ) -> list[tuple[float, float]]:
        """Error (or RMSE) and mean nll of every network on so many rows, noise off."""
        self.ensemble.eval()
        parts = []
        for start in range(0, count, _AT_ONCE):
            x, y = take(slice(start, start + _AT_ONCE))
            parts.append((*self.ensemble(x, y, per_member=per_member), y))
        outputs, nll = (torch.cat(part, 1) for part in list(zip(*parts, strict=True))[:2])
        y = torch.cat([part[2] for part in parts], -1).expand(len(self.seeds), -1)
        mistakes = [how.mistake(out, its) for how, out, its in zip(self.likelihoods, outputs, y, strict=True)]
        return list(zip(torch.stack(mistakes).tolist(), nll.double().mean(1).tolist(), strict=True))

    def test(self) -> list[dict[str, Any]]:
        """What the best epoch of every network is worth on the test rows."""
        with torch.no_grad():
            for parameter, best in zip(self.ensemble.parameters(), self.best, strict=True):
                parameter.copy_(best)
        found = self._evaluate(len(self.test_x), lambda at: (self.test_x[at], self.test_y[at]), per_member=False)
        rows = []
        for k, member in enumerate(self.ensemble.members()):
            rates = vd.dropout_rates(member.network)  # type: ignore[arg-type]
            rows.append({
                "seed": self.seeds[k], f"test_{self.kind}": found[k][0], "test_nll": found[k][1],
                f"val_{self.kind}": self.scores[k][0], "val_nll": self.scores[k][1],
                "best_epoch": self.best_epochs[k],
                "rates": {name: rate.mean().item() for name, rate in rates.items()},
            })  # fmt: skip
        return rows


def _split(data: Data, seeds: Sequence[int], validation: int | float) -> tuple[Tensor, Tensor]:
    """For every seed the indices of the rows to train on, ``[K, N]``, and of those kept back."""
    index = torch.arange(len(data.train_y))
    numbered = dataclasses.replace(data, train_x=index, train_y=index)
    parts = [split_validation(numbered, validation, seed) for seed in seeds]
    return torch.stack([part.train_x for part, _, _ in parts]), torch.stack([aside for _, aside, _ in parts])
