"""DropBlock against plain dropout on feature maps, and a rate that grows against one that is there from the start."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

import vardrop as vd
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments import _cifar, _cifar_summary

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

NONE, DROPOUT, FIXED, SCHEDULED = "none", "Dropout", "DropBlock, fixed", "DropBlock, scheduled"
BLOCK = {"smoke": 3, "cpu": 3, "gpu": 7}  # of maps of 4 and 2, of 8 and 4, of 16 and 8 a side


def cells(scale: str) -> list[Config]:
    """All methods of a seed before the next seed, then the time of a step."""
    seeds, rates = 1 if scale == "smoke" else 3, (0.1, 0.2)
    methods = [(NONE, 0.0), *((method, rate) for rate in rates for method in (DROPOUT, FIXED, SCHEDULED))]
    base = {**_cifar.BASE[scale], "block": BLOCK[scale]}
    trained = [
        {**base, "method": method, "rate": rate, "seed": seed} for seed in range(seeds) for method, rate in methods
    ]
    return [*trained, {**base, "rounds": 2 if scale == "smoke" else 100, "rate": rates[-1], "seed": 0}]


def build(channels: int, config: Config) -> nn.Sequential:
    """The network of a method. A scheduled rate grows linearly from 0 over the whole training, as in the paper."""
    method, rate = config["method"], config["rate"]

    def noise() -> nn.Module:
        if method == DROPOUT:
            return vd.layers.Dropout(rate)
        ramp = vd.rates.linear(0.0, rate, steps=_cifar.steps(config)) if method == SCHEDULED else rate
        return vd.layers.DropBlock2d(ramp, block_size=config["block"])

    return _cifar.resnet(channels, config, noise=None if method == NONE else noise)


def run_cell(config: Config) -> list[Row]:
    """Train a network, or time a step of every method."""
    if "rounds" in config:
        return _cifar.step_times(config, build, (NONE, DROPOUT, FIXED))
    return _cifar.run_cell(config, build)


def compared(found: _cifar_summary.Networks) -> list[_cifar_summary.Pair]:
    """Methods at their best; then fixed against scheduled with the same rate in the end, and on average."""
    methods = [(NONE, DROPOUT), (NONE, FIXED), (NONE, SCHEDULED), (DROPOUT, FIXED), (DROPOUT, SCHEDULED)]
    fixed = [cell for cell in found if cell.method == FIXED]
    return [
        *_cifar_summary.at_chosen_rates(found, methods),
        *(("same in the end", cell, _cifar_summary.Cell(SCHEDULED, cell.rate)) for cell in fixed),
        *(("same on average", cell, _cifar_summary.Cell(SCHEDULED, 2 * cell.rate)) for cell in fixed),
    ]


def summarise(results: list[Result]) -> list[Row]:
    """Means over seeds, and the differences that the paper's claims are about."""
    return _cifar_summary.summarise(results, compared)


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Curves, test errors and differences."""
    return _cifar_summary.figure(results, claims, summarise(results), "rate (of a schedule: at its end)")


EXPERIMENT = Experiment(
    name="dropblock",
    summary="No noise, Dropout and DropBlock, fixed and scheduled, behind the convolutions of a small ResNet: "
    "CIFAR-10 with few images.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("curves",),
)
