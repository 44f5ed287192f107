"""What the networks of figure 1 amount to: means over seeds, learned against fixed rates, and the paper's figure."""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

from vardrop.reproduce.experiment import Row
from vardrop.reproduce.experiments._figure1 import ONCE_PER_RATE, is_compared
from vardrop.reproduce.results import Result

if TYPE_CHECKING:
    from matplotlib.figure import Figure

NAMES = {  # as in the paper's legend
    "none": "No dropout",
    "binary": "Regular binary dropout",
    "gaussian-a": "Gaussian dropout A (Srivastava et al)",
    "vd-a": "Variational dropout A",
    "vd-a2": "Variational dropout A2",
    "gaussian-b": "Gaussian dropout B (Wang et al)",
    "vd-b": "Variational dropout B",
}
_STYLES = {"none": "C7o-", "binary": "C5v-", "gaussian-a": "C0s--", "vd-a": "C0D-", "vd-a2": "C2^-",
           "gaussian-b": "C1s--", "vd-b": "C1D-"}  # fmt: skip
ONCE = f"vd-b {ONCE_PER_RATE}"  # no line of the paper's: type B under another reading of its divergence
COUNTERPARTS = {"vd-a": ("gaussian-a", "binary"), "vd-a2": ("gaussian-a", "binary"), "vd-b": ("gaussian-b", "binary"),
                ONCE: ("gaussian-b",)}  # fmt: skip
Means = dict[tuple[str, Any], Row]  # method, size -> row of means, of those that are compared


def summarise(results: list[Result], size: str) -> list[Row]:
    """Means over seeds, the gain of learned over fixed rates at every size, and the answers to the claims.

    Args:
        results: of cells whose rows have method, sharing, seed and a size.
        size: the name of the column with the size.
    """
    rows = [row for result in results for row in result.rows]
    means = _means(rows, size)
    learned = [_rates(row, size) for row in means if row["sharing"]]
    mine = {(row["method"], row[size]): row for row in means if is_compared(row)}
    once = {(ONCE, row[size]): row for row in means if row["reading"] == ONCE_PER_RATE}
    gains = _gains(mine, once, size)
    errors = [{k: v for k, v in row.items() if not k.startswith(("rate_", "at_bound_"))} for row in means]
    return errors + learned + gains + _answers(mine, gains, size)


def _rates(row: Row, size: str) -> Row:
    """Of a row of means what was learned."""
    kept = {column: value for column, value in row.items() if column.startswith(("rate_", "at_bound_"))}
    return {
        "table": "learned rates",
        **{column: row[column] for column in (size, "method", "sharing", "reading")},
        **kept,
    }


def _means(rows: list[Row], size: str) -> list[Row]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((row[size], row["method"], row["sharing"], row.get("reading")), []).append(row)
    made = []
    order = list(NAMES)
    for (at, method, sharing, reading), group in sorted(
        groups.items(), key=lambda item: (item[0][0], order.index(item[0][1]), not is_compared(item[1][0]))
    ):

        def mean(column: str, group: list[Row] = group) -> float | None:
            return None if group[0][column] is None else statistics.fmean(row[column] for row in group)

        errors = [row["test_error"] for row in group]
        spread = statistics.stdev(errors) if len(errors) > 1 else None
        row = {"table": "means", size: at, "method": method, "sharing": sharing, "reading": reading}
        row["seeds"] = len(group)
        row |= {"test_error": mean("test_error"), "sd": spread}
        row["standard_error"] = None if spread is None else spread / len(errors) ** 0.5
        others = ("test_nll", "validation_error", "train_error", "best_epoch")
        rates = [column for column in group[0] if column.startswith(("rate_", "at_bound_"))]
        made.append(row | {column: mean(column) for column in (*others, *rates)})
    return made


def _pooled(rows: list[Row]) -> float | None:
    """The standard deviation between seeds, pooled over methods of one size: three seeds say little about it alone."""
    squares = [(row["seeds"] - 1, row["sd"] ** 2) for row in rows if row["sd"] is not None]
    freedom = sum(n for n, _ in squares)
    return (sum(n * square for n, square in squares) / freedom) ** 0.5 if freedom else None


def _difference(a: Row, b: Row, spread: float | None) -> tuple[float, float | None, float | None]:
    """Test error of a less that of b: in points, its standard error, and in standard errors."""
    points = a["test_error"] - b["test_error"]
    if spread is None:
        return points, None, None
    error = spread * (1 / a["seeds"] + 1 / b["seeds"]) ** 0.5
    return points, error, points / error if error else math.copysign(math.inf, points) if points else 0.0


