"""The command line: one thin function a command. What takes long to import is imported inside of it."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, NoReturn

import torch  # which vardrop itself imports

import vardrop
from vardrop.training.config import Config

EXTRAS = "pip install 'vardrop[train]'"

try:
    import typer
    from rich.console import Console
    from rich.table import Column, Table

    from vardrop.diagnosis.command import diagnose
    from vardrop.evaluation.commands import evaluate, predict
    from vardrop.pruning.command import export, prune
except ModuleNotFoundError as _error:
    sys.stderr.write(f"vardrop: error: the command line needs {_error.name}; install it by {EXTRAS}\n")
    raise SystemExit(2) from _error

UsageError: type[Exception] = typer.BadParameter.__mro__[2]  # click's, which typer ships under names that change

app = typer.Typer(
    name="vardrop",
    rich_markup_mode="markdown",
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _told_version(wanted: bool) -> None:
    if wanted:
        print(f"vardrop {vardrop.__version__}")  # noqa: T201
        raise typer.Exit


@app.callback(invoke_without_command=True)
def top(
    ctx: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_told_version, is_eager=True, help="Print it.")
    ] = False,
) -> None:
    """Dropout that learns its rates.

    Start with `vardrop demo`, then `vardrop train --help`.
    """
    if ctx.invoked_subcommand is None:
        print(ctx.get_help())  # noqa: T201


_RUN, _DEVICE = "The run", "Devices"


@app.command()
def train(
    ctx: typer.Context,
    out: Annotated[Path, typer.Option(help="Folder of the run; everything is written there.")],
    data: Annotated[
        str, typer.Option(help="digits | mnist | fashion-mnist | cifar10 | uci:NAME | FILE.csv")
    ] = Config.data,
    model: Annotated[
        str, typer.Option(help="mlp:3x400 | mlp:256,128 | lenet-300-100 | lenet-5 | conv:k")
    ] = Config.model,
    method: Annotated[
        str,
        typer.Option(help="none | binary | gaussian-a | gaussian-b | vd-a | vd-a2 | vd-b | sparse-vd | mean-field"),
    ] = Config.method,
    sharing: Annotated[
        str | None, typer.Option(help="One rate per layer | neuron | weight; the method's choice if left out.")
    ] = Config.sharing,
    estimator: Annotated[
        str, typer.Option(help="Of gradients: local | per_example | per_minibatch | flipout | none")
    ] = Config.estimator,
    epochs: Annotated[int, typer.Option(help="At most so many passes over the data.")] = Config.epochs,
    batch_size: Annotated[int, typer.Option(help="Examples a step, over all devices together.")] = Config.batch_size,
    lr: Annotated[float, typer.Option(help="Adam's learning rate.")] = Config.lr,
    lr_decay: Annotated[
        float, typer.Option(help="The last part of the epochs over which it falls linearly to 0; 0: none.")
    ] = Config.lr_decay,
    start: Annotated[
        str | None, typer.Option(help="Start from the weights of this run, of the same network and any method.")
    ] = Config.start,
    seed: Annotated[int, typer.Option(help="Of weights, noise, order and validation split.")] = Config.seed,
    validation: Annotated[
        float, typer.Option(help="Examples kept back to choose the epoch: a share, or a number from 1 on.")
    ] = Config.validation,
    patience: Annotated[
        int, typer.Option(help="Stop after so many epochs without a better validation error; 0: never.")
    ] = Config.patience,
    average: Annotated[
        float, typer.Option(help="Decay of the average over the weights of all steps; 0: none.")
    ] = Config.average,
    warmup: Annotated[
        int | None,
        typer.Option(help="Epochs over which the KL grows to its full weight; the method's own if left out."),
    ] = Config.warmup,
    kl_scale: Annotated[
        float | None,
        typer.Option(
            help="Weight of the KL; below 1 for few data, where it outweighs them. The method's own if left out."
        ),
    ] = Config.kl_scale,
    split: Annotated[int, typer.Option(help="Which train and test split, where the data have several.")] = Config.split,
    data_dir: Annotated[
        str | None, typer.Option(help="Look for data here first; then $VARDROP_DATA, ./data, the user's cache.")
    ] = Config.data_dir,
    accelerator: Annotated[
        str, typer.Option(help="cpu | gpu | cuda | mps | auto", rich_help_panel=_DEVICE)
    ] = Config.accelerator,
    devices: Annotated[int, typer.Option(help="How many.", rich_help_panel=_DEVICE)] = Config.devices,
    strategy: Annotated[
        str, typer.Option(help="auto | ddp | fsdp2 (shards the parameters)", rich_help_panel=_DEVICE)
    ] = Config.strategy,
    precision: Annotated[
        str, typer.Option(help="32-true | 64-true | bf16-mixed | 16-mixed", rich_help_panel=_DEVICE)
    ] = Config.precision,
    tensorboard: Annotated[
        bool, typer.Option("--tensorboard", help="Write TensorBoard scalars too.", rich_help_panel=_RUN)
    ] = Config.tensorboard,
    resume: Annotated[
        bool,
        typer.Option(
            "--resume", help="Go on with the run in --out; options left out are as they were.", rich_help_panel=_RUN
        ),
    ] = False,
    progress: Annotated[bool, typer.Option(help="Show a progress bar, on a terminal.", rich_help_panel=_RUN)] = True,
) -> None:
    """Train a network and write a report.

    The defaults train the paper's network on handwritten digits that need no download:

    `vardrop train --out runs/first`

    Variational dropout with independent weight noise and one rate per weight, on MNIST:

    `vardrop train --data mnist --method vd-b --sharing weight --out runs/vd-b`

    The last column of a table, as a regression:

    `vardrop train --data prices.csv --model mlp:2x50 --method vd-a --out runs/prices`

    Killed? Go on where it left off, or train longer:

    `vardrop train --out runs/vd-b --resume --epochs 300`
    """
    from vardrop.report import write
    from vardrop.training import train as run

    summary = run(_config(ctx, out, resume), out, resume=resume, progress=progress)
    if _first_process():
        page = write(out)
        _print(_table({summary["config"]["method"]: summary}))
        for note in summary.get("notes", []):
            _print(f"note: {note}")
        _print(f"report: {page}")


@app.command()
def report(folder: Annotated[Path, typer.Argument(metavar="DIR", help="What `vardrop train --out` wrote.")]) -> None:
    """Write DIR/report.html again, from the files in DIR alone.

    `vardrop report runs/first`
    """
    from vardrop.report import write

    _print(f"report: {write(folder)}")


@app.command()
def data(
    download: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Download it, with checksum.")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="Look here first, and download to here.")] = None,
) -> None:
    """List the data sets and where each was found, or download some.

    `vardrop data`

    `vardrop data --download mnist --download cifar10`
    """
    from vardrop.data import download as fetch
    from vardrop.data import listing

    for name in download or []:
        _print(f"{name}: {fetch(name, data_dir)}")
    if download:
        return
    table, lacking = Table(Column("name", no_wrap=True), "what it is", Column("where", overflow="fold"), box=None), []
    for found in listing(data_dir):
        table.add_row(found.name, found.what, str(found.where) if found.where else "[dim]not here[/dim]")
        lacking += [] if found.where else [f"  {found.name}: {found.how}"]
    _print(table)
    if lacking:
        _print("\n".join(["", "how to get what is not here:", *lacking]))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the runs and their reports.")] = Path("runs/demo"),
    epochs: Annotated[int, typer.Option(help="At most so many passes over the data.")] = 100,
) -> None:
    """Train on real digits without dropout, with dropout, and with learned rates; under a minute.

    `vardrop demo --out runs/demo`
    """
    from vardrop.report import write, write_comparison
    from vardrop.training import train as run

    methods = ("none", "binary", "vd-a2")
    summaries = {}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # steps this small gain nothing by more, and lose much where other programs compute too
    try:
        for (
            method
        ) in methods:  # width and learning rate: of four pairs the best on validation data, for each of the three
            config = Config(data="digits", model="mlp:2x256", method=method, epochs=epochs, lr=3e-3, average=0.99)
            summaries[method] = run(config, out / method, resume=True)
            write(out / method)
    finally:
        torch.set_num_threads(threads)
    page = write_comparison([out / method for method in methods], out / "report.html")
    _print(_table(summaries))
    _print(f"report: {page}")


@app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True}, add_help_option=False)
def reproduce(ctx: typer.Context) -> None:
    """Run the paper's experiments and hold the results against its claims.

    `vardrop reproduce list`
    """
    from vardrop.reproduce.cli import app as experiments

    code = experiments(args=list(ctx.args), prog_name="vardrop reproduce", standalone_mode=False)
    if code:
        raise typer.Exit(code)


app.command()(predict)
app.command()(evaluate)
app.command()(diagnose)
app.command()(prune)
app.command()(export)


def _config(ctx: typer.Context, out: Path, resume: bool) -> Config:
    """The options as given; on resuming, those left out are as they were in the run."""
    values = {field.name: ctx.params[field.name] for field in dataclasses.fields(Config)}
    file = out / "config.json"
    if resume and file.exists():
        given = {name for name in values if ctx.get_parameter_source(name).name != "DEFAULT"}  # type: ignore[union-attr]
        there = dataclasses.asdict(Config.read(file))
        values = {name: value if name in given else there[name] for name, value in values.items()}
    return Config(**values)


def _table(summaries: dict[str, dict[str, Any]]) -> Table:
    """Results beside each other, a line each."""
    score = next(name for name in ("test_error", "test_rmse") if name in next(iter(summaries.values())))
    table = Table(
        "method", score.replace("_", " "), "test nll", "kl", "learned rates", "best epoch", "seconds", box=None
    )
    for name, summary in summaries.items():
        rates = " ".join(f"{rate['mean']:.2f}" for rate in summary["rates"].values()) or "-"
        told = f"{100 * summary[score]:.2f} %" if score == "test_error" else f"{summary[score]:.4g}"
        nll, kl = f"{summary['test_nll']:.4f}", f"{summary['kl']:.1f}"
        table.add_row(name, told, nll, kl, rates, str(summary["best_epoch"]), f"{summary['seconds']:.1f}")
    return table


def _print(what: Any) -> None:
    Console(soft_wrap=isinstance(what, str), highlight=False).print(what)


def _first_process() -> bool:
    """Whether this is the only process, or the first of several."""
    return os.environ.get("RANK", "0") == "0" and os.environ.get("LOCAL_RANK", "0") == "0"


def _fail(words: str, status: int = 2) -> NoReturn:
    """One line on standard error, and out; the first process speaks for all."""
    if _first_process():
        words = re.sub(r"^vardrop[\w.]*: ", "", " ".join(words.split()))
        sys.stderr.write(f"vardrop: error: {words}\n")
    _exit(status)


def _exit(status: int) -> NoReturn:
    """End the process; one of several without a tear-down, in which torch's and gloo's threads race and may abort."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Run the command line: what a user can put right is one line on standard error and exit status 2."""
    if not sys.warnoptions:  # other libraries' warnings are not for the user of this one
        warnings.simplefilter("ignore")
        warnings.filterwarnings("default", module="vardrop")
    try:
        status = app(args=arguments, prog_name="vardrop", standalone_mode=False)
    except UsageError as error:
        _fail(error.format_message())  # type: ignore[attr-defined]
    except (typer.Abort, KeyboardInterrupt):
        status = 130
    except ModuleNotFoundError as error:
        if str(error).startswith("vardrop"):  # the room has named its own extra
            _fail(str(error))
        if (error.name or "vardrop").startswith("vardrop"):
            raise
        _fail(f"this command needs {error.name}, which is not installed; install it by {EXTRAS}")
    except OSError as error:
        _fail(str(error))
    except Exception as error:
        if not str(error).startswith("vardrop"):  # not foreseen: the traceback is what helps
            raise
        _fail(str(error))
    if status == 130:
        _fail("stopped; what is finished is kept: train goes on with --resume, reproduce by itself", 130)
    _exit(status if isinstance(status, int) else 0)


if __name__ == "__main__":
    main()
