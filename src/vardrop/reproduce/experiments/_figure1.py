"""The networks of the paper's figure 1: the seven methods at any size, and other readings of type B's divergence."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.methods import METHODS, RATES, prepare
from vardrop.models import build
from vardrop.reproduce.experiment import Config, Row
from vardrop.reproduce.experiments._together import fit_together
from vardrop.reproduce.experiments._training import Best, Parts, Plan, fit, learned_rates, parts, take
from vardrop.training.evaluation import evaluate
from vardrop.training.task import Task
from vardrop.weights.geometry import Geometry

COMPARED = tuple(
    (method, METHODS[method].default_sharing)
    for method in ("none", "binary", "gaussian-a", "gaussian-b", "vd-a", "vd-a2", "vd-b")
)
ONCE_PER_RATE = "once per rate"
READINGS = ("a third", ONCE_PER_RATE)  # of the divergence of type B, whose α all but run into their bound of 1


@dataclass(frozen=True)
class OncePerRate(vd.VariationalDropout):
    """Variational dropout whose divergence counts once for every α, however many weights share it."""

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        """That of the weights over the number of weights that share an α."""
        return super().kl(weight, noise, geometry) * (noise.numel() / math.prod(geometry.shape))


def prepared(config: Config, spec: str, shape: tuple[int, ...], outputs: int) -> tuple[nn.Module, float]:
    """A network with its noise, and the weight of its divergence.

    Args:
        config: method, sharing and perhaps reading, one of :data:`READINGS`.
        spec: for :func:`vardrop.models.build`.
        shape: of one example.
        outputs: of the network.
    """
    reading = config.get("reading")
    if reading == ONCE_PER_RATE:
        model = build(spec, shape, outputs, RATES)
        vd.convert_(model, OncePerRate(type="B", sharing=config["sharing"]))
        return model, 1.0
    model, kl_scale, _ = prepare(config["method"], spec, shape, outputs, config["sharing"])
    return model, kl_scale / 3 if reading == "a third" else kl_scale


def networks(config: Config, spec: str, size: str, layers: tuple[str, ...]) -> list[Row]:
    """Train networks that differ in their seed, several in one step; test each where its validation error was smallest.

    Args:
        config: data, standardise, validation, epochs, batch, lr, average, device, the size, the first of the seeds,
            how many of them, and what :func:`prepared` takes. A seed decides the weights, the noise, the order of the
            rows and the rows that are kept back.
        spec: for :func:`vardrop.models.build`.
        size: the name of the column with the size.
        layers: what the inputs of every layer are called.
    """
    device = config["device"]
    seeds = range(config["seed"], config["seed"] + config["seeds"])
    standardise = config.get("standardise", False)
    some = [parts(config["data"], config["validation"], seed, device, standardise=standardise) for seed in seeds]
    plan = Plan(config["epochs"], config["batch"], config["lr"], config["average"])
    models = []
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        for seed in seeds:
            torch.manual_seed(seed)
            model, kl_scale = prepared(config, spec, some[0].data.shape, some[0].data.outputs)
            models.append(model.to(device))
        if len(seeds) == 1:
            trained = [fit(models[0], kl_scale, some[0], plan, seeds[0])]
        else:
            trained = fit_together(models, kl_scale, some, plan, seeds)
    return [
        _row(config, seed, part, found, size, layers) for seed, part, found in zip(seeds, some, trained, strict=True)
    ]


def _row(
    config: Config,
    seed: int,
    some: Parts,
    trained: tuple[Task, dict[str, Best], float],
    size: str,
    layers: tuple[str, ...],
) -> Row:
    task, best, seconds = trained
    take(task, best["error"])
    train, test = evaluate(task, task, *some.train), evaluate(task, task, *some.test)
    row: Row = {
        "table": "networks", "method": config["method"], "sharing": config["sharing"],
        "reading": config.get("reading"), size: config[size], "seed": seed,
        "test_error": 100 * test.mistake, "test_nll": test.nll,
        "validation_error": 100 * best["error"].scores.mistake, "train_error": 100 * train.mistake,
        "train_nll": train.nll, "best_epoch": best["error"].epoch, "seconds": round(seconds, 1),
    }  # fmt: skip
    learned = learned_rates(task.network) if config["sharing"] else [(None, None)] * len(layers)
    for layer, (rate, at_bound) in zip(layers, learned, strict=True):
        row[f"rate_{layer}"], row[f"at_bound_{layer}"] = rate, at_bound
    return row


def is_compared(row: Row) -> bool:
    """Whether a row is of the figure; the others are an ablation."""
    return row["sharing"] == METHODS[row["method"]].default_sharing and row.get("reading") is None
