"""Time of the KL divergence with its gradient, as a share of a plain training step at M = 1000."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import vardrop as vd
from benchmarks.networks import WORKLOADS, mlp
from benchmarks.timing import Row, interleaved, summarise
from benchmarks.variants import REFERENCE
from vardrop.weights.posteriors import Posterior


class Divergence(NamedTuple):
    """A posterior whose divergence is timed on the network of three hidden layers."""

    name: str
    config: Posterior
    goal: float | None = None
    quick: bool = True


DIVERGENCES = [
    Divergence("VariationalDropout B, weight, exact", vd.VariationalDropout(type="B", sharing="weight"), goal=0.15),
    Divergence(
        "VariationalDropout B, weight, sigmoid", vd.VariationalDropout(type="B", sharing="weight", prior="sigmoid")
    ),
    Divergence("SparseVariationalDropout, exact", vd.SparseVariationalDropout(), quick=False),
    Divergence(
        "VariationalDropout B, weight, ARD", vd.VariationalDropout(type="B", sharing="weight", prior="ard"), quick=False
    ),
    Divergence("GaussianPosterior", vd.GaussianPosterior(), quick=False),
]


def _with_gradient(config: Posterior) -> Callable[[], None]:
    net = mlp()
    vd.convert_(net, config)

    def run() -> None:
        net.zero_grad()
        vd.kl_divergence(net).backward()

    return run


def measure(divergences: Sequence[Divergence], rounds: int, warmup: int) -> list[Row]:
    """One row for every divergence of a rate, or a variance, per weight."""
    runs = {d.name: _with_gradient(d.config) for d in divergences}
    pairs = interleaved(runs, REFERENCE.step(WORKLOADS["mlp-1000"]), rounds, warmup)
    return [summarise("kl", d.name, pairs[d.name], goal=d.goal) for d in divergences]
