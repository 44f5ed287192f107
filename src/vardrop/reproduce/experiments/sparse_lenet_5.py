"""Sparse variational dropout on LeNet-5 and MNIST, beside the published table."""

from __future__ import annotations

from vardrop.reproduce.experiment import Config
from vardrop.reproduce.experiments import _sparse
from vardrop.reproduce.experiments._sparse_training import Recipe

PUBLISHED = (  # Molchanov, Ashukha, Vetrov 2017, table 1, and those it compares with: name, error %, ratio
    ("pruning (Han 2015)", 0.77, 12.0),
    ("DNS (Guo 2016)", 0.91, 111.0),
    ("SWS (Ullrich 2017)", 0.97, 200.0),
    ("Sparse VD", 0.75, 280.0),
)


def cells(scale: str) -> list[Config]:
    """One for every seed, on the images as they are, and one on images that are moved."""
    if scale == "smoke":
        recipe = Recipe(dense=1, epochs=2, warmup=1, decay=0.6, shrink=1, finetune=1)
        moved = recipe._replace(noise_lr=4e-3, finetune_lr=2e-3, shift=1)
        size: Config = {"data": "digits", "train": 400, "ratios": [280.0]}
    else:
        longer = {"cpu": 1, "gpu": 2}[scale]
        recipe = Recipe(5 * longer, 200 * longer, 10 * longer, decay=1.0, shrink=5, finetune=6)
        moved = recipe._replace(finetune=20, noise_lr=4e-3, finetune_lr=2e-3, shift=1)
        size = {"data": "mnist", "train": 60_000, "ratios": [280.0, 350.0]}
    base = {"model": "lenet-5", **size, "extra_digits": 1, "enlarge": 2 if scale == "smoke" else 1}
    seeds = range(1 if scale == "smoke" else 3)
    plain = [{**base, **recipe.entries(), "temperature": 3.0, "seed": seed} for seed in seeds]
    return plain + [{**base, **moved.entries(), "seed": seed} for seed in seeds]


EXPERIMENT = _sparse.experiment(
    "sparse-lenet-5",
    "Sparse variational dropout on LeNet-5, MNIST: error against the number of weights, and a real file.",
    cells,
    PUBLISHED,
)
