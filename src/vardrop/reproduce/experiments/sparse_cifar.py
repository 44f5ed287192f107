"""Sparse variational dropout against magnitude pruning: a residual network on CIFAR-10, both at the same sparsities.

Both begin with the same trained network. One side removes the weights of least magnitude, of all layers together, the
other those of largest log α after a training with sparse variational dropout. Both are then trained further with their
zeros kept (for as long, on the same schedule), and the dense network is trained further for as long as sparse
variational dropout was, so that no side has seen the images more often.
"""

from __future__ import annotations

import copy
import statistics
import time
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments import _cifar
from vardrop.weights.modules import noisy_weights, weight_axes

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

DENSE, MAGNITUDE, SPARSE = "dense", "magnitude pruning", "sparse variational dropout"
SIZE: dict[str, Config] = {
    "smoke": {"sparse_epochs": 2, "warmup": 1, "finetune_epochs": 1, "sparsities": [0.95, 0.98]},
    "cpu": {"sparse_epochs": 40, "warmup": 10, "finetune_epochs": 10, "sparsities": [0.8, 0.9, 0.95, 0.98]},
    "gpu": {"sparse_epochs": 100, "warmup": 30, "finetune_epochs": 30, "sparsities": [0.8, 0.9, 0.95, 0.98, 0.99]},
}
LR, NOISE_LR = 1e-3, 3e-3


def cells(scale: str) -> list[Config]:
    """One for every seed: all methods begin with the same network."""
    seeds = 1 if scale == "smoke" else 3
    return [{**_cifar.BASE[scale], **SIZE[scale], "method": DENSE, "rate": 0.0, "seed": seed} for seed in range(seeds)]


def weights(model: nn.Module) -> list[nn.Parameter]:
    """Of convolutions and linear layers, in the order of the model."""
    return [m._parameters["weight"] for m in model.modules() if "weight" in weight_axes(m)]  # type: ignore[misc]


def sparsity(model: nn.Module) -> float:
    """The part of these weights that is zero."""
    found = weights(model)
    return sum(int((w == 0).sum()) for w in found) / sum(w.numel() for w in found)


def prune_by_magnitude_(model: nn.Module, target: float) -> None:
    """Set the smallest weights of all layers together to zero (Han et al. 2015, with one threshold for all)."""
    found = weights(model)
    magnitudes = torch.cat([w.detach().abs().flatten() for w in found])
    threshold = magnitudes.kthvalue(max(1, round(target * len(magnitudes)))).values
    with torch.no_grad():
        for w in found:
            w[w.abs() <= threshold] = 0.0


