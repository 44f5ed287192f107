"""What uncertainty is worth: rejecting examples near the data, and knowing examples that are far from them.

One network, MC dropout with fixed rates, variational dropout with learned ones, and an ensemble, trained alike on
MNIST. Near the data: the error of what is kept when the least certain go to a person. Far from them: letters, clothes,
noise, and digits in negative, none of which is a digit the network has seen; how well a measure of uncertainty tells
them from the test set, and how often a network is sure of them all the same.
"""

from __future__ import annotations

import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import vardrop as vd
from vardrop.data import load
from vardrop.prediction import measures
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.training import Config as Training
from vardrop.training import load_model, train
from vardrop.uncertainty import calibration, detection

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

METHODS = ("none", "ensemble", "binary", "vd-a", "vd-b")
NAMES = {
    "none": "one network", "ensemble": "ensemble", "binary": "MC dropout", "vd-a": "variational A",
    "vd-b": "variational B",
}  # fmt: skip
MEASURES = ("predictive_entropy", "mutual_information")
SURE = 0.9  # the probability from which on a prediction of what is no digit counts as confidently wrong
KEPT = tuple(round(0.5 + 0.02 * i, 2) for i in range(26))  # shares of the test set
BINS = 20


def cells(scale: str) -> list[Config]:
    """A cell for every method and seed, all methods of a seed before the next seed."""
    mnist = {"data": "mnist", "far": ["notmnist", "fashion-mnist", "noise", "negative"], "model": "mlp:3x256"}
    size: Config = {
        "smoke": {"data": "digits", "far": ["noise", "negative"], "model": "mlp:1x32", "epochs": 4, "members": 2},
        "cpu": {**mnist, "epochs": 10, "members": 5, "passes": 50, "examples": 5000},
        "gpu": {**mnist, "epochs": 100, "members": 5, "passes": 100, "examples": 10_000},
    }[scale]
    size = {"passes": 10, "examples": 300, "batch": 16 if scale == "smoke" else 128, **size}
    seeds = {"smoke": 1, "cpu": 3, "gpu": 5}[scale]
    device = "cuda" if scale == "gpu" else "cpu"
    return [{"method": method, **size, "device": device, "seed": seed} for seed in range(seeds) for method in METHODS]


def run_cell(config: Config) -> list[Row]:
    """Train a method with one seed, then score the test set and everything that is far from it."""
    data = load(config["data"])
    about = {"method": config["method"], "seed": config["seed"]}
    networks = _trained(config)
    generator = torch.Generator().manual_seed(config["seed"])
    chosen = torch.randperm(len(data.test_x), generator=generator)[: config["examples"]]
    near, labels = _probabilities(networks, data.test_x[chosen], config), data.test_y[chosen]
    rows = near_rows(near, labels)
    for name in config["far"]:
        x = far_examples(name, data.test_x[chosen], generator)
        rows += far_rows(name, near, _probabilities(networks, x, config))
    return [about | row for row in rows]


def _trained(config: Config) -> list[torch.nn.Module]:
    """One network, or the members of an ensemble, each at its best epoch by validation."""
    ensemble = config["method"] == "ensemble"
    count = config["members"] if ensemble else 1
    networks = []
    for member in range(count):
        training = Training(
            data=config["data"], model=config["model"], method="none" if ensemble else config["method"],
            epochs=config["epochs"], batch_size=config["batch"], patience=0, average=0.99, accelerator=config["device"],
            seed=1000 * (member + 1) + config["seed"] if ensemble else config["seed"],
        )  # fmt: skip
        with tempfile.TemporaryDirectory() as folder:
            train(training, Path(folder), progress=False)
            networks.append(load_model(Path(folder)).to(config["device"]))
    return networks


def _probabilities(networks: list[torch.nn.Module], x: Tensor, config: Config) -> Tensor:
    """Of every pass, ``[T, N, C]``: of the members, of samples of the noise, or one of a network without."""
    if config["method"] in ("none", "ensemble"):
        with torch.no_grad():
            logits = torch.stack([network(x.to(config["device"])) for network in networks])
    else:
        generator = torch.Generator().manual_seed(config["seed"])
        made = vd.mc_predict(networks[0], x.to(config["device"]), config["passes"], generator=generator, progress=False)
        assert made.samples is not None  # noqa: S101 - they are kept unless one asks for it
        logits = made.samples
    return logits.double().softmax(-1).cpu()


