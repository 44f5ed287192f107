"""What a person sees while a run goes on, and TensorBoard's scalars."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Bar:
    """A progress bar over epochs on standard error; nothing at all if that is no terminal or it is not wanted."""

    def __init__(self, epochs: int, done: int, wanted: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]epoch"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[told]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (wanted and console.is_terminal),
            transient=True,
        )
        self._task = self._progress.add_task("", total=epochs, completed=done, told="")

    def __enter__(self) -> Bar:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def show(self, line: dict[str, Any], best_epoch: int) -> None:
        """An epoch is over."""
        told = [f"train nll {line['train_nll']:.4f}", f"kl {line['kl']:.4g}"]
        for name in ("val_nll", "val_error", "val_rmse"):
            if line.get(name) is not None:
                told.append(f"{name.replace('_', ' ')} {line[name]:.4f}")
        told.append(f"best epoch {best_epoch}")
        self._progress.update(self._task, completed=line["epoch"], told=" · ".join(told))


class Scalars:
    """TensorBoard's files for one run, where they are wanted."""

    def __init__(self, folder: Path, wanted: bool, done: int) -> None:
        self._writer: Any = None
        if wanted:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of tensorboard's own imports
                from torch.utils.tensorboard import SummaryWriter

                self._writer = SummaryWriter(str(folder), purge_step=done + 1)

    def __enter__(self) -> Scalars:
        return self

    def __exit__(self, *_: Any) -> None:
        if self._writer is not None:
            self._writer.close()

    def write(self, line: dict[str, Any]) -> None:
        """All numbers of an epoch."""
        if self._writer is None:
            return
        for name, value in line.items():
            if name != "epoch" and isinstance(value, int | float):
                self._writer.add_scalar(name, value, line["epoch"])
        for weight, rates in line["rates"].items():
            for name, value in rates.items():
                self._writer.add_scalar(f"rate/{weight}/{name}", value, line["epoch"])
        self._writer.flush()
