"""``vardrop predict`` and ``vardrop evaluate``, which `vardrop.cli` mounts. What takes long to import comes inside."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

if TYPE_CHECKING:
    from vardrop.evaluation.predict import Table

_SHOWN = 10  # rows of the short table
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30}
_HOW = "How it is asked"

_Run = Annotated[Path, typer.Argument(metavar="RUN", help="What `vardrop train --out` wrote.")]
_Samples = Annotated[
    int, typer.Option(help="Passes with the noise on; 1 is a single one with the noise off.", rich_help_panel=_HOW)
]
_Seed = Annotated[int, typer.Option(help="Of the noise.", rich_help_panel=_HOW)]
_Limit = Annotated[int | None, typer.Option(help="At most so many examples of every set.", rich_help_panel=_HOW)]
_Engine = Annotated[
    str, typer.Option(help="auto | vmap | loop: many passes at once, or one by one", rich_help_panel=_HOW)
]
_Memory = Annotated[str | None, typer.Option(help="For the passes, in bytes or as 500M, 2G.", rich_help_panel=_HOW)]
_Device = Annotated[str, typer.Option(help="Where to compute: cpu | cuda | cuda:1 | mps", rich_help_panel=_HOW)]
_DataDir = Annotated[
    Path | None, typer.Option(help="Look for data here first; then $VARDROP_DATA, ./data, the user's cache.")
]
_Progress = Annotated[bool, typer.Option(help="Show a progress bar, on a terminal.", rich_help_panel=_HOW)]


def predict(
    run: _Run,
    data: Annotated[
        str | None,
        typer.Option(metavar="NAME|FILE.csv", help="What to predict: the run's own data if left out, or a new file."),
    ] = None,
    split: Annotated[str, typer.Option(help="test | train: which rows of a named set.")] = "test",
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write all rows here: .csv, .parquet or .npz.")
    ] = None,
    temperature: Annotated[float | None, typer.Option(help="Soften the probabilities: 1 changes nothing.")] = None,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="The temperature that suits the run's validation rows.")
    ] = False,
    samples: _Samples = 100,
    seed: _Seed = 0,
    limit: _Limit = None,
    engine: _Engine = "auto",
    max_memory: _Memory = None,
    device: _Device = "cpu",
    data_dir: _DataDir = None,
    progress: _Progress = True,
) -> None:
    """Predict examples, and say how sure each answer is.

    The test rows of the run, with the mean of 100 passes, to a file:

    `vardrop predict runs/first --out predictions.csv`

    A new table for a run that was trained on one. Its columns are those of the run's file; the last one, the target,
    may be missing:

    `vardrop predict runs/prices --data new-prices.csv --out answers.parquet`

    What a network trained on digits says to clothes:

    `vardrop predict runs/mnist --data fashion-mnist --limit 1000`

    Columns of classes: label where known, predicted, probability, entropy and mutual_information in nats,
    variation_ratio. Of numbers: mean, std of the passes, total_std with the noise of the data, and lower and upper,
    between which 95 % of the targets should be.
    """
    from vardrop.data.tables import csv_path
    from vardrop.evaluation.examples import examples
    from vardrop.evaluation.output import make_ready, write_table, writer_of
    from vardrop.evaluation.predict import fitted_temperature
    from vardrop.evaluation.predict import predict as find
    from vardrop.evaluation.runs import open_run

    if calibrate and temperature is not None:
        raise ValueError("vardrop.predict: one of --temperature and --calibrate, got both; leave one out")
    passes = _passes(samples, seed, limit, engine, max_memory, progress)
    if out is not None:
        writer_of(out)
        make_ready(out.parent)
    opened = open_run(run, data_dir, device)
    places = ((data, None), (opened.config.data, opened.root))
    tables = [csv_path(name, root) for name, root in places if name and name.lower().endswith(".csv")]
    if out is not None and out.resolve() in {table.resolve() for table in tables}:
        raise ValueError(f"vardrop.predict: --out must not be a table that is read, got {out}; choose another name")
    wanted = examples(opened, data, split).first(limit)
    if calibrate:
        temperature = fitted_temperature(opened, passes)
    table = find(opened, wanted, passes, temperature)
    _print(_doubtful(table))
    _print(table.summary)
    if wanted.note:
        _print(wanted.note)
    if out is not None:
        _print(f"written: {write_table(table.columns, out, table.more)}")


def evaluate(
    run: _Run,
    ood: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME", help="A strange set: noise, shuffled, or the name of another; may be repeated."),
    ] = None,
    target_error: Annotated[
        float | None,
        typer.Option(help="Of what the model keeps, 0.01 for 1 %; an RMSE for numbers. Half of the error if left out."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="For evaluation.json and evaluation.html; RUN if left out.")
    ] = None,
    samples: _Samples = 100,
    seed: _Seed = 0,
    limit: _Limit = None,
    engine: _Engine = "auto",
    max_memory: _Memory = None,
    device: _Device = "cpu",
    data_dir: _DataDir = None,
    progress: _Progress = True,
) -> None:
    """Measure how far the answers of a run can be trusted, and write a page with a slider.

    Error, likelihood and calibration on the test rows, before and after a temperature; what is left to the model when
    its least certain answers go to a person:

    `vardrop evaluate runs/first`

    The threshold for one mistake in a hundred, and what the model says to pictures that are none of its own:

    `vardrop evaluate runs/mnist --target-error 0.01 --ood notmnist --ood fashion-mnist --ood noise`

    Temperature and threshold are chosen on the rows that training kept back, never on the test rows. `noise` is drawn
    evenly, `shuffled` are test examples with their pixels (or the entries of each column) in random order.
    """
    import json

    from vardrop.evaluation.evaluate import evaluate as measure
    from vardrop.evaluation.output import make_ready, save
    from vardrop.evaluation.runs import open_run
    from vardrop.evaluation.show import groups
    from vardrop.report.uncertainty import write_uncertainty

    passes = _passes(samples, seed, limit, engine, max_memory, progress)
    opened, folder = open_run(run, data_dir, device), out or run
    make_ready(folder)
    found = measure(opened, passes, tuple(dict.fromkeys(ood or ())), target_error, limit)
    found.result["command"] = _command(run, ood or (), target_error, samples, seed, limit, engine)
    save(folder / "evaluation.json", json.dumps(found.result, indent=1, allow_nan=False).encode())
    page = write_uncertainty(found.result, groups(found, opened.data), folder / "evaluation.html")
    for note in found.result["notes"]:
        _print(note)
    _print(_measured(found.result))
    _print(f"page: {page}")


def _passes(samples: int, seed: int, limit: int | None, engine: str, max_memory: str | None, progress: bool) -> Any:
    from vardrop.evaluation.answers import Passes

    if limit is not None and limit < 1:
        raise ValueError(f"vardrop.evaluation: --limit must be at least 1, got {limit}; leave it out for all")
    return Passes(samples, seed, engine, _bytes(max_memory), progress and Console(stderr=True).is_terminal)


def _bytes(text: str | None) -> int | None:
    """500M as a number of bytes."""
    if text is None:
        return None
    lowered = text.strip().lower().removesuffix("b").removesuffix("i")
    unit = lowered[-1:] if lowered[-1:].isalpha() else ""
    try:
        size = int(float(lowered.removesuffix(unit)) * _UNITS[unit])
    except (ValueError, KeyError, OverflowError):
        size = 0
    if size < 1:
        raise ValueError(f"vardrop.evaluation: --max-memory must be a size such as 500M or 2G, got {text!r}")
    return size


def _command(
    run: Path, ood: Any, target_error: float | None, samples: int, seed: int, limit: int | None, engine: str
) -> str:
    """The command line that evaluates the run again."""
    import shlex

    words = ["vardrop", "evaluate", str(run), "--samples", str(samples), "--seed", str(seed)]
    for name in ood:
        words += ["--ood", name]
    for option, value in (("--target-error", target_error), ("--limit", limit)):
        words += [] if value is None else [option, str(value)]
    return shlex.join(words if engine == "auto" else [*words, "--engine", engine])


def _doubtful(table: Table) -> Grid:
    """The rows that the run is least sure of."""
    from vardrop.evaluation.predict import most_doubtful

    columns = (
        Column(name.replace("_", " "), justify="left" if name in ("label", "predicted") else "right")
        for name in table.columns
    )
    grid = Grid(*columns, box=None, title=f"least certain first, by {table.doubt}", title_justify="left")
    for row in most_doubtful(table, _SHOWN).tolist():
        values = (column[row] for column in table.columns.values())
        grid.add_row(*(("" if math.isnan(v) else f"{v:.4g}") if isinstance(v, float) else str(v) for v in values))
    return grid


def _measured(result: dict[str, Any]) -> Grid:
    """All that was measured, a line each."""
    from vardrop.report.uncertainty_words import percent, quantity

    test, after, rule = result["test"], result["calibrated"], result["selection"]["rule"]
    numbers = result["task"] == "regression"
    grid = Grid("on the test rows", Column("value", justify="right"), "", box=None)
    names = {"error": ("error", percent), "nll": ("nll", quantity), "brier": ("Brier score", quantity),
             "ece": ("calibration error (ECE)", percent), "rmse": ("RMSE", quantity),
             "log_likelihood": ("log-likelihood", quantity)}  # fmt: skip
    for key, (name, shown) in names.items():
        if key in test:
            told = f"{shown(after[key])} at temperature {quantity(after['temperature'])}" if after else ""
            grid.add_row(name, shown(test[key]), "" if key == "error" else told)
    if numbers:
        for row in result["intervals"]:
            if row["nominal"] in (0.5, 0.9, 0.95):
                grid.add_row(f"within {percent(row['nominal'])} intervals", percent(row["observed"]), "")
    grid.add_row("AURC", quantity(result["selection"]["aurc"]), "")
    for row in result["selection"]["at"]:
        value = quantity(row["rmse"]) if numbers else percent(row["accuracy"])
        grid.add_row(f"{'RMSE' if numbers else 'accuracy'} on the surest {percent(row['coverage'])}", value, "")
    if rule is not None:
        shown = quantity if numbers else percent
        kept = f"keeps {percent(rule['test']['coverage'])} with {shown(rule['test']['error'])}"
        score = result["selection"]["score"]["name"]
        grid.add_row(f"threshold for {shown(rule['target_error'])}", quantity(rule["threshold"]), f"on {score}: {kept}")
    for name, scores in result["ood"].items():
        for key, values in scores.items():
            if key != "examples":
                told = f"AUROC, {result['histograms'][key]['name']}; FPR95 {percent(values['fpr95'])}"
                grid.add_row(f"strange: {name}", f"{values['auroc']:.3f}", told)
    return grid


def _print(what: Any) -> None:
    Console(file=sys.stdout, soft_wrap=isinstance(what, str), highlight=False).print(what, markup=False)
