"""Stochastic depth: residual branches that are left out more often the deeper they are, and cost nothing then."""

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

NONE, DEEPER, UNIFORM = "none", "DropPath, deeper more often", "DropPath, all alike"
SIZE: dict[str, Config] = {  # a deeper network than DropBlock's; at scale gpu the paper's, of 110 layers
    "smoke": {},
    "cpu": {"depth": 3},
    "gpu": {"depth": 18, "width": 16},
}
COMPUTED = "DropPath, deeper more often, computed and then dropped"


def cells(scale: str) -> list[Config]:
    """All methods of a seed before the next seed, then the time of a step; ``rate`` is that of the last block."""
    seeds, rates = (1, (0.5,)) if scale == "smoke" else (3, (0.2, 0.5))
    methods = [(NONE, 0.0), *((DEEPER, rate) for rate in rates), (UNIFORM, 0.5)]
    base = {**_cifar.BASE[scale], **SIZE[scale]}
    trained = [
        {**base, "method": method, "rate": rate, "seed": seed} for seed in range(seeds) for method, rate in methods
    ]
    return [*trained, {**base, "rounds": 2 if scale == "smoke" else 100, "rate": 0.5, "seed": 0}]


def drop_rates(config: Config) -> list[float] | None:
    """The rate of every block: (l / L) (1 − p_L) by the paper's rule, or the mean of these everywhere."""
    blocks = _cifar.GROUPS * config["depth"]
    deeper = [1 - survival for survival in vd.layers.survival_rates(blocks, last=1 - config["rate"])]
    if config["method"] == NONE:
        return None
    return [sum(deeper) / blocks] * blocks if config["method"] == UNIFORM else deeper


def build(channels: int, config: Config) -> nn.Sequential:
    """The network of a method; examples of a batch drop branches independently of each other."""
    return _cifar.resnet(channels, config, path=drop_rates(config), skip=config["method"] != COMPUTED)


def run_cell(config: Config) -> list[Row]:
    """Train a network, or time a step of every method."""
    if "rounds" in config:
        return _cifar.step_times(config, build, (NONE, DEEPER, UNIFORM, COMPUTED))
    return _cifar.run_cell(config, build)


def compared(found: _cifar_summary.Networks) -> list[_cifar_summary.Pair]:
    """Both rules against no noise; then against each other, with equally many blocks dropped."""
    alike = [cell for cell in found if cell.method == UNIFORM]
    return [
        *_cifar_summary.at_chosen_rates(found, [(NONE, DEEPER), (NONE, UNIFORM)]),
        *(("same on average", cell, _cifar_summary.Cell(DEEPER, cell.rate)) for cell in alike),
    ]


def summarise(results: list[Result]) -> list[Row]:
    """Means over seeds, and the differences that the paper's claims are about."""
    return _cifar_summary.summarise(results, compared)


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Curves, test errors and differences."""
    return _cifar_summary.figure(results, claims, summarise(results), "probability to drop the last block")


EXPERIMENT = Experiment(
    name="droppath",
    summary="Stochastic depth on CIFAR-10 with few images: branches of residual blocks left out, errors and time.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("curves",),
    alone=lambda config: "rounds" in config,
)
