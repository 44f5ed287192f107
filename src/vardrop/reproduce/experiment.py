"""What an experiment is, and the cells that it is run in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

SCALES = ("smoke", "cpu", "gpu")  # shows that it runs; a desk machine; the paper's own size
Config = dict[str, Any]  # what a cell is run with: JSON values
Row = dict[str, Any]  # column -> text, number, bool or None


@dataclass(frozen=True)
class Experiment:
    """One experiment of a paper. To add one: a file with an ``EXPERIMENT``, and a line in ``experiments/__init__.py``.

    Args:
        name: as on the command line.
        summary: what it shows, in a sentence.
        cells: scale -> the configurations to run, each by itself, so that a long experiment can be resumed.
        run_cell: configuration -> rows. A row carries every column that a claim selects it by. One that takes hours
            keeps what it has done with :mod:`vardrop.reproduce.unfinished`.
        summarise: results -> further rows, computed from JSON when it is read, such as means over seeds.
        figure: results and the claims about them -> a figure.
        figure_only: values of the column ``table`` whose rows are for the figure, too many to print.
        alone: whether its cells measure time, so that nothing may run beside them: True, or a function of a
            configuration where only some do.

    Example:
        >>> two = Experiment(
        ...     name="two",
        ...     summary="One plus one.",
        ...     cells=lambda scale: [{"a": 1}],
        ...     run_cell=lambda config: [{"sum": config["a"] + 1}],
        ... )
        >>> [two.run_cell(cell.config) for cell in two.at("smoke")]
        [[{'sum': 2}]]
    """

    name: str
    summary: str
    cells: Callable[[str], list[Config]]
    run_cell: Callable[[Config], list[Row]]
    summarise: Callable[[list[Result]], list[Row]] | None = None
    figure: Callable[[list[Result], list[Claim]], Figure] | None = None
    figure_only: tuple[str, ...] = ()
    alone: bool | Callable[[Config], bool] = False

    def runs_alone(self, config: Config) -> bool:
        """Whether nothing may run beside the cell of a configuration."""
        return self.alone(config) if callable(self.alone) else self.alone

    def at(self, scale: str) -> list[Cell]:
        """The cells at a scale.

        Raises:
            ValueError: for an unknown scale, or if two cells are the same.
        """
        if scale not in SCALES:
            raise ValueError(f"vardrop.reproduce: scale must be one of {', '.join(SCALES)}, got {scale!r}")
        cells = [Cell(self.name, scale, config) for config in self.cells(scale)]
        if len({cell.key for cell in cells}) < len(cells):
            raise ValueError(
                f"vardrop.reproduce: the cells of an experiment must differ, got two of {self.name!r} at scale {scale} "
                "with the same configuration; give them different seeds"
            )
        return cells

    def rows(self, results: list[Result]) -> list[Row]:
        """All rows of the given results of this experiment, and what is summarised from them."""
        rows = [row for result in results for row in result.rows]
        return rows + (self.summarise(results) if self.summarise and results else [])


@dataclass(frozen=True)
class Cell:
    """One configuration of an experiment at a scale: what is run, saved and skipped as a whole."""

    experiment: str
    scale: str
    config: Config

    @property
    def key(self) -> str:
        """A name for the file: the same for the same experiment, scale and configuration, in any order of its keys."""
        identity = json.dumps([self.experiment, self.scale, self.config], sort_keys=True, allow_nan=False)
        return hashlib.sha256(identity.encode()).hexdigest()[:12]

    def path(self, root: Path) -> Path:
        """Where the result is kept."""
        return root / self.experiment / self.scale / f"{self.key}.json"
