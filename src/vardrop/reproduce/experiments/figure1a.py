"""Test error on MNIST against the width of the network, for fixed and for learned dropout (the paper's figure 1a)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from vardrop.methods import METHODS, prepare
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments._training import Plan, fit, learned_rates, parts, take
from vardrop.training.evaluation import evaluate

LAYERS = ("input", "hidden1", "hidden2", "hidden3")  # where the noise of a layer is
COMPARED = ("none", "binary", "gaussian-a", "gaussian-b", "vd-a", "vd-a2", "vd-b")
ABLATION = (("vd-a", "layer"), ("vd-a2", "layer"), ("vd-b", "layer"), ("vd-b", "weight"))
WIDTHS = (100, 340, 580, 820, 1060, 1300)  # of the paper


def cells(scale: str) -> list[Config]:
    """A cell for every network, from narrow to wide; at scale gpu the seeds of a network are one cell."""
    shared: Config = {
        "smoke": {"data": "digits", "validation": 200, "epochs": 3, "batch": 64, "device": "cpu", "seeds": 1},
        "cpu": {"data": "mnist", "validation": 10_000, "epochs": 25, "batch": 256, "device": "cpu", "seeds": 1},
        "gpu": {"data": "mnist", "validation": 10_000, "epochs": 100, "batch": 256, "device": "cuda", "seeds": 5},
    }[scale]
    shared |= {"lr": 0.01 if scale == "smoke" else 0.001, "average": 0.999}  # Adam's default, but for the smoke
    narrow, *wider = {"smoke": (8, 16), "cpu": WIDTHS[:3], "gpu": WIDTHS}[scale]
    compared = [(method, METHODS[method].default_sharing) for method in COMPARED]
    networks = [(narrow, compared), (wider[0], compared), (narrow, ABLATION), (wider[0], ABLATION)]
    networks += [(width, compared) for width in wider[1:]]
    return [
        {"method": method, "sharing": sharing, "width": width, "seed": seed, **shared}
        for width, group in networks
        for seed in range({"smoke": 2, "cpu": 3, "gpu": 1}[scale])
        for method, sharing in group
    ]


def run_cell(config: Config) -> list[Row]:
    """Train networks that differ in their seed, and test each where its validation error was smallest."""
    return [_network(config, config["seed"] + i) for i in range(config["seeds"])]


def _network(config: Config, seed: int) -> Row:
    device = config["device"]
    some = parts(config["data"], config["validation"], seed, device)
    plan = Plan(config["epochs"], config["batch"], config["lr"], config["average"])
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        torch.manual_seed(seed)
        network, kl_scale, _ = prepare(
            config["method"], f"mlp:3x{config['width']}", some.data.shape, some.data.outputs, config["sharing"]
        )
        task, best, seconds = fit(network.to(device), kl_scale, some, plan, seed)
    take(task, best["error"])
    train, test = evaluate(task, task, *some.train), evaluate(task, task, *some.test)
    learned = learned_rates(task.network) if config["sharing"] else []
    row: Row = {
        "table": "networks", "method": config["method"], "sharing": config["sharing"], "width": config["width"],
        "seed": seed, "test_error": 100 * test.mistake, "test_nll": test.nll,
        "validation_error": 100 * best["error"].scores.mistake, "train_error": 100 * train.mistake,
        "train_nll": train.nll, "best_epoch": best["error"].epoch, "seconds": round(seconds, 1),
    }  # fmt: skip
    for i, layer in enumerate(LAYERS):
        row[f"rate_{layer}"], row[f"at_bound_{layer}"] = learned[i] if learned else (None, None)
    return row


EXPERIMENT = Experiment(
    name="figure1a",
    summary="MNIST: test error against hidden units per layer, fixed dropout against learned rates.",
    cells=cells,
    run_cell=run_cell,
)
