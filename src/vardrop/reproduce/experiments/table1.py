"""The paper's Table 1: how noisy the gradient is under every estimator, after 10 and after 100 epochs.

MNIST, three hidden layers of rectified linear units, variational dropout B with a rate for every weight, Adam with
default hyper-parameters and temporal averaging. The paper names neither the width nor the minibatch of the training;
`_table1.py` has what else its sentence leaves open. Few networks are trained and read in every way. The table of
readings says how far each is from the published ratios, the table below it has the numbers of the one that is nearest.
"""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments import _table1 as table1

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

NAMES = {
    "none": "no dropout noise",
    "local": "local reparameterization",
    "per_example": "weight sample per data point",
    "per_minibatch": "weight sample per minibatch",
}
PUBLISHED: dict[table1.Column, dict[str, float]] = {
    ("top", 10): {"local": 7.8e3, "per_example": 1.4e4, "per_minibatch": 4.9e4, "none": 2.8e3},
    ("top", 100): {"local": 1.2e3, "per_example": 2.6e3, "per_minibatch": 4.3e3, "none": 5.9e1},
    ("bottom", 10): {"local": 1.9e2, "per_example": 4.3e2, "per_minibatch": 8.5e2, "none": 1.3e2},
    ("bottom", 100): {"local": 1.1e2, "per_example": 2.5e2, "per_minibatch": 3.3e2, "none": 9.0e0},
}
READING = ("last", "theta", "expected")  # the one that claims are judged by: weights, gradient, reference


def cells(scale: str) -> list[Config]:
    """A cell for every network; the first kind of network is the one that claims are about."""
    shared: Config = {
        "smoke": {"data": "digits", "M": 300, "average": 0.9, "repeats": 2, "together": 50, "device": "cpu"},
        "cpu": {"data": "mnist", "M": 1000, "average": 0.999, "repeats": 5, "together": 100, "device": "cpu"},
        "gpu": {"data": "mnist", "M": 1000, "average": 0.999, "repeats": 20, "together": 100, "device": "cuda"},
    }[scale]
    networks: list[tuple[str, int, list[int], int]] = {  # model, minibatch of the training, epochs, seeds
        "smoke": [("mlp:3x16", 400, [10, 100], 1)],
        "cpu": [
            ("mlp:3x340", 1000, [10, 100], 3),
            ("mlp:3x100", 1000, [10, 100], 3),
            ("mlp:3x1000", 1000, [10], 1),
            ("mlp:3x100", 250, [10, 100], 1),
        ],
        "gpu": [
            ("mlp:3x1060", 1000, [10, 100], 3),
            ("mlp:3x340", 1000, [10, 100], 3),
            ("mlp:3x1060", 250, [10, 100], 1),
        ],
    }[scale]
    return [
        {"method": "vd-b", "sharing": "weight", "model": model, "batch": batch, "marks": marks, "seed": seed, **shared}
        for model, batch, marks, seeds in networks
        for seed in range(seeds)
    ]


def summarise(results: list[Result]) -> list[Row]:
    """Every reading beside the published ratios, and the numbers of the one that claims are judged by."""
    kinds = list(dict.fromkeys(table1.network_of(result.config) for result in results))
    rows = [
        row
        for network in kinds
        for weights in ("last", "averaged")
        for gradient in table1.GRADIENTS
        for reference in table1.REFERENCES
        if (row := _reading(results, network, weights, gradient, reference))
    ]
    weights, gradient, reference = READING
    main = table1.columns(results, kinds[0], weights, gradient, reference)
    return rows + numbers(main, PUBLISHED) + _ratios(main) + errors(results)


def _reading(results: list[Result], network: tuple[Any, ...], weights: str, gradient: str, reference: str) -> Row:
    found = table1.columns(results, network, weights, gradient, reference)
    known = [column for column in found if column in PUBLISHED]
    if not known:
        return {}
    ours = {column: table1.mean(found[column]) for column in known}
    factors = [f for column in known for f in table1.factors(ours[column], PUBLISHED[column]).values()]
    pairs = [table1.in_order(ours[column]) for column in known]
    model, batch = network
    return {
        "table": "readings", "model": model, "training_batch": batch, "weights": weights,
        "gradient_of": table1.GRADIENTS[gradient], "full_gradient": reference,
        "columns": len(known), "seeds": len(found[known[0]]), "columns_in_order": sum(n == 6 for n in pairs),
        "ratios_within_2": sum(f <= 2 for f in factors), "of_ratios": len(factors),
        "mean_factor": statistics.geometric_mean(factors), "largest_factor": max(factors),
    }  # fmt: skip


