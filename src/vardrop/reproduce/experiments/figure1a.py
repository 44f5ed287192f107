"""Test error on MNIST against the width of the network, for fixed and for learned dropout (the paper's figure 1a)."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments import _figure1, _figure1_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

LAYERS = ("input", "hidden1", "hidden2", "hidden3")  # where the noise of a layer is
ABLATION = (("vd-a", "layer"), ("vd-a2", "layer"), ("vd-b", "layer"), ("vd-b", "weight"))
READINGS = tuple(("vd-b", "neuron", reading) for reading in _figure1.READINGS)
NEAREST = (("vd-b", "neuron", _figure1.ONCE_PER_RATE),)  # the reading of type B that reproduces the narrow network
WIDTHS = (100, 340, 580, 820, 1060, 1300)  # of the paper


def cells(scale: str) -> list[Config]:
    """A cell for every network, from narrow to wide; at scales smoke and gpu the seeds of a network are one cell."""
    shared: Config = {
        "smoke": {"data": "digits", "validation": 200, "epochs": 2, "batch": 64, "device": "cpu", "seeds": 2},
        "cpu": {"data": "mnist", "validation": 10_000, "epochs": 25, "batch": 256, "device": "cpu", "seeds": 1},
        "gpu": {"data": "mnist", "validation": 10_000, "epochs": 100, "batch": 256, "device": "cuda", "seeds": 5},
    }[scale]
    shared |= {"lr": 0.01 if scale == "smoke" else 0.001, "average": 0.999}  # Adam's default, but for the smoke
    others = ABLATION + READINGS
    narrow, *wider = {"smoke": (8, 16), "cpu": WIDTHS[:3], "gpu": WIDTHS}[scale]
    networks: list[tuple[int, tuple[Any, ...]]] = [
        (narrow, _figure1.COMPARED),
        (wider[0], _figure1.COMPARED),
        (narrow, others),
    ]
    networks += [(width, _figure1.COMPARED) for width in wider[1:]]
    networks += [(wider[0], others if scale == "gpu" else NEAREST)]
    networks += [(width, NEAREST) for width in wider[1:]]
    return [
        {"method": method, "sharing": sharing, "width": width, "seed": seed, **shared}
        | ({"reading": reading[0]} if reading else {})
        for width, group in networks
        for seed in range({"smoke": 1, "cpu": 3, "gpu": 1}[scale])
        for method, sharing, *reading in group
    ]


def run_cell(config: Config) -> list[Row]:
    """Train networks that differ in their seed, and test each where its validation error was smallest."""
    return _figure1.networks(config, f"mlp:3x{config['width']}", "width", LAYERS)


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Test error against hidden units per layer, and the learned rates."""
    return _figure1_summary.draw(results, "width", "hidden units per layer", "MNIST, three hidden layers")


EXPERIMENT = Experiment(
    name="figure1a",
    summary="MNIST: test error against hidden units per layer, fixed dropout against learned rates.",
    cells=cells,
    run_cell=run_cell,
    summarise=partial(_figure1_summary.summarise, size="width"),
    figure=figure,
    figure_only=("networks",),
)
