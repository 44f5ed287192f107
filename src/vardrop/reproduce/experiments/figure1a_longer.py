"""The networks of `figure1a` with three times the epochs: its best epochs are often its last ones.

What was asked of `figure1a`, and only that, is asked again: the same networks, rows, seeds and choice of the epoch on
validation rows. It was written after the test errors of `figure1a` were known; what said that training had ended early
is the choice of the epoch, by validation rows, in networks of every method that learns its rates by type A.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from vardrop.reproduce.experiment import Config, Experiment
from vardrop.reproduce.experiments import _figure1, _figure1_summary, figure1a

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

TIMES = 3
WIDTHS = (100, 340)  # at scale cpu; the time for wider ones grows with their square


def cells(scale: str) -> list[Config]:
    """The cells of `figure1a` that its figure compares, with three times the epochs; at scale cpu the narrow ones."""
    compared = [cell for cell in figure1a.cells(scale) if _figure1.is_compared(cell)]
    some = [cell for cell in compared if scale != "cpu" or cell["width"] in WIDTHS]
    return [{**cell, "epochs": TIMES * cell["epochs"]} for cell in some]


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Test error against hidden units per layer, and the learned rates."""
    title = f"MNIST, three hidden layers, {TIMES} times the epochs"
    return _figure1_summary.draw(results, "width", "hidden units per layer", title)


EXPERIMENT = Experiment(
    name="figure1a-longer",
    summary="The networks of figure1a with three times the epochs.",
    cells=cells,
    run_cell=figure1a.run_cell,
    summarise=partial(_figure1_summary.summarise, size="width"),
    figure=figure,
    figure_only=("networks",),
)
