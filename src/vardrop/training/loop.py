"""Training: from a config to a folder with a tested model in it."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

import vardrop
from vardrop.data import Data, load, split_validation
from vardrop.memory import keep_freed
from vardrop.methods import prepare
from vardrop.objective import ELBO, kl_divergence
from vardrop.training.averaging import Averages
from vardrop.training.checkpoint import Progress, State, load_checkpoint, save_checkpoint
from vardrop.training.config import Config
from vardrop.training.devices import add_up, describe, make_fabric, on_first, seed_noise
from vardrop.training.display import Bar, Scalars
from vardrop.training.evaluation import evaluate, rate_histograms, rate_quantiles, telling_examples
from vardrop.training.files import remove_leftovers, write_atomically, write_tensors
from vardrop.training.finite import bad_parameters, blame, check_data
from vardrop.training.folder import (
    CHECKPOINT,
    CONFIG,
    EXAMPLES,
    METRICS,
    MODEL,
    SUMMARY,
    append_line,
    claim,
    keep_epochs,
)
from vardrop.training.guessing import notes
from vardrop.training.model_file import load_task, start_from_, strip
from vardrop.training.sharding import is_sharded
from vardrop.training.task import Categorical, Gaussian, Task, measure
from vardrop.weights.estimators import estimator
from vardrop.weights.modules import noisy_weights


def train(config: Config, out: Path, resume: bool = False, progress: bool = True) -> dict[str, Any]:
    """Train a network, keep what validation finds best, test that, and write it all down.

    Adam on the evidence lower bound; an average over the weights of all steps is what validation sees. The folder
    gets ``config.json``, ``metrics.jsonl`` (a line an epoch), ``checkpoint.safetensors`` (after every epoch),
    ``model.safetensors``, ``examples.safetensors`` and ``summary.json``. Killed at any moment and started again with
    ``resume``, a run on a CPU (on as many threads) ends with the same bits as one that was left alone. Torch's global
    generators are left as they were.

    Args:
        config: what to train, on what, how.
        out: the folder; made if it is not there.
        resume: go on from the checkpoint in ``out`` if there is one. The options have to be the same, but for
            ``epochs``, ``tensorboard`` and ``data_dir``.
        progress: show a progress bar, if standard error is a terminal.

    Returns:
        The content of ``summary.json``.

    Raises:
        ValueError: for options that do not exist or do not fit, damaged files, or a checkpoint of other options.
        FileExistsError: if ``out`` holds a run already and ``resume`` is not set.
        FileNotFoundError: if the data set is not here.
        FloatingPointError: if the loss or a weight is no longer finite; the message names the layer. The last good
            checkpoint stays.
        OSError: if a file cannot be written; the last checkpoint stays.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from vardrop.training import Config, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     summary = train(Config(model="mlp:1x16", epochs=2), Path(folder), progress=False)
        >>> sorted(summary["rates"]), summary["epochs_run"]
        (['2.weight', '5.weight'], 2)
    """
    out = Path(out)
    cuda = range(torch.cuda.device_count()) if torch.cuda.is_available() else ()
    with torch.random.fork_rng(devices=list(cuda)):
        torch.manual_seed(config.seed)
        data = load(config.data, Path(config.data_dir) if config.data_dir else None, config.split)
        check_data(data)
        keep_freed()
        network, _, _ = prepare(config.method, config.model, data.shape, data.outputs, config.sharing)
        if config.start is not None:
            start_from_(network, Path(config.start))
        fabric = make_fabric(config)
        finished = on_first(fabric, lambda: claim(config, out, resume))
        if finished is None:
            run = _Run(config, out, data, network, fabric)
            run.start(resume)
            run.train(progress)
            finished = run.finish()
        return finished


class _Run:
    """One run on one process: everything it needs between two epochs, and what to do in one."""

    def __init__(self, config: Config, out: Path, data: Data, network: torch.nn.Module, fabric: Fabric) -> None:
        self.config, self.out, self.data, self.fabric = config, out, data, fabric
        size = config.validation if config.validation < 1 else int(config.validation)
        part, val_x, val_y = (
            split_validation(data, size, config.seed) if size else (data, data.train_x[:0], data.train_y[:0])
        )
        dtype = torch.float64 if config.precision == "64-true" else data.train_x.dtype
        self.x, self.y = part.train_x.to(fabric.device, dtype), part.train_y.to(fabric.device)
        self.val_x, self.val_y = val_x.to(fabric.device, dtype), val_y.to(fabric.device)
        if min(config.batch_size, len(self.x)) < fabric.world_size:
            raise ValueError(
                "vardrop.train: batch_size and the number of training examples must be at least the number of "
                f"processes, {fabric.world_size}, got {config.batch_size} and {len(self.x)}"
            )

        likelihood = Gaussian(part.train_y) if data.task == "regression" else Categorical()
        self.task = Task(network, likelihood)
        self.model = fabric.setup_module(self.task)
        sharded = any(is_sharded(p) for p in self.task.parameters())
        fused = True if fabric.device.type == "cpu" and not sharded else None
        groups = [
            {"params": list(self.task.network.parameters()), "lr": config.lr},
            # a log precision has units to go where a weight has hundredths, and Adam goes about lr a step
            {"params": list(likelihood.parameters()), "lr": 10 * config.lr},
        ]
        adam = torch.optim.Adam([group for group in groups if group["params"]], fused=fused)
        self.lrs = [group["lr"] for group in adam.param_groups]
        self.optimizer: Any = fabric.setup_optimizers(adam)
        averages = Averages(self.task.parameters(), config.average)
        best = [value.clone() for value in averages.values]
        order = torch.Generator().manual_seed(config.seed)
        self.state = State(self.task, adam, averages, best, order, Progress(), data.digest)

        left = len(self.x) % config.batch_size  # a last batch that has no row for some process is left out
        self.rows = len(self.x) - (left if left < fabric.world_size else 0)
        self.starts = range(0, self.rows, config.batch_size)
        self.elbo = ELBO(self.task.network, len(self.x), config.kl_weight, config.warmup_epochs * len(self.starts))
        self.check_always = fabric.device.type == "cpu" and fabric.world_size == 1  # elsewhere it would wait for others
        seed_noise(config.seed, fabric.global_rank)

    def start(self, resume: bool) -> None:
        """Begin, or go on where the checkpoint left off."""
        path = self.out / CHECKPOINT
        there = self.fabric.broadcast(resume and path.exists())
        if there:
            self._restore()
        on_first(self.fabric, self._prepare_files)
        if not there:
            self._save()

    def _prepare_files(self) -> None:
        remove_leftovers(self.out)
        write_atomically(self.out / CONFIG, self.config.to_json().encode())
        keep_epochs(self.out / METRICS, self.state.progress.epoch)

    def _save(self) -> None:
        self.state.progress.average_step = self.state.averages.step
        save_checkpoint(self.out / CHECKPOINT, self.state, self.config, self.fabric)

    def _restore(self) -> None:
        load_checkpoint(self.out / CHECKPOINT, self.state, self.config, self.fabric)
        self.elbo.load_state_dict({"step": self.state.progress.step})

    def _over(self) -> bool:
        progress, patience = self.state.progress, self.config.patience
        waited = progress.epoch - progress.best_epoch if len(self.val_x) else 0
        return progress.epoch >= self.config.epochs or (patience > 0 and waited >= patience)

    def train(self, show: bool) -> None:
        """Epochs until there are enough, or none has been better for long."""
        first = self.fabric.is_global_zero
        done = self.state.progress.epoch
        with (
            Bar(self.config.epochs, done, show and first) as bar,
            Scalars(self.out / "tensorboard", self.config.tensorboard and first, done) as scalars,
        ):
            while not self._over():
                line = self._one_more()
                on_first(self.fabric, partial(append_line, self.out / METRICS, line))
                bar.show(line, self.state.progress.best_epoch)
                scalars.write(line)
                self._save()

    def _one_more(self) -> dict[str, Any]:
        """One epoch and its validation: its line of metrics."""
        began = time.perf_counter()
        progress = self.state.progress
        train_nll = self._epoch(self.check_always)
        if not self._all(math.isfinite(train_nll) and not bad_parameters(self.task)):
            # Looking at every step would make an accelerator wait, so go back and look now
            self._restore()
            train_nll = self._epoch(check=True)
            if not self._all(math.isfinite(train_nll) and not bad_parameters(self.task)):
                self._stop("in the last step", self.x[:1], self.y[:1])
        progress = self.state.progress
        progress.epoch += 1
        line: dict[str, Any] = {"epoch": progress.epoch, "seconds": 0.0, "train_nll": train_nll}
        line |= {"kl": self.elbo.last.kl, "kl_scale": self.elbo.last.scale}
        line |= self._validate()
        line["rates"] = rate_quantiles(self.task.network)
        line["seconds"] = time.perf_counter() - began
        progress.seconds += line["seconds"]
        return line

    def _epoch(self, check: bool) -> float:
        """Every training example once; the mean nll on the way."""
        world, rank, batch = self.fabric.world_size, self.fabric.global_rank, self.config.batch_size
        self.model.train()
        order = torch.randperm(len(self.x), generator=self.state.order).to(self.fabric.device)
        total = torch.zeros((), dtype=torch.float64, device=self.fabric.device)
        generators: Any = torch.cuda if self.fabric.device.type == "cuda" else torch
        with estimator(self.config.estimator):
            for start in self.starts:
                rows = order[start : start + batch]
                share = world / len(rows)  # gradients are averaged over processes, which may have a row more or less
                rows = rows[rank::world]
                x, y = self.x[rows], self.y[rows]
                before = generators.get_rng_state() if check else None
                nll = self.model(x, y)[1].sum() * share
                loss = self.elbo(nll)
                if check and not self._all(bool(loss.isfinite())):
                    if before is not None:
                        generators.set_rng_state(before)
                    self._stop(f"in step {start // batch + 1}", x, y)
                self.optimizer.zero_grad()
                self.fabric.backward(loss)
                self._set_lr(start)
                self.optimizer.step()
                self.state.averages.update()
                self.state.progress.step += 1
                total += nll.detach() / share
        return add_up(self.fabric, total).item() / self.rows

    def _set_lr(self, start: int) -> None:
        """The learning rates of the step that begins at this example."""
        factor = self.config.lr_factor(self.state.progress.epoch + start / self.rows)
        for group, lr in zip(self.state.optimizer.param_groups, self.lrs, strict=True):
            group["lr"] = lr * factor

    def _validate(self) -> dict[str, float | None]:
        """Scores of the averaged weights, which are kept if they are the best."""
        names = ["val_nll", f"val_{measure(self.data.task)}"]
        progress = self.state.progress
        if not len(self.val_x):
            self._keep_as_best(None)
            return dict.fromkeys(names)
        with self.state.averages.swapped_in():
            scores = evaluate(self.model, self.task, self.val_x, self.val_y)
        scores = type(scores)(*self.fabric.broadcast(tuple(scores)))  # one decision for all processes
        key = (scores.mistake, scores.nll)
        if progress.epoch <= self.config.warmup_epochs:  # of another objective: kept only for want of a better one
            self._keep_as_best(None)
        elif progress.best is None or key < progress.best:
            self._keep_as_best(key)
        return dict(zip(names, scores, strict=True))

    def _keep_as_best(self, key: tuple[float, float] | None) -> None:
        for kept, value in zip(self.state.best, self.state.averages.values, strict=True):
            kept.copy_(value)
        self.state.progress.best, self.state.progress.best_epoch = key, self.state.progress.epoch

    def _all(self, good: bool) -> bool:
        """Whether something holds in every process."""
        flag = torch.tensor(float(good), device=self.fabric.device)
        return good if self.fabric.world_size == 1 else add_up(self.fabric, flag).item() == self.fabric.world_size

    def _stop(self, where: str, x: Tensor, y: Tensor) -> None:
        epoch = self.state.progress.epoch
        with estimator(self.config.estimator):
            culprit = blame(self.task, x, y)
        raise FloatingPointError(
            f"vardrop.train: {culprit} is not finite {where} of epoch {epoch + 1}; the checkpoint of epoch {epoch} is "
            f"kept in {self.out}; a lower lr often helps (it is {self.config.lr:g})"
        )

    def finish(self) -> dict[str, Any]:
        """Save the best model, and test what was saved."""
        best = strip(self.state.best_model())
        summary = on_first(self.fabric, lambda: self._test(best))
        self.fabric.barrier()
        return summary

    def _test(self, best: dict[str, Tensor]) -> dict[str, Any]:
        config, data, progress, device = self.config, self.data, self.state.progress, self.fabric.device
        write_tensors(self.out / MODEL, best, {"config": dataclasses.asdict(config), "digest": data.digest})
        task = load_task(self.out, data).to(device)
        test_x, test_y = data.test_x.to(device, self.x.dtype), data.test_y.to(device)
        scores = evaluate(task, task, test_x, test_y)
        telling = telling_examples(task, test_x, test_y, data.images, seed=config.seed)
        write_tensors(self.out / EXAMPLES, telling, {"classes": data.classes})
        random = any(True for _ in noisy_weights(task.network))
        with torch.no_grad():
            kl = kl_divergence(task.network).item() if random else 0.0
        summary = {
            "data": data.name,
            "test_examples": len(test_x),
            f"test_{measure(data.task)}": scores.mistake,
            "test_nll": scores.nll,
            "kl": kl,
            "rates": rate_histograms(task.network),
            "seconds": progress.seconds,
            "epochs_run": progress.epoch,
            "best_epoch": progress.best_epoch,
            "parameters": sum(p.numel() for p in task.parameters()),
            "config": dataclasses.asdict(config),
            "versions": {
                "vardrop": vardrop.__version__,
                "torch": torch.__version__,
                "lightning-fabric": version("lightning-fabric"),
                "python": platform.python_version(),
            },
            "device": describe(device),
            "notes": notes(data, scores.mistake, learned=random),
        }
        write_atomically(self.out / SUMMARY, json.dumps(summary, indent=1).encode())
        return summary
