"""``vardrop prune`` and ``vardrop export``, which `vardrop.cli` mounts. What takes long to import comes inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Column
from rich.table import Table as Grid

if TYPE_CHECKING:
    from vardrop.pruning.exporting import Exported

_GOAL, _AFTER = "How much goes (one of these)", "Afterwards"

_DataDir = Annotated[
    Path | None, typer.Option(help="Look for data here first; then $VARDROP_DATA, ./data, the user's cache.")
]


def prune(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What `vardrop train --out` wrote, of sparse-vd.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="A new folder for the smaller network and its page.")],
    threshold: Annotated[
        float | None,
        typer.Option(help="Weights go whose log alpha is above it; 3 if nothing is said.", rich_help_panel=_GOAL),
    ] = None,
    target_sparsity: Annotated[
        float | None, typer.Option(help="Or this share of them, the noisiest first: 0.95.", rich_help_panel=_GOAL)
    ] = None,
    max_error_increase: Annotated[
        float | None,
        typer.Option(
            help="Or as many as can go before the error on validation rows grows by this: 0.01 is one in a hundred, "
            "of numbers it is an RMSE.",
            rich_help_panel=_GOAL,
        ),
    ] = None,
    finetune_epochs: Annotated[int, typer.Option(help="Train on for so many; zeros stay.", rich_help_panel=_AFTER)] = 0,
    finetune_lr: Annotated[
        float | None, typer.Option(help="Learning rate for that; a tenth of the run's.", rich_help_panel=_AFTER)
    ] = None,
    quantize: Annotated[
        bool,
        typer.Option(
            "--quantize", help="Round weights to the digits that their noise pays for.", rich_help_panel=_AFTER
        ),
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result in --out.")] = False,
    data_dir: _DataDir = None,
    progress: Annotated[bool, typer.Option(help="Show a progress bar, on a terminal.")] = True,
) -> None:
    """Remove the weights that noise has taken over; write the smaller network, and a page on where they went.

    Train sparse first, then remove what has a log alpha above 3 (a dropout rate above 0.95):

    `vardrop train --data mnist --model lenet-300-100 --method sparse-vd --epochs 200 --patience 0 --out runs/sparse`

    `vardrop prune runs/sparse --out runs/pruned`

    As small as it gets for half a point of error, then trained on and rounded:

    `vardrop prune runs/sparse --out runs/small --max-error-increase 0.005 --finetune-epochs 5 --quantize`

    DIR is a run like RUN, with zeros in its weights, which `vardrop evaluate`, `predict` and `export` open. Beside it
    are compact.safetensors and compact.vdc, a network without these zeros, whose architecture is in the .json next to
    each (`vardrop.pruning.load_network(FILE)` builds it); prune.json with all numbers; and index.html, where a slider
    shows every other threshold. Everything is chosen on the rows that training kept back, never on the test rows.
    """
    from vardrop.evaluation.runs import open_run
    from vardrop.pruning.display import Steps
    from vardrop.pruning.folder import PAGE, check_place, drafted
    from vardrop.pruning.goals import Goal
    from vardrop.pruning.prune import Options, result
    from vardrop.pruning.prune import prune as shrink
    from vardrop.pruning.writing import first_layer, write_networks, write_result, write_run
    from vardrop.report.pruning import write_pruning

    goal = Goal(threshold, target_sparsity, max_error_increase)
    options = Options(finetune_epochs, finetune_lr, quantize)
    check_place(out, run, overwrite)
    opened = open_run(run, data_dir)
    with Steps(progress) as steps:
        pruned = shrink(opened, goal, options, steps)
    found = result(opened, pruned, options, _command(run, out, goal, options))
    with drafted(out) as folder:
        write_run(opened, pruned, folder)
        found |= write_networks(opened, pruned, folder) | {"first": first_layer(opened, pruned)}
        write_result(found, folder)
        write_pruning(found, folder / PAGE)
    for note in found["notes"]:
        _print(note)
    for grid in _shrunk(found):
        _print(grid)
    _print(f"page: {out / PAGE}")


def export(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="What `vardrop train` or `vardrop prune` wrote.")],
    form: Annotated[
        str, typer.Option("--format", metavar="FORMAT", help="onnx | safetensors (sparse rows) | compressed")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Ends in .onnx, .safetensors or .vdc; in RUN if left out."),
    ] = None,
    compact: Annotated[
        bool, typer.Option("--compact", help="Take out neurons and channels that do nothing: a smaller network.")
    ] = False,
    data_dir: _DataDir = None,
) -> None:
    """Write the network of a run to a file for other programs, and check that it says the same.

    For anything that reads ONNX, in single precision; the outputs of onnxruntime are held against those of the run:

    `vardrop export runs/pruned --format onnx --compact --out net.onnx`

    The smallest file (pip install 'vardrop[compress]'):

    `vardrop export runs/pruned --format compressed --compact`

    Matrices that are mostly zero as compressed sparse rows, for any reader of safetensors:

    `vardrop export runs/pruned --format safetensors`

    The last two have the architecture beside them, in FILE.json: `vardrop.pruning.load_network(FILE)` needs no more.
    """
    from vardrop.evaluation.runs import open_run
    from vardrop.pruning.exporting import check_format, place
    from vardrop.pruning.exporting import export as write

    check_format(form)
    opened = open_run(run, data_dir)
    written = write(opened, form, place(opened, form, out, compact), compact)
    _print(_exported(written, form))
    where = f"in {written.also.name}" if written.also else "in the file's metadata, under vardrop"
    if opened.data.scaling is not None:
        _print(f"Its inputs are columns that were standardised, (x - mean) / std: the numbers are {where}.")
    if opened.regression:
        _print(f"Its outputs are standardised: the target is mean + std * output, with the numbers {where}.")
    if not written.zeros:
        _print("The run has no weight that is zero: `vardrop prune` removes some, if it was trained with sparse-vd.")
    _print(f"written: {written.path}" + (f", architecture: {written.also}" if written.also else ""))


def _command(run: Path, out: Path, goal: Any, options: Any) -> str:
    """The command line that prunes the run again."""
    import shlex

    words = ["vardrop", "prune", str(run), "--out", str(out)]
    for name, value in (*vars(goal).items(), *vars(options).items()):
        if value is True:
            words.append(f"--{name.replace('_', '-')}")
        elif value:
            words += [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join(words)


def _shrunk(found: dict[str, Any]) -> list[Grid]:
    """What was removed where, and what it costs."""
    from vardrop.report.pruning_words import part, size, stages, totals
    from vardrop.report.uncertainty_words import count

    numbers = [
        Column(name, justify="right", no_wrap=True)
        for name in ("weights", "removed", "", "parameters", "multiply-adds")
    ]
    removed = Grid("layer", *numbers, Column("compressed", justify="right"), box=None)
    for row in (*found["layers"], {"name": "all", **totals(found["layers"])}):
        pairs = (" → ".join(map(count, row[name])) for name in ("parameters", "multiply_adds"))
        share = part(row["removed"], row["weights"])
        told = size(row["bytes"]["compressed"])
        removed.add_row(row["name"], count(row["weights"]), count(row["removed"]), share, *pairs, told)
    measure = "RMSE" if found["task"] == "regression" else "error"
    costs = Grid(
        "network", *(Column(f"{on} {measure}", justify="right") for on in ("test", "validation")), "bytes", box=None
    )
    sizes = found["bytes"]
    taken = {"dense": sizes["dense"]["float32"], "compact": sizes["compact"]["compressed"]}
    for (name, _), row in zip(found["test"].items(), stages(found), strict=True):
        costs.add_row(row["name"], row["test"], row["validation"], size(taken[name]) if taken.get(name) else "")
    return [removed, costs]


def _exported(written: Exported, form: str) -> Grid:
    """What was written, a line each."""
    from vardrop.report.pruning_words import size, times
    from vardrop.report.uncertainty_words import count

    before, after = written.parameters
    by = "onnxruntime" if form == "onnx" else "the file, read back"
    grid = Grid("", "", box=None, show_header=False)
    less = written.bytes <= written.dense
    ratio = times(written.dense, written.bytes) if less else times(written.bytes, written.dense)
    told = f"{ratio} times {'less' if less else 'more'} than {size(written.dense)} of float32 alone"
    grid.add_row("file", f"{size(written.bytes)}, {told}")
    grid.add_row("parameters", count(after) if before == after else f"{count(before)} → {count(after)}")
    grid.add_row(
        "checked", f"{by} differs by at most {written.difference:.2g} (largest output {written.largest:.3g}) on "
        f"{written.rows} test examples",
    )  # fmt: skip
    return grid


def _print(what: Any) -> None:
    Console(file=sys.stdout, soft_wrap=isinstance(what, str), highlight=False).print(what, markup=False)