def _gains(means: Means, once: Means, size: str) -> list[Row]:
    """Every learned method against its fixed counterpart and against binary dropout, at every size."""
    made: list[Row] = []
    found = means | once
    for at in sorted({at for _, at in means}):
        spread = _pooled([row for (_, other), row in means.items() if other == at])
        for learned, fixed in ((m, f) for m, against in COUNTERPARTS.items() for f in against):
            if (learned, at) in found and (fixed, at) in found:
                points, error, many = _difference(found[learned, at], found[fixed, at], spread)
                made.append({"table": "learned less fixed", size: at, "learned": learned, "fixed": fixed,
                             "points": points, "standard_error": error, "in_standard_errors": many})  # fmt: skip
    return made


def _answers(means: Means, gains: list[Row], size: str) -> list[Row]:
    """A number for every claim, in standard errors of the difference where it is one of errors."""
    sizes = sorted({at for _, at in means})
    answers: dict[str, float | None] = {}
    for learned, (fixed, *_) in COUNTERPARTS.items():
        pairs = [row for row in gains if row["learned"] == learned and row["fixed"] == fixed]
        if learned == ONCE and not pairs:  # figure 1b has no other readings
            continue
        answers[f"{learned} less {fixed}: largest excess"] = _most(row["in_standard_errors"] for row in pairs)
        answers[f"{fixed} less {learned}: gap at the smallest size less the largest of others"] = _first_gap(pairs)
    others = [row["in_standard_errors"] for row in gains if row["fixed"] == "binary" and row["learned"] != "vd-a2"]
    answers["vd-a or vd-b less binary: largest excess"] = _most(others)
    for learned in ("vd-a", "vd-b"):
        rates = [_hidden_rate(means[learned, at]) for at in sizes if (learned, at) in means]
        answers[f"{learned}: mean hidden rate at the largest size less that at the smallest"] = rates[-1] - rates[0] \
            if rates else None  # fmt: skip
    answers["vd-a2 less the best other dropout: largest excess"] = _most(_excess_of_a2(means, at) for at in sizes)
    return [{"table": "answers", "question": question, "value": value} for question, value in answers.items()]


def _most(values: Any) -> float | None:
    return max((value for value in values if value is not None), default=None)


def _first_gap(pairs: list[Row]) -> float | None:
    """In standard errors of the difference of two gaps; a gap is how far learned is below fixed.

    A size with a single seed has no such error, and does not count; if it is the smallest, there is no answer.
    """
    judged = [row for row in pairs[1:] if row["standard_error"] is not None]
    if not judged or pairs[0]["standard_error"] is None:
        return None
    largest = min(judged, key=lambda row: row["points"])
    error = math.hypot(pairs[0]["standard_error"], largest["standard_error"])
    return (largest["points"] - pairs[0]["points"]) / error if error else 0.0


def _hidden_rate(row: Row) -> float:
    """The mean over the layers whose inputs are hidden units."""
    return statistics.fmean(row[column] for column in row if column.startswith("rate_hidden"))


def _excess_of_a2(means: Means, at: Any) -> float | None:
    others = [row for (method, size), row in means.items() if size == at and method not in ("none", "vd-a2")]
    if ("vd-a2", at) not in means or not others:
        return None
    spread = _pooled([row for (_, size), row in means.items() if size == at])
    return _difference(means["vd-a2", at], min(others, key=lambda row: row["test_error"]), spread)[2]


def draw(results: list[Result], size: str, label: str, title: str) -> Figure:
    """The paper's figure, and beside it the mean learned rate of the hidden layers.

    Args:
        results: as of :func:`summarise`.
        size: the name of the column with the size.
        label: of the axis with the size.
        title: above the left half.
    """
    from matplotlib.figure import Figure

    means = _means([row for result in results for row in result.rows], size)
    drawn = Figure(figsize=(9, 4.4), layout="constrained")
    left, right = drawn.subplots(1, 2, width_ratios=[3, 2])
    lines = [
        (name, _STYLES[method], [row for row in means if row["method"] == method and is_compared(row)])
        for method, name in NAMES.items()
    ]
    ours = [row for row in means if row["reading"] == ONCE_PER_RATE]
    for name, style, rows in (*lines, ("not in the paper: B, divergence once per rate", "C3D:", ours)):
        if rows:
            places = [row[size] for row in rows]
            left.errorbar(
                places, [row["test_error"] for row in rows], [row["sd"] or 0.0 for row in rows],
                fmt=style, label=name, markersize=4, capsize=2,
            )  # fmt: skip
            if rows[0]["sharing"]:
                right.plot(places, [_hidden_rate(row) for row in rows], style, label=name, markersize=4)
    sizes = sorted({row[size] for row in means})
    left.set(title=title, ylabel="test error, %")
    left.legend(fontsize="small")
    right.axhline(0.5, color="C7", linewidth=0.7)  # the bound, α = 1
    right.set(title="learned rate p, mean of hidden layers", ylim=(0, 0.55))
    for axes in (left, right):
        axes.set_xticks(sizes, [f"{at:g}" for at in sizes])
        axes.set(xlabel=label)
    return drawn
