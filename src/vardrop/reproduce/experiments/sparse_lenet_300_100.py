"""Sparse variational dropout on LeNet-300-100 and MNIST, beside the published table."""

from __future__ import annotations

from vardrop.reproduce.experiment import Config
from vardrop.reproduce.experiments import _sparse
from vardrop.reproduce.experiments._sparse_training import Recipe

PUBLISHED = (  # Molchanov, Ashukha, Vetrov 2017, table 1, and those it compares with: name, error %, ratio
    ("pruning (Han 2015)", 1.59, 12.0),
    ("DNS (Guo 2016)", 1.99, 56.0),
    ("SWS (Ullrich 2017)", 1.94, 23.0),
    ("Sparse VD", 1.92, 68.0),
)


def cells(scale: str) -> list[Config]:
    """One for every seed."""
    if scale == "smoke":
        recipe = Recipe(dense=2, epochs=8, warmup=2, decay=0.6, shrink=3, finetune=1)
        size: Config = {"data": "digits", "train": 1000, "ratios": [68.0, 100.0]}
    else:
        longer = {"cpu": 1, "gpu": 4}[scale]
        recipe = Recipe(10, 200 * longer, 50 * longer, decay=1.0, shrink=5, finetune=10, batch=256)
        size = {"data": "mnist", "train": 60_000, "ratios": [68.0, 100.0, 150.0]}
    base = {"model": "lenet-300-100", **size, **recipe.entries(), "extra_digits": 1, "enlarge": 1}
    return [{**base, "seed": seed} for seed in range(1 if scale == "smoke" else 3)]


EXPERIMENT = _sparse.experiment(
    "sparse-lenet-300-100",
    "Sparse variational dropout on LeNet-300-100, MNIST: error against the number of weights, and a real file.",
    cells,
    PUBLISHED,
)