def far_examples(name: str, x: Tensor, generator: torch.Generator) -> Tensor:
    """As many examples that are none of the classes, of the shape of ``x`` and in [0, 1]."""
    if name == "noise":
        return torch.rand(x.shape, generator=generator)
    if name == "negative":
        return 1 - x
    other = load(name).test_x
    return other[torch.randperm(len(other), generator=generator)[: len(x)]]


def near_rows(probabilities: Tensor, labels: Tensor) -> list[Row]:
    """Error, likelihood, calibration, and the error of what is kept, over ``[T, N, C]`` and labels ``[N]``."""
    mean = probabilities.mean(0)
    wrong = mean.argmax(-1) != labels
    doubt = measures.predictive_entropy(probabilities)
    selection = vd.select(doubt, wrong.double())
    order = doubt.argsort(stable=True)
    curve = [{"kept": kept, "error": wrong[order[: round(kept * len(wrong))]].double().mean().item()} for kept in KEPT]
    scores = {
        "test_error": wrong.double().mean().item(),
        "test_nll": calibration.nll(mean, labels),
        "ece": calibration.ece(mean, labels),
        "error_of_the_surest_90%": wrong[order[: round(0.9 * len(wrong))]].double().mean().item(),
        "aurc": selection.aurc,
    }
    scores = {name: float(value) for name, value in scores.items()}
    return [{"table": "near", **scores}, *({"table": "curve", **point} for point in curve)]


def far_rows(name: str, near: Tensor, far: Tensor) -> list[Row]:
    """How well each measure tells far examples from near ones, and how sure the network is of the far ones."""
    confidence = far.mean(0).amax(-1)
    counts = torch.histc(confidence, BINS, 0, 1)
    rows: list[Row] = [{
        "table": "sure", "against": name, "sure_of": (confidence > SURE).double().mean().item(),
        "mean_confidence": confidence.mean().item(),
    }]  # fmt: skip
    for measure in MEASURES if len(near) > 1 else MEASURES[:1]:
        inside, outside = (getattr(measures, measure)(part) for part in (near, far))
        scores = {"auroc": detection.auroc(inside, outside), "fpr_at_95": detection.fpr_at(inside, outside)}
        scores = {key: float(value) for key, value in scores.items()}
        rows.append({"table": "far", "against": name, "measure": measure, **scores})
    shares = (counts / counts.sum()).tolist()
    return rows + [
        {"table": "confidence", "against": name, "from": i / BINS, "share": share} for i, share in enumerate(shares)
    ]


def summarise(results: list[Result]) -> list[Row]:
    """Means and standard deviations over seeds, and how far each method is above the single network or the ensemble."""
    rows = [row for result in results for row in result.rows]
    made: list[Row] = []
    for table, keys in {"near": (), "sure": ("against",), "far": ("against", "measure")}.items():
        groups: dict[tuple[Any, ...], list[Row]] = {}
        for row in (row for row in rows if row["table"] == table):
            groups.setdefault((row["method"], *(row[key] for key in keys)), []).append(row)
        for (method, *values), group in groups.items():
            made.append({"table": f"{table}, means", "method": method, **dict(zip(keys, values, strict=True))})
            for column in (column for column in group[0] if column not in {"table", "method", "seed", *keys}):
                numbers = [row[column] for row in group]
                made[-1][column] = statistics.fmean(numbers)
                if len(numbers) > 1:
                    made[-1][f"{column}_sd"] = statistics.stdev(numbers)
    return made + _overall(made)