def further(model: nn.Module, data: _cifar.Images, config: Config, epochs: int, sparse: bool = False) -> None:
    """Train on, in place, with Adam and a learning rate that falls to zero; with noise and divergence if ``sparse``."""
    x, y = data.train
    noise = {id(weight.noise) for weight in noisy_weights(model)}
    groups = [
        {"params": [p for p in model.parameters() if id(p) not in noise], "lr": LR},
        {"params": [p for p in model.parameters() if id(p) in noise], "lr": NOISE_LR},
    ]
    adam = torch.optim.Adam([group for group in groups if group["params"]])
    steps = epochs * (len(x) // config["batch"])
    schedule = torch.optim.lr_scheduler.LinearLR(adam, 1.0, 1e-3, total_iters=steps)
    elbo = vd.ELBO(model, len(x), warmup=config["warmup"] * (len(x) // config["batch"])) if sparse else None
    order = torch.Generator().manual_seed(config["seed"])
    model.train()
    for _ in range(epochs):
        shuffled = torch.randperm(len(x), generator=order).to(x.device)
        for chosen in shuffled.split(config["batch"])[: len(x) // config["batch"]]:
            images = _cifar.augmented(x[chosen], config["crop"], order)
            with torch.autocast(config["device"], torch.bfloat16, enabled=config["bfloat16"]):
                logits = model(images)
            loss: Tensor = F.cross_entropy(logits.float(), y[chosen])
            if elbo is not None:
                loss = elbo(loss)
            adam.zero_grad(set_to_none=True)
            loss.backward()
            adam.step()
            schedule.step()


def run_cell(config: Config) -> list[Row]:
    """A row for every method and sparsity, of a network that all of them begin with."""
    data = _cifar.images(config["data"], config["train"], config["validation"], config["seed"], config["device"])
    rows: list[Row] = []

    def record(method: str, target: float, model: nn.Module, began: float, before: float | None = None) -> None:
        rows.append({
            "method": method, "target": target, "seed": config["seed"], "sparsity": sparsity(model),
            "error_before": before, "validation_error": _cifar.error(model, *data.validation, config),
            "test_error": _cifar.error(model, *data.test, config), "seconds": round(time.perf_counter() - began, 1),
        })  # fmt: skip

    with torch.random.fork_rng(devices=[0] if config["device"] == "cuda" else []):
        torch.manual_seed(config["seed"])
        began = time.perf_counter()
        start = _cifar.resnet(data.train[0].shape[1], config)
        _cifar._fit(start, data, config)
        dense, noisy = copy.deepcopy(start), copy.deepcopy(start)
        further(dense, data, config, config["sparse_epochs"])
        record(DENSE, 0.0, dense, began)
        vd.convert_(noisy, vd.SparseVariationalDropout(log_variance=-8.0))
        further(noisy, data, config, config["sparse_epochs"], sparse=True)
        by_threshold = copy.deepcopy(noisy)
        vd.sparsify_(by_threshold, threshold=3.0, allow_empty=True)
        vd.restore_(by_threshold)
        record(f"{SPARSE}, log alpha > 3, as it is", sparsity(by_threshold), by_threshold, began)
        for target in config["sparsities"]:
            for method, base in ((MAGNITUDE, dense), (SPARSE, noisy)):
                began, model = time.perf_counter(), copy.deepcopy(base)
                if method == SPARSE:
                    vd.sparsify_(model, target_sparsity=target, allow_empty=True)
                    vd.restore_(model)
                else:
                    prune_by_magnitude_(model, target)
                before = _cifar.error(model, *data.validation, config)
                with vd.finetune(model):
                    further(model, data, config, config["finetune_epochs"])
                record(method, target, model, began, before)
    return rows


def summarise(results: list[Result]) -> list[Row]:
    """Means over seeds, and magnitude pruning's test error minus ours at the same sparsity, paired by seed."""
    rows = [row for result in results for row in result.rows]
    targets = sorted({row["target"] for row in rows if row["method"] == MAGNITUDE})
    found: list[Row] = []
    for target in targets:
        errors = {
            method: {
                row["seed"]: row["test_error"] for row in rows if (row["method"], row["target"]) == (method, target)
            }
            for method in (MAGNITUDE, SPARSE)
        }
        gains = [errors[MAGNITUDE][seed] - errors[SPARSE][seed] for seed in errors[SPARSE]]
        found.append({
            "table": "means", "target": target, "seeds": len(gains),
            **{f"{method}: test error": statistics.fmean(errors[method].values()) for method in errors},
            "gain": statistics.fmean(gains),
            "standard_error": statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else None,
        })  # fmt: skip
    return found


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Test error against the part of the weights that is left."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows]
    chart = Figure(figsize=(6, 4), layout="constrained")
    axes = chart.add_subplot()
    for method, marker in ((MAGNITUDE, "s"), (SPARSE, "o")):
        targets = sorted({row["target"] for row in rows if row["method"] == method})
        errors = [[r["test_error"] for r in rows if (r["method"], r["target"]) == (method, t)] for t in targets]
        spread = [statistics.stdev(e) if len(e) > 1 else 0.0 for e in errors]
        left = [round(100 * (1 - t), 3) for t in targets]
        axes.errorbar(left, [statistics.fmean(e) for e in errors], spread, marker=marker, capsize=3, label=method)
    dense = [row["test_error"] for row in rows if row["method"] == DENSE]
    axes.axhline(statistics.fmean(dense), color="black", linestyle=":", label=DENSE)
    axes.set(xscale="log", xlabel="weights left, %", ylabel="test error, %", title="CIFAR-10, small ResNet")
    axes.set_xticks(left, [f"{share:g}" for share in left])
    axes.minorticks_off()
    axes.legend()
    return chart


EXPERIMENT = Experiment(
    name="sparse-cifar",
    summary="A small ResNet on CIFAR-10: sparse variational dropout against magnitude pruning, at the same sparsities.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
)
