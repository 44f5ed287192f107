"""Many cells at once, on the processes of one machine or of many, through joblib."""

from __future__ import annotations

import contextlib
import functools
import os
import tempfile
import threading
import time
import warnings
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from vardrop.reproduce import results, run, unfinished
from vardrop.reproduce.engines import LOCAL, engine
from vardrop.reproduce.experiment import Cell, Experiment
from vardrop.reproduce.failures import Failure

_ONE_AT_A_TIME = threading.Lock()  # cells seed torch's own generators, so the threads of a process take turns


@dataclass(frozen=True)
class Plan:
    """How cells are run.

    Attributes:
        jobs: how many at once.
        threads: that each of them computes with; None for torch's own choice.
        backend: of joblib.
    """

    jobs: int = 1
    threads: int | None = None
    backend: str = LOCAL

    @property
    def in_process(self) -> bool:
        """Whether one cell follows the other in this process."""
        return self.jobs == 1 and self.backend == LOCAL


class Home(NamedTuple):
    """Of a sweep on one machine: its process, and a folder in which its workers agree on who uses which GPU."""

    process: int
    places: Path


@dataclass(frozen=True)
class Outcome:
    """How a cell ended: with a result, or with a failure."""

    cell: Cell
    result: results.Result | None = None
    failure: Failure | None = None


def plan(
    experiments: Sequence[Experiment], scale: str, jobs: int | None = None, backend: str = LOCAL, cores: int = 0
) -> Plan:
    """As many cells at once as there are cores, or at scale gpu devices; the cores are shared out evenly.

    It goes by all cells, finished or not, so that a sweep that is taken up again computes as it began.

    Args:
        experiments: whose cells.
        scale: at which scale.
        jobs: how many cells at once, if the user has chosen.
        backend: of joblib.
        cores: of this machine; 0 to count them.

    Raises:
        ValueError: if there is no job.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"vardrop.reproduce: jobs must be 1 or more, got {jobs}")
    from joblib import cpu_count

    cores = cores or cpu_count()
    if jobs is None:
        beside = sum(not e.runs_alone(cell.config) for e in experiments for cell in e.at(scale))
        jobs = max(1, min(torch.cuda.device_count() if scale == "gpu" else cores, beside))
    # torch's own number is smaller where OMP_NUM_THREADS says so, or cores are not whole
    threads = None if jobs == 1 else max(1, min(cores // jobs, torch.get_num_threads()))
    return Plan(jobs, threads, backend)


def split(experiments: dict[str, Experiment], cells: Sequence[Cell], plan: Plan) -> tuple[list[Cell], list[Cell]]:
    """The cells that are run one by one in this process, and those that are run beside each other."""
    alone = [plan.in_process or experiments[cell.experiment].runs_alone(cell.config) for cell in cells]
    apart, beside = ([cell for cell, a in zip(cells, alone, strict=True) if a is which] for which in (True, False))
    return apart, beside


def sweep(
    experiments: dict[str, Experiment], cells: Sequence[Cell], root: Path, plan: Plan = Plan()
) -> Iterator[Outcome]:
    """Run cells; the result of every one that ends is on disk before its outcome is handed out.

    Cells that measure time come first, one by one, with all threads. A cell that fails leaves the others alone. Results
    are written by this process, so that workers on other machines need no folder in common.

    Args:
        experiments: by name.
        cells: what to run, in order.
        root: where results are kept.
        plan: how.

    Yields:
        An outcome for every cell, as they end.

    Raises:
        OSError: if a result cannot be written, or a process that runs cells dies; what is on disk stays.
        ValueError: for a backend that joblib does not know.
    """
    alone, beside = split(experiments, cells, plan)
    for cell in alone:
        yield _kept(attempt(experiments[cell.experiment], cell, state=unfinished.place(cell, root)), root)
    if beside:
        with tempfile.TemporaryDirectory(prefix="vardrop-sweep-") as places:
            home = Home(os.getpid(), Path(places)) if plan.backend == LOCAL else None
            tasks = [
                (experiments[cell.experiment], cell, plan.threads, home, unfinished.place(cell, root) if home else None)
                for cell in beside
            ]
            with contextlib.closing(_outcomes(tasks, plan)) as outcomes:
                for outcome in outcomes:
                    yield _kept(outcome, root)


def _outcomes(tasks: Sequence[tuple[Any, ...]], plan: Plan) -> Generator[Outcome, None, None]:
    import joblib

    with engine(plan.backend, plan.jobs) as streams:
        # an engine that has no word before everything is done gets few cells at a time, and loses few in a kill
        rounds = [tasks] if streams else [tasks[i : i + plan.jobs] for i in range(0, len(tasks), plan.jobs)]
        for some in rounds:
            parallel = joblib.Parallel(batch_size=1, return_as="generator_unordered" if streams else "list")
            outcomes = parallel(joblib.delayed(attempt)(*task) for task in some)
            try:
                yield from outcomes
            except GeneratorExit:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # joblib would advise against not waiting
                    if streams:
                        outcomes.close()
                raise
            except Exception as error:  # a cell's own errors are caught where it runs
                raise ChildProcessError(
                    "vardrop.reproduce: every process that runs cells must live until the end, got "
                    f"{type(error).__name__} from {plan.backend}; was it killed for want of memory? Run again with "
                    "fewer --jobs: finished cells are kept"
                ) from error


def attempt(
    experiment: Experiment,
    cell: Cell,
    threads: int | None = None,
    home: Home | None = None,
    state: Path | None = None,
) -> Outcome:
    """Run a cell in this process, whatever comes of it.

    Args:
        experiment: the cell's.
        cell: what to run.
        threads: that torch computes with meanwhile; None for as many as now.
        home: where the sweep is, if it is on this machine.
        state: a file for what an unfinished cell has done, if this machine has the results' folder.
    """
    if home is not None:
        _end_with(home.process)
    with _ONE_AT_A_TIME, _with_threads(threads), _on_device(cell, home):
        try:
            return Outcome(cell, run.compute(experiment, cell, state))
        except Exception as error:
            return Outcome(cell, failure=Failure.of(error))


def _kept(outcome: Outcome, root: Path) -> Outcome:
    """An outcome whose result is on disk."""
    if outcome.result is not None:
        try:
            results.write(outcome.result, outcome.cell.path(root))
            unfinished.place(outcome.cell, root).unlink(missing_ok=True)
        except TypeError as error:  # rows that cannot be written
            return Outcome(outcome.cell, failure=Failure.of(error))
    return outcome


@contextlib.contextmanager
def _with_threads(threads: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@functools.cache
def _end_with(parent: int) -> None:
    """End this process when its parent is killed, which cannot tell it: its cell may have hours to go."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _on_device(cell: Cell, home: Home | None) -> Iterator[None]:
    """Let a cell at scale gpu have a device that the cells beside it have not, as long as there are enough."""
    count = torch.cuda.device_count() if cell.scale == "gpu" and home is not None else 0
    if home is None or count < 2:
        yield
        return
    with claimed(home.places) as place, torch.cuda.device(place % count):
        yield


@contextlib.contextmanager
def claimed(places: Path) -> Iterator[int]:
    """The smallest number that nobody else has at the moment, of all processes that share a folder."""
    place = 0
    while True:
        try:
            (places / str(place)).touch(exist_ok=False)
            break
        except FileExistsError:
            place += 1
    try:
        yield place
    finally:
        (places / str(place)).unlink()