def numbers(
    main: dict[table1.Column, list[dict[str, float]]], published: dict[table1.Column, dict[str, float]]
) -> list[Row]:
    """The table itself, in the published order of rows, with the spread over seeds as a factor."""
    return [
        {
            "table": "table 1", "layer": layer, "epochs": epochs, "estimator": NAMES[name],
            "published": published.get((layer, epochs), {}).get(name), "ours": table1.mean(found)[name],
            "smallest": min(some[name] for some in found), "largest": max(some[name] for some in found),
            "seeds": len(found),
        }
        for (layer, epochs), found in sorted(main.items(), key=lambda entry: (entry[0][0] != "top", entry[0][1]))
        for name in ("local", "per_example", "per_minibatch", "none")
    ]  # fmt: skip


def _ratios(main: dict[table1.Column, list[dict[str, float]]]) -> list[Row]:
    """Of every column: the ratios to the local trick's variance, the order, and the ratio that is furthest off."""
    rows: list[Row] = []
    for (layer, epochs), found in main.items():
        ours = table1.mean(found)
        published = PUBLISHED.get((layer, epochs))
        row: Row = {"table": "ratios", "layer": layer, "epochs": epochs, "pairs_in_order": table1.in_order(ours)}
        for name in ("per_example", "per_minibatch", "none"):
            row[f"{name}_to_local"] = ours[name] / ours["local"]
            row[f"{name}_to_local_published"] = published and published[name] / published["local"]
        if published:
            factors = table1.factors(ours, published)
            worst = max(factors, key=lambda pair: factors[pair])
            row |= {"ratios_within_2": sum(f <= 2 for f in factors.values()), "largest_factor": factors[worst],
                    "between": " and ".join(NAMES[name] for name in worst)}  # fmt: skip
        rows.append(row)
    return rows


def errors(results: list[Result]) -> list[Row]:
    """Test error of every kind of network, in per cent."""
    found: dict[tuple[object, ...], list[float]] = {}
    for result in results:
        for row in result.rows:
            if (row["layer"], row["gradient"]) == ("top", "theta"):
                key = (row["model"], row["batch"], row["epochs"], row["weights"])
                found.setdefault(key, []).append(row["test_error"])
    return [
        {
            "table": "networks", "model": key[0], "training_batch": key[1], "epochs": key[2], "weights": key[3],
            "claims_are_about_it": key[:2] == table1.network_of(results[0].config),
            "test_error": statistics.fmean(some), "smallest": min(some), "largest": max(some), "seeds": len(some),
        }
        for key, some in found.items()
    ]  # fmt: skip


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Four panels, as the paper's four columns: the published variance, and ours of every seed."""
    weights, gradient, reference = READING
    return draw(table1.columns(results, table1.network_of(results[0].config), weights, gradient, reference), PUBLISHED)


def draw(main: dict[table1.Column, list[dict[str, float]]], published: dict[table1.Column, dict[str, float]]) -> Figure:
    """Published variances and ours, a panel for every layer and number of epochs."""
    from matplotlib.figure import Figure

    order = ("local", "per_example", "per_minibatch", "none")
    drawn = Figure(figsize=(8, 5), layout="constrained")
    marks = sorted({epochs for _, epochs in main})
    panels = drawn.subplots(2, len(marks), sharey=True, sharex="row", squeeze=False)
    for line, layer in zip(panels, table1.LAYERS, strict=True):
        for axes, epochs in zip(line, marks, strict=True):
            for i, name in enumerate(order):
                found = main.get((layer, epochs), [])
                axes.plot([some[name] for some in found], [i + 0.12] * len(found), "o", color="C0", alpha=0.7)
                if (layer, epochs) in published:
                    axes.plot(published[layer, epochs][name], i - 0.12, "D", color="C3")
            axes.set(xscale="log", title=f"{layer} layer, {epochs} epochs")
            axes.set_yticks(range(len(order)), [NAMES[name] for name in order])
            axes.set_ylim(len(order) - 0.5, -0.5)
            axes.grid(axis="x", alpha=0.3)
    for axes in panels[-1]:
        axes.set_xlabel("variance of the gradient")
    panels[0][0].plot([], [], "o", color="C0", label="ours, every seed")
    if published:
        panels[0][0].plot([], [], "D", color="C3", label="published")
    drawn.legend(loc="outside lower center", ncols=2, fontsize="small")
    return drawn


EXPERIMENT = Experiment(
    name="table1",
    summary="The variance of the minibatch gradient under every estimator, at both ends of a trained network.",
    cells=cells,
    run_cell=table1.run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("variances",),
)
