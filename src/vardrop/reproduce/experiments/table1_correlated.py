"""Table 1 for correlated weight noise (type A; the paper's appendix E).

With a factor for every input unit, the local trick draws a factor for every input unit and every data point. That is a
weight sample for every data point, so the two rows of the table are one: equal by construction, not by measurement.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments import _table1 as measured
from vardrop.reproduce.experiments import table1

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result


def cells(scale: str) -> list[Config]:
    """The network that the claims of `table1` are about, with every seed that it has there."""
    its = table1.cells(scale)
    of_it = [cell for cell in its if measured.network_of(cell) == measured.network_of(its[0])]
    return [{**cell, "method": "vd-a", "sharing": "neuron"} for cell in of_it]


def summarise(results: list[Result]) -> list[Row]:
    """The table, and the ratios to the local trick's variance."""
    main = _main(results)
    rows = table1.numbers(main, {})
    for (layer, epochs), found in main.items():
        ours = measured.mean(found)
        rows.append({
            "table": "ratios", "layer": layer, "epochs": epochs,
            "per_minibatch_to_local": ours["per_minibatch"] / ours["local"],
            "none_to_local": ours["none"] / ours["local"],
        })  # fmt: skip
    return rows + table1.errors(results)


def _main(results: list[Result]) -> dict[measured.Column, list[dict[str, float]]]:
    return measured.columns(results, measured.network_of(results[0].config), *table1.READING)


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Our variances, a panel for every layer and number of epochs."""
    return table1.draw(_main(results), {})


EXPERIMENT = Experiment(
    name="table1-correlated",
    summary="The variance of the minibatch gradient under every estimator, for correlated weight noise.",
    cells=cells,
    run_cell=measured.run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("variances",),
)
