"""Active learning from a handful of labels: which images to have labelled next, by BALD or by chance.

Gal, Islam, Ghahramani 2017: a convolutional network with dropout starts from 20 labels of MNIST, is trained anew after
every 10 more, and MC dropout says which 10 those are. Here the network is LeNet-5 with dropout around its dense layers,
trained for a fixed number of steps, whatever the labels; nothing about it is chosen on the test set.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.data import Data, load
from vardrop.models import build
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.uncertainty.active import active_learning

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

METHODS = ("random", "bald", "variation_ratio")


def cells(scale: str) -> list[Config]:
    """A cell for every method and seed. By chance it takes many more labels: 40 at a time, which is no disadvantage."""
    mnist = {"data": "mnist", "model": "lenet-5", "start": 20, "targets": [0.10, 0.05]}
    size: Config = {
        "smoke": {"data": "digits", "model": "mlp:1x64", "start": 20, "targets": [0.6, 0.4], "steps": 150},
        "cpu": {**mnist, "steps": 300},
        "gpu": {**mnist, "steps": 1000},
    }[scale]
    size |= {"smoke": {"pool": 200, "passes": 10}, "cpu": {"pool": 3000, "passes": 50}}.get(
        scale, {"pool": 10_000, "passes": 100}
    )
    methods = METHODS[:2] if scale == "cpu" else METHODS
    made: list[Config] = []
    for seed in range({"smoke": 1, "cpu": 3, "gpu": 5}[scale]):
        for method in methods:
            each = 40 if method == "random" else 20 if scale == "smoke" else 10
            labels = {"smoke": 100, "cpu": 1020 if method == "random" else 420, "gpu": 1020}[scale]
            device = "cuda" if scale == "gpu" else "cpu"
            made.append({"method": method, **size, "each": each, "labels": labels, "device": device, "seed": seed})
    return made


def run_cell(config: Config) -> list[Row]:
    """The error on the whole test set against the number of labels."""
    data = load(config["data"])
    device = config["device"]
    x, y = data.train_x.to(device), data.train_y.to(device)
    loop = active_learning(
        lambda labelled: fit(data, x[labelled.to(device)], y[labelled.to(device)], config),
        lambda model, pool: vd.mc_predict(
            model, x[pool.to(device)], config["passes"], outputs="probabilities", progress=False
        ),
        lambda model: test_error(model, data, device),
        pool=len(x),
        initial=balanced(data.train_y, config["start"], torch.Generator().manual_seed(config["seed"])),
        count=config["each"], rounds=(config["labels"] - config["start"]) // config["each"],
        method=config["method"], subset=config["pool"], seed=config["seed"], progress=False,
    )  # fmt: skip
    about = {"table": "curve", "method": config["method"], "seed": config["seed"]}
    return [{**about, "labels": made.labels, "test_error": made.score} for made in loop]


def balanced(labels: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of as many examples of every class."""
    order = torch.randperm(len(labels), generator=generator)
    classes = labels.unique()
    return torch.cat([order[labels[order] == c][: count // len(classes)] for c in classes])


def fit(data: Data, x: Tensor, y: Tensor, config: Config) -> nn.Module:
    """A network trained from scratch for a fixed number of steps of Adam; its answers are probabilities."""
    model = build(config["model"], data.shape, data.outputs, (0.5, 0.5)).to(x.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(config["steps"]):
        rows = torch.randint(len(x), (min(len(x), 64),)).to(x.device)
        loss = F.cross_entropy(model(x[rows]), y[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return nn.Sequential(model, nn.Softmax(-1)).eval()


@torch.no_grad()
def test_error(model: nn.Module, data: Data, device: str) -> float:
    """With the noise off."""
    wrong = [
        model(x.to(device)).argmax(-1).cpu() != y
        for x, y in zip(data.test_x.split(1000), data.test_y.split(1000), strict=True)
    ]
    return torch.cat(wrong).double().mean().item()


def labels_to(target: float, curve: dict[int, float]) -> float | None:
    """How many labels it takes until the error is at most ``target``, between two looks by a straight line.

    Example:
        >>> from vardrop.reproduce.experiments.active import labels_to
        >>> labels_to(0.05, {20: 0.30, 40: 0.08, 60: 0.02})
        50.0
    """
    before: tuple[int, float] | None = None
    for labels, error in curve.items():
        if error <= target:
            if before is None:
                return float(labels)
            share = (before[1] - target) / (before[1] - error)
            return before[0] + share * (labels - before[0])
        before = labels, error
    return None


def mean_curve(rows: list[Row], method: str) -> dict[int, float]:
    """Labels -> test error, averaged over seeds, where all seeds have been looked at."""
    seeds = {row["seed"] for row in rows if row["method"] == method}
    at: dict[int, list[float]] = {}
    for row in rows:
        if row["method"] == method:
            at.setdefault(row["labels"], []).append(row["test_error"])
    return {labels: statistics.fmean(errors) for labels, errors in sorted(at.items()) if len(errors) == len(seeds)}


def summarise(results: list[Result]) -> list[Row]:
    """Labels to a given error: of the curve averaged over seeds, of every seed, and as a share of those by chance."""
    rows = [row for result in results for row in result.rows]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    made = []
    for name, target in zip(("easy", "hard"), results[0].config["targets"], strict=True):
        needed = {method: labels_to(target, mean_curve(rows, method)) for method in methods}
        for method in methods:
            seeds = dict.fromkeys(row["seed"] for row in rows if row["method"] == method)
            each = [labels_to(target, mean_curve([r for r in rows if r["seed"] == s], method)) for s in seeds]
            reached = [labels for labels in each if labels is not None]
            by_chance, mine = needed.get("random"), needed[method]
            made.append({
                "table": "labels needed", "target": name, "error": target, "method": method, "labels": mine,
                "seeds_that_reach_it": len(reached), "least": min(reached, default=None),
                "most": max(reached, default=None),
                "share_of_random": mine / by_chance if mine is not None and by_chance is not None else None,
            })  # fmt: skip
    return made


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Test error against labels, a line for the mean and thin ones for the seeds."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows]
    drawn = Figure(figsize=(7, 4), layout="constrained")
    axes = drawn.subplots()
    for color, method in zip(("C7", "C0", "C2"), METHODS, strict=True):
        of_method = [row for row in rows if row["method"] == method]
        for seed in dict.fromkeys(row["seed"] for row in of_method):
            points = [(row["labels"], 100 * row["test_error"]) for row in of_method if row["seed"] == seed]
            axes.plot(*zip(*points, strict=True), color=color, alpha=0.3, linewidth=0.7)
        curve = mean_curve(rows, method)
        if curve:
            axes.plot(list(curve), [100 * error for error in curve.values()], color=color, label=method)
    for target in results[0].config["targets"]:
        axes.axhline(100 * target, color="C3", linewidth=0.7, linestyle="--")
    axes.set(xlabel="labels", ylabel="test error, %", yscale="log")
    axes.minorticks_off()
    axes.set_yticks([2, 5, 10, 20, 50], ["2", "5", "10", "20", "50"])
    axes.legend(fontsize="small")
    return drawn


EXPERIMENT = Experiment(
    name="active",
    summary="Active learning on MNIST from 20 labels: test error against the number of labels, BALD against chance.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("curve",),
)
