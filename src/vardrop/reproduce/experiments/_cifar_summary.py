"""What several networks of several seeds show: the rate that validation chooses, and differences of pairs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from vardrop.reproduce.experiment import Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

_SIGNS = {"at most": "≤", "at least": "≥", "about": "≈"}
ERRORS = ("train_error", "validation_error", "test_error")


class Cell(NamedTuple):
    """A method with a rate, in any number of seeds."""

    method: str
    rate: float


Networks = dict[Cell, dict[int, Row]]  # seed -> the row of its errors
Pair = tuple[str, Cell, Cell]  # in which way rates correspond, one, the other that is taken from it


def networks(results: Iterable[Result]) -> Networks:
    """Method and rate -> seed -> the row of its errors, in the order of the results."""
    found: Networks = {}
    for row in _rows(results, "networks"):
        found.setdefault(Cell(row["method"], row["rate"]), {})[row["seed"]] = row
    return found


def chosen(found: Networks) -> dict[str, Cell]:
    """Method -> its rate with the lowest mean validation error; the test images have no say."""
    best: dict[str, Cell] = {}
    for cell, seeds in found.items():
        now = best.get(cell.method)
        if now is None or _mean(seeds, "validation_error") < _mean(found[now], "validation_error"):
            best[cell.method] = cell
    return best


def at_chosen_rates(found: Networks, methods: Iterable[tuple[str, str]]) -> list[Pair]:
    """Pairs of methods, each at the rate that validation chose."""
    best = chosen(found)
    return [("chosen", best[a], best[b]) for a, b in methods if a in best and b in best]


def difference(found: Networks, one: Cell, other: Cell) -> Row:
    """By how many points the test error of one is above the other's, seed by seed."""
    seeds = sorted(set(found[one]) & set(found[other]))
    points = [found[one][seed]["test_error"] - found[other][seed]["test_error"] for seed in seeds]
    return {
        "difference": statistics.mean(points),
        "standard_error": standard_error(points),
        "seeds": len(points),
        "seeds_above_0": sum(point > 0 for point in points),
    }


def standard_error(values: Sequence[float]) -> float | None:
    """Of the mean; None for a single value."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def summarise(results: list[Result], compared: Callable[[Networks], Iterable[Pair]]) -> list[Row]:
    """Means over seeds (table ``rates``) and differences (table ``pairs``).

    Args:
        results: of one experiment at one scale.
        compared: all networks -> what to compare, where there are results of both.
    """
    found = networks(results)
    best = chosen(found)
    rows: list[Row] = [
        {
            "table": "rates",
            **cell._asdict(),
            "seeds": len(seeds),
            **{error: _mean(seeds, error) for error in ERRORS},
            "standard_error": standard_error([row["test_error"] for row in seeds.values()]),
            "chosen": best[cell.method] == cell,
        }
        for cell, seeds in found.items()
    ]
    for which, a, b in compared(found):
        if set(found.get(a, ())) & set(found.get(b, ())):
            names: Row = {"method": a.method, "rate": a.rate, "minus": b.method, "its_rate": b.rate}
            rows.append({"table": "pairs", "rates": which, **names, **difference(found, a, b)})
    return rows


def figure(results: list[Result], claims: list[Claim], summary: list[Row], xlabel: str) -> Figure:
    """Curves at the chosen rates, the test error at every rate, and the differences that claims are about."""
    from matplotlib.figure import Figure

    found = networks(results)
    best = chosen(found)
    colours = {method: f"C{i}" for i, method in enumerate(best)}
    curves = list(_rows(results, "curves"))
    drawn = Figure(figsize=(14, 3.8), layout="constrained")
    losses, errors, rates, differences = drawn.subplots(1, 4, width_ratios=(3, 3, 3, 3.4))
    for method, cell in best.items():
        points = [row for row in curves if (row["method"], row["rate"]) == cell]
        epochs = sorted({row["epoch"] for row in points})
        for axes, column in ((losses, "train_loss"), (errors, "validation_error")):
            means = [statistics.mean(row[column] for row in points if row["epoch"] == epoch) for epoch in epochs]
            axes.plot(epochs, means, color=colours[method], label=_label(method, cell.rate))
    losses.set(title="training loss, with noise", xlabel="epoch", yscale="log")
    errors.set(title="validation error, %", xlabel="epoch")
    losses.legend(fontsize="x-small")
    for cell, seeds in found.items():
        tested = [row["test_error"] for row in seeds.values()]
        shade = {"color": colours[cell.method], "alpha": 0.35, "markersize": 4}
        rates.plot([cell.rate] * len(tested), tested, "o", **shade)
    for method, colour in colours.items():
        line = sorted((cell.rate, _mean(seeds, "test_error")) for cell, seeds in found.items() if cell.method == method)
        rates.plot(*zip(*line, strict=True), "o-" if len(line) > 1 else "D", color=colour)
        if line[0][0] == 0:
            rates.axhline(line[0][1], color=colour, linewidth=0.8, linestyle=":")
    rates.set(title="test error, %", xlabel=xlabel)
    _draw_differences(differences, claims, [row for row in summary if row["table"] == "pairs"])
    return drawn


def _draw_differences(axes, claims: list[Claim], pairs: list[Row]) -> None:  # type: ignore[no-untyped-def]
    """Our differences with two standard errors either side, and what claims say about them."""
    for place, row in enumerate(pairs):
        axes.errorbar(
            row["difference"], place, xerr=2 * (row["standard_error"] or 0), fmt="ko", markersize=4, capsize=3
        )
        for claim in claims:
            if claim.select.items() <= row.items():
                label = f"{_SIGNS[claim.relation]} {claim.target:g}"
                axes.plot(claim.target, place, "D", color="C3", markersize=5)
                axes.annotate(label, (claim.target, place), (0, 5), textcoords="offset points", fontsize="x-small")
    axes.axvline(0, color="C7", linewidth=0.8)
    names = [f"{_label(row['method'], row['rate'])} − {_label(row['minus'], row['its_rate'])}" for row in pairs]
    axes.set_yticks(range(len(pairs)), names, fontsize="x-small")
    axes.invert_yaxis()
    axes.set(title="difference, points ± 2 s.e.")
    axes.set_xlabel("test error; red: what claims ask")


def _label(method: str, rate: float) -> str:
    return f"{method} {rate:g}" if rate else method


def _rows(results: Iterable[Result], table: str) -> Iterable[Row]:
    return (row for result in results for row in result.rows if row["table"] == table)


def _mean(seeds: dict[int, Row], column: str) -> float:
    return statistics.mean(row[column] for row in seeds.values())
