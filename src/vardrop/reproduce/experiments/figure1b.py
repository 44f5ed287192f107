"""Test error on CIFAR-10 against the width of a convolutional network, fixed and learned dropout (figure 1b).

Two convolutions of 5 x 5, stride 2, with 32k and 64k maps, and two layers of 128k units, softplus (see
:mod:`vardrop.models`: the paper names neither kernel nor padding). Fixed dropout stands in front of the three linear
layers at 0.5; learned rates are everywhere, those of the convolutions start at 0.2. Images are standardised. The data
are a JPEG re-encoding where the original archive is not there.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments import _figure1, _figure1_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

LAYERS = ("input", "hidden1", "hidden2", "hidden3", "hidden4")  # the image, the maps of both convolutions, the units


def cells(scale: str) -> list[Config]:
    """A cell for every network, from narrow to wide; at scales smoke and gpu the seeds of a network are one cell."""
    shared: Config = {
        "smoke": {"data": "digits", "validation": 200, "epochs": 2, "batch": 64, "device": "cpu", "seeds": 2},
        "cpu": {"data": "cifar10", "validation": 5000, "epochs": 20, "batch": 256, "device": "cpu", "seeds": 1},
        "gpu": {"data": "cifar10", "validation": 5000, "epochs": 100, "batch": 256, "device": "cuda", "seeds": 5},
    }[scale]
    shared |= {"lr": 0.01 if scale == "smoke" else 0.001, "average": 0.999, "standardise": True}
    sizes: dict[float, int] = {  # k -> cells that differ in their seed
        "smoke": {0.05: 1, 0.1: 1},
        "cpu": {0.25: 3, 0.5: 3, 1.0: 3},
        "gpu": dict.fromkeys((0.25, 0.5, 1.0, 2.0, 4.0), 1),
    }[scale]
    return [
        {"method": method, "sharing": sharing, "k": k, "seed": seed, **shared}
        for k, seeds in sizes.items()
        for seed in range(seeds)
        for method, sharing in _figure1.COMPARED
    ]


def run_cell(config: Config) -> list[Row]:
    """Train networks that differ in their seed, and test each where its validation error was smallest."""
    return _figure1.networks(config, f"conv:{config['k']:g}", "k", LAYERS)


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Test error against k, and the learned rates."""
    return _figure1_summary.draw(results, "k", "k, width of the network", "CIFAR-10, two convolutions and two layers")


EXPERIMENT = Experiment(
    name="figure1b",
    summary="CIFAR-10: test error against the width of a convolutional network, fixed dropout against learned rates.",
    cells=cells,
    run_cell=run_cell,
    summarise=partial(_figure1_summary.summarise, size="k"),
    figure=figure,
    figure_only=("networks",),
)
