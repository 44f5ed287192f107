"""Dropout against BatchNorm (Li et al. 2019): the shift of variance, by theory and measured, and what it costs.

A small densely connected network with bottlenecks (Huang et al. 2017) learns a few images of CIFAR-10 without dropout,
with dropout in front of the second BatchNorm of every bottleneck, and with dropout behind the last BatchNorm of all. At
every BatchNorm the variance of its input with the noise on is held against that with the noise off. Then the running
statistics of the trained network are estimated again without noise, and the test error is taken once more.
"""

from __future__ import annotations

import copy
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments._cifar import _fit, error, images

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.diagnosis.report import Diagnosis
    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

PLACES = ("none", "bottleneck", "moved")
NAMES = {"none": "no dropout", "bottleneck": "in the bottlenecks", "moved": "behind the last BatchNorm"}
RATE = 0.5


def cells(scale: str) -> list[Config]:
    """A cell for every place and seed, all places of a seed before the next."""
    shared: Config = {"weight_decay": 5e-4, "crop": 0, "bfloat16": scale != "smoke", "lr": 0.1}
    size: Config = {
        "smoke": {
            "data": "digits", "train": 256, "validation": 200, "epochs": 3, "batch": 32, "layers": 1, "growth": 4,
            "stem": 1, "device": "cpu", "looked_at": 256,
        },
        "cpu": {
            "data": "cifar10", "train": 5000, "validation": 4000, "epochs": 24, "batch": 64, "layers": 3,
            "growth": 12, "stem": 2, "device": "cpu", "looked_at": 2048,
        },
        "gpu": {
            "data": "cifar10", "train": 45_000, "validation": 5000, "epochs": 200, "batch": 128, "layers": 16,
            "growth": 12, "stem": 1, "device": "cuda", "looked_at": 8192,
        },
    }[scale]  # fmt: skip
    seeds = {"smoke": 1, "cpu": 2, "gpu": 5}[scale]
    return [{"place": place, "rate": RATE, **shared, **size, "seed": seed} for seed in range(seeds) for place in PLACES]


class Dense(nn.Module):
    """Its input, and beside it a few maps made from it through a bottleneck."""

    def __init__(self, channels: int, growth: int, noise: float) -> None:
        super().__init__()
        self.bottleneck = nn.Sequential(
            nn.BatchNorm2d(channels), nn.ReLU(), nn.Conv2d(channels, 4 * growth, 1, bias=False)
        )
        self.drop = nn.Dropout(noise)
        self.maps = nn.Sequential(
            nn.BatchNorm2d(4 * growth), nn.ReLU(), nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.maps(self.drop(self.bottleneck(x)))], dim=1)