def _overall(means: list[Row]) -> list[Row]:
    """One row that claims are held against: each method over all far sets."""
    made = []
    for method in dict.fromkeys(row["method"] for row in means):
        of_method = [row for row in means if row["method"] == method]
        far = [r for r in of_method if r["table"] == "far, means" and r["measure"] == "predictive_entropy"]
        sure = [r["sure_of"] for r in of_method if r["table"] == "sure, means"]
        (near,) = (r for r in of_method if r["table"] == "near, means")
        made.append({
            "table": "overall", "method": method, "test_error": near["test_error"],
            "error_of_the_surest_90%": near["error_of_the_surest_90%"],
            "kept_share_of_error": near["error_of_the_surest_90%"] / max(near["test_error"], 1e-12),
            "mean_auroc": statistics.fmean(row["auroc"] for row in far),
            "sure_of_far": statistics.fmean(sure), "sure_of_far_at_most": max(sure),
        })  # fmt: skip
    best = max((row for row in made if row["method"] not in ("none", "ensemble")), key=lambda r: r["mean_auroc"])
    ensemble = next((row for row in made if row["method"] == "ensemble"), None)
    if ensemble:
        made.append({
            "table": "overall", "method": f"ensemble against the best of dropout ({best['method']})",
            "comparison": "ensemble", "auroc_difference": ensemble["mean_auroc"] - best["mean_auroc"],
        })  # fmt: skip
    return made


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Error of what is kept; AUROC; and how sure each method is of what is no digit."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows]
    far = list(dict.fromkeys(row["against"] for row in rows if row["table"] == "sure"))
    methods = [method for method in METHODS if any(row["method"] == method for row in rows)]
    drawn = Figure(figsize=(10, 6.4), layout="constrained")
    top, bottom = drawn.subfigures(2, 1)  # type: ignore[misc]
    kept, auroc = top.subplots(1, 2)
    _curves(kept, rows, methods)
    _bars(auroc, rows, methods, far)
    for axes, name in zip(bottom.subplots(1, len(far), sharey=True), far, strict=True):
        for method in methods:
            bins: dict[float, list[float]] = {}
            for row in rows:
                if row["table"] == "confidence" and (row["method"], row["against"]) == (method, name):
                    bins.setdefault(row["from"], []).append(row["share"])
            edges = [*bins, 1.0]
            heights = [statistics.fmean(shares) for shares in bins.values()]
            axes.stairs(heights, edges, color=f"C{METHODS.index(method)}", label=NAMES[method])
        axes.set(title=f"sure of {name}", xlabel="largest probability")
    bottom.axes[0].set_ylabel("share of examples")
    return drawn


def _curves(axes: Axes, rows: list[Row], methods: list[str]) -> None:
    for method in methods:
        points: dict[float, list[float]] = {}
        for row in rows:
            if row["table"] == "curve" and row["method"] == method:
                points.setdefault(row["kept"], []).append(100 * row["error"])
        means = [statistics.fmean(errors) for errors in points.values()]
        axes.plot([100 * kept for kept in points], means, color=f"C{METHODS.index(method)}", label=NAMES[method])
    axes.set(xlabel="% of the test set kept, the surest first", ylabel="error of what is kept, %")
    axes.legend(fontsize="small")


def _bars(axes: Axes, rows: list[Row], methods: list[str], far: list[str]) -> None:
    width = 0.8 / len(methods)
    for i, method in enumerate(methods):
        values = [
            [
                row["auroc"]
                for row in rows
                if row["table"] == "far"
                and (row["method"], row["against"], row["measure"]) == (method, name, "predictive_entropy")
            ]
            for name in far
        ]
        spread = [statistics.stdev(group) if len(group) > 1 else 0.0 for group in values]
        places = [place + width * (i - len(methods) / 2) for place in range(len(far))]
        means = [statistics.fmean(group) for group in values]
        axes.bar(places, means, width, yerr=spread, align="edge", color=f"C{METHODS.index(method)}")
    axes.set_xticks(range(len(far)), far)
    axes.axhline(0.5, color="C7", linewidth=0.7)
    axes.set(ylim=(0.3, 1.0), ylabel="AUROC, entropy", title="told from the test set")


EXPERIMENT = Experiment(
    name="ood",
    summary="Uncertainty near the data and far from them: MC dropout, variational dropout, an ensemble, one network.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("curve", "confidence", "near", "sure", "far"),
)
