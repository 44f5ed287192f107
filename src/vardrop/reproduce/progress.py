"""What a sweep shows while it runs: finished of total, and an honest word on the time left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeElapsedColumn
from rich.text import Text

from vardrop.reproduce.experiment import Cell, Experiment
from vardrop.reproduce.results import Result
from vardrop.reproduce.sweep import Outcome, Plan, split
from vardrop.reproduce.time_left import Left, time_left


class Tally:
    """Cells that are finished and that are not, and the time that the latter will take.

    Args:
        experiments: by name.
        todo: the cells that are to be run.
        known: results of earlier runs. Those on the same number of threads tell more, where there are any.
        plan: how cells are run.
    """

    def __init__(
        self, experiments: dict[str, Experiment], todo: Sequence[Cell], known: Sequence[Result], plan: Plan
    ) -> None:
        self.alone, self.beside = split(experiments, todo, plan)
        self.total, self.jobs = len(todo), plan.jobs
        alike = [result for result in known if result.threads == (plan.threads or torch.get_num_threads())]
        told = {result.experiment for result in alike}
        known = [*alike, *(result for result in known if result.experiment not in told)]
        self.seconds = [(result.cell, result.seconds) for result in known]
        self.done = self.failed = 0

    def add(self, outcome: Outcome) -> None:
        """A cell has ended."""
        (self.alone if outcome.cell in self.alone else self.beside).remove(outcome.cell)
        self.done += 1
        if outcome.result is not None:
            self.seconds.append((outcome.cell, outcome.result.seconds))
        else:
            self.failed += 1

    def left(self) -> Left:
        """The time left, from now."""
        return time_left(self.beside, self.seconds, self.jobs, self.alone)


class _TimeLeft(ProgressColumn):
    """Counts down between two cells that end."""

    def __init__(self, tally: Tally) -> None:
        super().__init__()
        self.tally, self.at, self.known = tally, time.monotonic(), tally.left()

    def again(self) -> None:
        self.at, self.known = time.monotonic(), self.tally.left()

    def render(self, task: Task) -> Text:
        passed = time.monotonic() - self.at
        return Text("" if task.finished else str(self.known._replace(seconds=max(0.0, self.known.seconds - passed))))


class Display:
    """A bar on a terminal, and a line for every cell that ends, in a log too."""

    def __init__(self, name: str, tally: Tally, root: Path, console: Console) -> None:
        self.tally, self.root = tally, root
        self.time_left = _TimeLeft(tally)
        columns = [TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn()]
        self.progress = Progress(*columns, self.time_left, console=console)
        self.bar = self.progress.add_task(name, total=tally.total)

    def __enter__(self) -> Display:
        self.progress.start()
        return self

    def __exit__(self, *error: object) -> None:
        self.progress.stop()

    def show(self, outcome: Outcome) -> None:
        """A cell has ended."""
        self.tally.add(outcome)
        self.time_left.again()
        cell, result = outcome.cell, outcome.result
        how = f"{result.seconds:.1f} s, {cell.path(self.root)}" if result else f"failed, {cell.config}"
        count = f"{self.tally.done}/{self.tally.total}"
        left = "" if self.tally.done == self.tally.total else f"; {self.time_left.known}"
        self.progress.console.print(
            f"{count} {cell.experiment}: {how}{left}", highlight=False, markup=False, soft_wrap=True
        )
        self.progress.advance(self.bar)