def densenet(channels: int, config: Config) -> nn.Sequential:
    """Three blocks of dense layers, the maps of each half as large."""
    growth, place = config["growth"], config["place"]
    inside = config["rate"] if place == "bottleneck" else 0.0
    width = 2 * growth
    layers: list[nn.Module] = [nn.Conv2d(channels, width, 3, config["stem"], padding=1, bias=False)]
    for block in range(3):
        if block:
            half = width // 2
            layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.Conv2d(width, half, 1, bias=False), nn.AvgPool2d(2)]
            width = half
        for _ in range(config["layers"]):
            layers.append(Dense(width, growth, inside))
            width += growth
    layers += [nn.BatchNorm2d(width), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    layers += [nn.Dropout(config["rate"] if place == "moved" else 0.0), nn.Linear(width, 10)]
    return nn.Sequential(*layers).to(config["device"], memory_format=torch.channels_last)  # type: ignore[call-overload]


def run_cell(config: Config) -> list[Row]:
    """Train one network; its errors before and after its statistics are estimated again; a row for every BatchNorm."""
    data = images(config["data"], config["train"], config["validation"], config["seed"], config["device"])
    with torch.random.fork_rng(devices=[0] if config["device"] == "cuda" else []):
        torch.manual_seed(config["seed"])
        model = densenet(data.train[0].shape[1], config)
        torch.manual_seed(config["seed"])
        _fit(model, data, config)
    model.eval()
    batches = list(zip(data.train[0].split(128), data.train[1].split(128), strict=True))
    batches = batches[: config["looked_at"] // 128]
    identity: Row = {"place": config["place"], "seed": config["seed"]}
    rows = [identity | row for row in batchnorm_rows(vd.diagnose(model, batches, max_batches=len(batches)))]
    again = copy.deepcopy(model)
    report = vd.fix_variance_shift_(
        again, batches, "recalibrate", validation=[data.validation], max_batches=len(batches)
    )
    errors = {
        "train_error": error(model, *data.train, config),
        "validation_error": error(model, *data.validation, config),
        "test_error": error(model, *data.test, config),
        "test_error_recalibrated": error(again, *data.test, config),
        "recalibration_kept": report.chosen is not None,
    }
    return [{"table": "networks", **identity, **errors}, *rows]


def batchnorm_rows(found: Diagnosis) -> list[Row]:
    """k² at every BatchNorm in the order in which they run; "clean" where dropout is right in front of it."""
    rows: list[Row] = []
    for at, norm in enumerate(found.batchnorms):
        clean = norm.name.endswith("maps.0") and bool(norm.sources)
        gap = norm.theory_gap
        rows.append({
            "table": "batchnorms", "at": at, "name": norm.name, "dropout_right_before": clean,
            "k_squared": norm.ratio, "k_squared_error": norm.error, "theory": norm.theory,
            "gap": gap[0] if gap is not None else None, "gap_error": gap[1] if gap is not None else None,
            "running_over_real": norm.running,
        })  # fmt: skip
    return rows


def summarise(results: list[Result]) -> list[Row]:
    """Means over seeds of the errors, and how far theory is from what was measured where dropout is right in front."""
    rows = [row for result in results for row in result.rows]
    made: list[Row] = []
    for place in PLACES:
        chosen = [row for row in rows if row["table"] == "networks" and row["place"] == place]
        if not chosen:
            continue
        summary: Row = {"table": "places", "place": place, "networks": len(chosen)}
        for column in ("train_error", "test_error", "test_error_recalibrated"):
            numbers = [row[column] for row in chosen]
            summary[column] = statistics.fmean(numbers)
            if len(numbers) > 1:
                summary[f"{column}_sd"] = statistics.stdev(numbers)
        summary["gained_by_recalibration"] = summary["test_error"] - summary["test_error_recalibrated"]
        norms = [row for row in rows if row["table"] == "batchnorms" and row["place"] == place]
        summary["largest_k"] = max((row["k_squared"] ** 0.5 for row in norms), default=None)
        made.append(summary)
    return made + _differences(rows) + _theory(rows)


def _differences(rows: list[Row]) -> list[Row]:
    """Test error with dropout in the bottlenecks less that of the others, in pairs of the same seed."""
    errors = {(row["place"], row["seed"]): row["test_error"] for row in rows if row["table"] == "networks"}
    made: list[Row] = []
    for other in ("none", "moved"):
        pairs = [e - errors[other, seed] for (place, seed), e in errors.items() if place == "bottleneck"]
        made.append({
            "table": "differences", "comparison": f"bottleneck less {other}", "points": statistics.fmean(pairs),
            "standard_error": statistics.stdev(pairs) / len(pairs) ** 0.5 if len(pairs) > 1 else None,
        })  # fmt: skip
    return made


def _theory(rows: list[Row]) -> list[Row]:
    clean = [row for row in rows if row.get("dropout_right_before") and row["gap"] is not None]
    if not clean:
        return []
    scores = [row["gap"] / row["gap_error"] for row in clean]
    return [{
        "table": "theory where dropout is right before", "batchnorms": len(clean),
        "mean_k_squared": statistics.fmean(row["k_squared"] for row in clean),
        "mean_theory": statistics.fmean(row["theory"] for row in clean),
        "measured_over_theory": statistics.fmean(row["k_squared"] / row["theory"] for row in clean),
        "root_mean_square_of_standard_errors_off": statistics.fmean(score**2 for score in scores) ** 0.5,
        "most_standard_errors_off": max(map(abs, scores)),
    }]  # fmt: skip


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """k at every BatchNorm, theory as crosses; test error as trained and with its statistics estimated again."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows]
    drawn = Figure(figsize=(9, 3.4), layout="constrained")
    shift, errors = drawn.subplots(1, 2, width_ratios=[2, 1])
    for color, place in enumerate(PLACES):
        norms = [row for row in rows if row["table"] == "batchnorms" and row["place"] == place]
        points = sorted({row["at"] for row in norms})
        means = [statistics.fmean(r["k_squared"] ** 0.5 for r in norms if r["at"] == at) for at in points]
        shift.plot(points, means, "o-", color=f"C{color}", label=NAMES[place], markersize=4)
        theory: dict[int, list[float]] = {}
        for row in norms:
            if row["dropout_right_before"] and row["theory"] is not None:
                theory.setdefault(row["at"], []).append(row["theory"] ** 0.5)
        if theory:
            shift.plot(list(theory), [statistics.fmean(v) for v in theory.values()], "x", color="k", label="theory")
    shift.axhline(1, color="C7", linewidth=0.7)
    shift.set(xlabel="BatchNorm, in the order in which they run", ylabel="k")
    shift.legend(fontsize="small")
    places = [row for row in summarise(results) if row["table"] == "places"]
    for offset, column, shade in ((-0.2, "test_error", "C7"), (0.2, "test_error_recalibrated", "C2")):
        heights: list[Any] = [row[column] for row in places]
        spread = [row.get(f"{column}_sd", 0.0) for row in places]
        label = "as trained" if column == "test_error" else "statistics again, without noise"
        errors.bar([i + offset for i in range(len(places))], heights, 0.4, yerr=spread, color=shade, label=label)
    errors.set_xticks(range(len(places)), [NAMES[row["place"]] for row in places], rotation=15, fontsize="small")
    errors.set(ylabel="test error, %")
    errors.margins(y=0.3)
    errors.legend(fontsize="x-small", loc="upper left")
    return drawn


EXPERIMENT = Experiment(
    name="variance-shift",
    summary="Dropout against BatchNorm: the shift of variance by theory and measured, and what it costs.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("batchnorms",),
)
