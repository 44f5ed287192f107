"""One untuned run with learned rates against the best of nine fixed rates, chosen on validation, on nine data sets.

The untuned run was chosen before anything was run: ``vd-a2`` with a rate per neuron, which is what ``vardrop train``
does when it is asked for nothing. ``vd-a`` and ``vd-b`` are beside it. The grid is plain dropout: its rate is that of
hidden units, and the input has 0.4 times it, so that 0.5 gives the 0.2 and 0.5 of Kingma et al. 2015. Both sides have
the same network, rows, steps and choice of the epoch. Error and nll are each taken where the same measure was smallest
on validation rows: at that epoch, and for the grid at that rate. Test rows choose nothing.

Nine runs take more time than one. After the runs with equal steps had ended, most learned ones at their best in the
last epoch, ``vd-a2`` was run once more with three times the steps, which is about the time of the grid where it is
longest (yacht) and less than half of it where it is shortest (MNIST).
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import nn

from vardrop.methods import METHODS, prepare
from vardrop.models import build
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments._training import Best, Parts, Plan, fit, learned_rates, parts, take
from vardrop.training.evaluation import evaluate

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

UNTUNED = "vd-a2"
BESIDE = ("vd-a", "vd-b")
TIMES = 3
LONGER = f"{UNTUNED}, {TIMES} times the steps"
GRID = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7)
INPUT = 0.4  # rate of the input over that of hidden units
MEASURES = ("error", "nll")
_IMAGES: Config = {"model": "mlp:3x200", "lr": 0.001, "split_by_seed": False}
_UCI: Config = {"model": "mlp:1x50", "lr": 0.01, "split_by_seed": True, "validation": 0.2, "batch": 64}
SETS: dict[str, Config] = {  # epochs: 3,000 to 4,000 steps everywhere
    "digits": {**_IMAGES, "data": "digits", "validation": 0.2, "epochs": 165, "batch": 64, "split_by_seed": True},
    "MNIST, 1,000": {**_IMAGES, "data": "mnist", "examples": 1000, "validation": 0.2, "epochs": 240, "batch": 64},
    "MNIST, 10,000": {**_IMAGES, "data": "mnist", "examples": 10_000, "validation": 0.2, "epochs": 48, "batch": 128},
    "MNIST": {**_IMAGES, "data": "mnist", "validation": 10_000, "epochs": 20, "batch": 256},
    "Fashion-MNIST": {**_IMAGES, "data": "fashion-mnist", "validation": 10_000, "epochs": 20, "batch": 256},
    "UCI boston": {**_UCI, "data": "uci:bostonHousing", "epochs": 500},
    "UCI concrete": {**_UCI, "data": "uci:concrete", "epochs": 250},
    "UCI energy": {**_UCI, "data": "uci:energy", "epochs": 330},
    "UCI yacht": {**_UCI, "data": "uci:yacht", "epochs": 750},
}
_SMOKE: dict[str, Config] = {
    "digits, 300": {**_IMAGES, "data": "digits", "examples": 300, "validation": 0.2, "epochs": 4, "batch": 64},
    "digits": {**_IMAGES, "data": "digits", "validation": 0.2, "epochs": 2, "batch": 64, "split_by_seed": True},
}


def cells(scale: str) -> list[Config]:
    """A cell for every set and seed, with all runs in it, the small sets first; then those of the longer runs."""
    sets = _SMOKE if scale == "smoke" else SETS
    shared: Config = {"looks": 60, "average": 0.999, "device": "cuda" if scale == "gpu" else "cpu"}
    if scale == "smoke":
        shared |= {"model": "mlp:3x16", "lr": 0.01, "average": 0.9}
    shared["grid"] = [0.0, 0.3] if scale == "smoke" else list(GRID)
    seeds = {"smoke": 2, "cpu": 3, "gpu": 5}[scale]
    ordered = sorted(sets, key=lambda name: sets[name]["validation"] > 1)
    equal: list[Config] = [
        {"set": name, "examples": None, **sets[name], **shared, "seed": seed}
        for name in ordered
        for seed in range(seeds)
    ]
    return equal + [{**cell, "epochs": TIMES * cell["epochs"], "grid": []} for cell in equal]


def run_cell(config: Config) -> list[Row]:
    """Train at every rate of the grid and with learned rates; without a grid ``vd-a2`` alone. A row for every run."""
    seed, device = config["seed"], config["device"]
    split = seed if config["split_by_seed"] else 0
    some = parts(config["data"], config["validation"], seed, device, config["examples"], split)
    rows: list[Row] = []
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        for rate in config["grid"]:
            torch.manual_seed(seed)
            noise = (INPUT * rate, rate) if rate else None
            network = build(config["model"], some.data.shape, some.data.outputs, noise)
            rows.append({"method": "fixed", "rate": rate, **_tested(network, 0.0, some, config)})
        for method in (UNTUNED, *BESIDE) if config["grid"] else (UNTUNED,):
            torch.manual_seed(seed)
            network, kl_scale, _ = prepare(
                method, config["model"], some.data.shape, some.data.outputs, METHODS[method].default_sharing
            )
            name = method if config["grid"] else LONGER
            rows.append({"method": name, "rate": None, **_tested(network, kl_scale, some, config)})
    unit = "RMSE" if some.data.task == "regression" else "%"
    return [{"table": "runs", "set": config["set"], "seed": seed, "unit": unit, **row} for row in rows]


def _tested(network: nn.Module, kl_scale: float, some: Parts, config: Config) -> Row:
    """Train, and test error and nll where each was smallest on validation rows."""
    plan = Plan(config["epochs"], config["batch"], config["lr"], config["average"], config["looks"])
    task, best, seconds = fit(network.to(config["device"]), kl_scale, some, plan, config["seed"])
    percent = 1 if some.data.task == "regression" else 100

    def scaled(kept: Best) -> dict[str, float]:
        return {"error": percent * kept.scores.mistake, "nll": kept.scores.nll}

    row: Row = {}
    for measure in MEASURES:
        row[f"validation_{measure}"] = scaled(best[measure])[measure]
    for measure in MEASURES:
        scores = evaluate(take(task, best[measure]), task, *some.test)
        row[f"test_{measure}"] = percent * scores.mistake if measure == "error" else scores.nll
        row[f"best_epoch_{measure}"] = best[measure].epoch
    rates = [mean for mean, _ in learned_rates(task.network)] if kl_scale else []  # where the nll was smallest
    row["input_rate"] = rates[0] if rates else None
    row["hidden_rate"] = statistics.fmean(rates[1:]) if rates else None
    return row | {"seconds": round(seconds, 1)}


def chosen(runs: list[Row], measure: str) -> Row:
    """The run of the grid that validation rows prefer; of equals the one with the smaller rate."""
    fixed = sorted((row for row in runs if row["method"] == "fixed"), key=lambda row: row["rate"])
    return min(fixed, key=lambda row: row[f"validation_{measure}"])


def verdict(difference: float, error: float | None) -> str:
    """Learned less grid, in units of its standard error."""
    if error is None:
        return "one seed"
    return "better" if difference < -error else "worse" if difference > error else "within one standard error"


def summarise(results: list[Result]) -> list[Row]:
    """For every set and measure both sides and their difference in pairs of seeds; then on how many sets it is what."""
    tables: list[Row] = []
    counts: list[Row] = []
    sets = _by_set(results).values()
    for method in (UNTUNED, LONGER):
        for measure in MEASURES:
            rows = [_compared(seeds, measure, method) for seeds in sets if all(_has(runs, method) for runs in seeds)]
            tables += rows
            count: Row = {"table": "count", "method": method, "measure": measure, "sets": len(rows)}
            for words in ("better", "within one standard error", "worse"):
                count[words.replace(" ", "_")] = sum(row["verdict"] == words for row in rows)
            counts.append(count | {"no_worse": count["sets"] - count["worse"]})
    return tables + counts


def _has(runs: list[Row], method: str) -> bool:
    """Whether a method has run, and a grid beside it."""
    return {method, "fixed"} <= {row["method"] for row in runs}


def _by_set(results: list[Result]) -> dict[str, list[list[Row]]]:
    """Set -> for every seed its runs."""
    found: dict[str, dict[int, list[Row]]] = {}
    for result in results:
        found.setdefault(result.config["set"], {}).setdefault(result.config["seed"], []).extend(result.rows)
    names = [*_SMOKE, *SETS]
    return {name: list(found[name].values()) for name in sorted(found, key=names.index)}


def _compared(seeds: list[list[Row]], measure: str, method: str) -> Row:
    column = f"test_{measure}"

    def of(method: str) -> list[float]:
        return [row[column] for runs in seeds for row in runs if row["method"] == method]

    best = [chosen(runs, measure) for runs in seeds]
    differences = [ours - row[column] for ours, row in zip(of(method), best, strict=True)]
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    mean = statistics.fmean(differences)
    zero = [row[column] for runs in seeds for row in runs if row["rate"] == 0]
    learned = [row["hidden_rate"] for runs in seeds for row in runs if row["method"] == method]
    beside = {other: statistics.fmean(of(other)) for other in BESIDE} if method == UNTUNED else {}
    return {
        "table": measure if method == UNTUNED else f"{measure}, {TIMES} times the steps",
        "run": method, "set": seeds[0][0]["set"], "unit": seeds[0][0]["unit"] if measure == "error" else "nats",
        "seeds": len(seeds), UNTUNED: statistics.fmean(of(method)),
        "best_of_the_grid": statistics.fmean(row[column] for row in best), "difference": mean,
        "standard_error": error, "verdict": verdict(mean, error), "no_dropout": statistics.fmean(zero), **beside,
        "chosen_rates": ", ".join(f"{row['rate']:g}" for row in best), "learned_hidden_rate": statistics.fmean(learned),
    }  # fmt: skip


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Every set: test error against the fixed rate, and that of the untuned run as a line across."""
    from matplotlib.figure import Figure

    sets = _by_set(results)
    columns = min(5, len(sets))
    drawn = Figure(figsize=(2.4 * columns, 2.3 * -(-len(sets) // columns)), layout="constrained")
    axes = drawn.subplots(-(-len(sets) // columns), columns, squeeze=False).flatten()
    for ax, (name, seeds) in zip(axes, sets.items(), strict=False):
        fixed = [row for runs in seeds for row in runs if row["method"] == "fixed"]
        rates = sorted({row["rate"] for row in fixed})
        errors = [[row["test_error"] for row in fixed if row["rate"] == rate] for rate in rates]
        spread = [statistics.stdev(some) if len(some) > 1 else 0.0 for some in errors]
        ax.errorbar(rates, [statistics.fmean(some) for some in errors], spread, fmt="C1s-", markersize=3, capsize=2)
        best = [chosen(runs, "error") for runs in seeds]
        ax.plot([row["rate"] for row in best], [row["test_error"] for row in best], "C1o", fillstyle="none")
        for method, colour in ((UNTUNED, "C0"), (LONGER, "C2")):
            ours = [row["test_error"] for runs in seeds for row in runs if row["method"] == method]
            if ours:
                middle, half = statistics.fmean(ours), statistics.stdev(ours) if len(ours) > 1 else 0.0
                ax.axhline(middle, color=colour)
                ax.axhspan(middle - half, middle + half, color=colour, alpha=0.2)
        ax.set_title(f"{name}, {seeds[0][0]['unit']}", fontsize="small")
        ax.tick_params(labelsize="x-small")
    for ax in axes[len(sets) :]:
        ax.remove()
    words = f"learned rates, one run, blue: as many steps; green: {TIMES} times as many"
    drawn.supxlabel(f"fixed rate of hidden units (orange; circles: chosen on validation); {words}", fontsize="small")
    drawn.supylabel("test error", fontsize="small")
    return drawn


EXPERIMENT = Experiment(
    name="no-tuning",
    summary="One untuned run with learned rates against the best of nine fixed rates chosen on validation.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("runs",),
)
