"""``vardrop reproduce list | run | report | check``."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from vardrop.reproduce import check as checking
from vardrop.reproduce import claims as claiming
from vardrop.reproduce import report as reporting
from vardrop.reproduce import results as reading
from vardrop.reproduce import run as running
from vardrop.reproduce import unfinished
from vardrop.reproduce.engines import LOCAL
from vardrop.reproduce.experiment import SCALES
from vardrop.reproduce.experiments import EXPERIMENTS, chosen
from vardrop.reproduce.failures import in_one_line, listed
from vardrop.reproduce.progress import Display, Tally
from vardrop.reproduce.sweep import plan as planned
from vardrop.reproduce.sweep import sweep

app = typer.Typer(help="Run published results again and compare.", no_args_is_help=True, add_completion=False)
_Results = Annotated[Path, typer.Option("--results", help="Where the results are kept.")]


def _plainly(command: Callable[..., None]) -> Callable[..., None]:
    """Our own errors as one line and exit status 2; anything else is a bug and keeps its traceback."""

    @functools.wraps(command)
    def guarded(*arguments: Any, **options: Any) -> None:
        try:
            command(*arguments, **options)
        except Exception as error:
            line = in_one_line(error)
            if line is None:
                raise
            typer.echo(f"error: {line}", err=True)
            raise typer.Exit(2) from error

    return guarded


@app.command("list")
@_plainly
def list_(results: _Results = Path("results")) -> None:
    """The experiments, and how many of their cells are finished."""
    table = Table("name", "what it shows", *SCALES)
    for experiment in EXPERIMENTS.values():
        done = []
        for scale in SCALES:
            todo, finished = running.pending([experiment], scale, results)
            done.append(f"{len(finished)}/{len(todo) + len(finished)}")
        table.add_row(experiment.name, experiment.summary, *done)
    Console().print(table)


@app.command()
@_plainly
def run(
    name: Annotated[str, typer.Argument(help="An experiment, or all.")],
    scale: Annotated[str, typer.Option(help="smoke, cpu or gpu.")] = "cpu",
    results: _Results = Path("results"),
    again: Annotated[bool, typer.Option("--again", help="Run finished cells again.")] = False,
    jobs: Annotated[
        int | None, typer.Option(help="Cells at once: as many as there are cores (GPUs) if left out. 1: one by one.")
    ] = None,
    backend: Annotated[
        str, typer.Option(help="What runs them: loky (processes of this machine), dask, ray, or another of joblib's.")
    ] = LOCAL,
) -> None:
    """Run the cells of an experiment that have no result yet, several at once.

    Killed or stopped, the same command goes on with the cells that are left; those of the sparse LeNets, which take
    hours, go on where they were. Cells that measure time run by themselves, before the others.
    """
    experiments = chosen(name)
    todo, done = running.pending(experiments, scale, results, damaged_ok=again)
    plan = planned(experiments, scale, jobs, backend)
    if again:
        todo, done = todo + done, []
    console = Console(stderr=True)
    if done:
        console.print(f"{len(done)} cells are finished already")
    begun = sum(unfinished.place(cell, results).exists() for cell in todo)
    if begun:
        console.print(f"{begun} of the others have begun before, and go on if by the same code")
    tally = Tally(EXPERIMENTS, todo, [reading.read(cell.path(results)) for cell in done], plan)
    failed = []
    try:
        with Display(name, tally, results, console) as display:
            for outcome in sweep(EXPERIMENTS, todo, results, plan):
                display.show(outcome)
                if outcome.failure is not None:
                    failed.append((outcome.cell, outcome.failure))
    except KeyboardInterrupt:
        count = tally.done - tally.failed + len(done)
        typer.echo(
            f"stopped: {count} of {len(todo) + len(done)} cells are finished and kept; "
            "the same command goes on with the others",
            err=True,
        )
        raise typer.Exit(130) from None
    finally:
        if failed:
            typer.echo(listed(failed), err=True)
    if failed:
        typer.echo(f"{len(failed)} of {len(todo)} cells failed, the others are finished", err=True)
        raise typer.Exit(2 if all(failure.ours for _, failure in failed) else 1)


@app.command()
@_plainly
def report(
    results: _Results = Path("results"),
    out: Annotated[Path, typer.Option(help="The page to write; figures go beside it.")] = Path("docs/reproduction.md"),
) -> None:
    """Write the page: the published numbers beside ours. Runs nothing."""
    for path in reporting.write(reading.read_all(results), claiming.load(EXPERIMENTS), EXPERIMENTS, out):
        typer.echo(str(path))


@app.command()
@_plainly
def check(
    name: Annotated[str, typer.Argument(help="An experiment, or all.")] = "all",
    results: _Results = Path("results"),
    strict: Annotated[bool, typer.Option("--strict", help="A claim without a result fails too.")] = False,
) -> None:
    """Exit with 1 if a claim is outside its tolerance. Runs nothing."""
    found = reading.read_all(results)
    names = {experiment.name for experiment in chosen(name)}
    claims = [claim for claim in claiming.load(EXPERIMENTS) if claim.experiment in names]
    verdicts = checking.verdicts(claims, found, EXPERIMENTS)
    for verdict in verdicts:
        typer.echo(checking.line(verdict))
    for result in reading.left_over(found, EXPERIMENTS):
        typer.echo(f"left out: no experiment asks for {result.cell.path(results)} any more")
    failed = checking.failures(verdicts, strict)
    if failed:
        typer.echo(f"{len(failed)} of {len(verdicts)} claims fail: {', '.join(v.claim.id for v in failed)}", err=True)
        raise typer.Exit(1)
