"""The ways of putting noise into a network that are compared, as data: a new one is one line in `OURS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import Tensor, nn

import vardrop as vd
from benchmarks.networks import Workload, rebuilt, training_step
from vardrop.weights.posteriors import Posterior

_LOCAL_GOALS = {"mlp-128": 2.6, "mlp-1000": 2.3}


@dataclass(frozen=True)
class Variant:
    """One kind of noise in a network.

    Attributes:
        name: as in the table.
        prepare: plain network -> noisy network; it may change its argument.
        estimator: the estimator in force during the step.
        divergence: network -> KL divergence that the step adds to its loss; None for none.
        goals: benchmark -> the largest ratio that we want to see.
        quick: whether ``--quick`` measures it.
    """

    name: str
    prepare: Callable[[nn.Sequential], nn.Module]
    estimator: str = "local"
    divergence: Callable[[nn.Module], Tensor] | None = None
    goals: Mapping[str, float] = field(default_factory=dict)
    quick: bool = False

    def step_of(self, net: nn.Sequential, x: Tensor, y: Tensor) -> Callable[[], None]:
        """One training step of a plain network with this noise put into it."""
        plain = training_step(self.prepare(net), x, y, self.divergence)
        if self.estimator == "local":  # the default, and all that a peer or a plain network has
            return plain

        def step() -> None:
            with vd.estimator(self.estimator):
                plain()

        return step

    def step(self, workload: Workload, examples: int | None = None) -> Callable[[], None]:
        """The same on a network and a minibatch of its own; ``examples`` in place of the workload's."""
        return self.step_of(workload.network(), *workload.data(examples))


def _dropout(net: nn.Sequential) -> nn.Module:
    """Dropout before every layer: 0.2 on the input, 0.5 on hidden units."""
    rates = iter([0.2])
    return rebuilt(net, lambda layer: [nn.Dropout(next(rates, 0.5)), layer])


def _converted(config: Posterior, net: nn.Sequential) -> nn.Module:
    vd.convert_(net, config)
    return net


def _ours(name: str, config: Posterior, **about: Any) -> Variant:
    goals = {} if {"estimator", "divergence"} & about.keys() else _LOCAL_GOALS
    return Variant(name, partial(_converted, config), goals=goals, **about)


_per_weight = vd.VariationalDropout(type="B", sharing="weight")

REFERENCE = Variant("nn.Linear / nn.Conv2d", lambda net: net, quick=True)
HARDEST = _ours("VariationalDropout B, weight", _per_weight, quick=True)
PER_EXAMPLE = _ours("VariationalDropout B, weight, per_example", _per_weight, estimator="per_example", quick=True)
OURS = [
    Variant("nn.Dropout 0.2 / 0.5", _dropout, quick=True),
    _ours("GaussianDropout A", vd.GaussianDropout(type="A", rate=0.5)),
    _ours("GaussianDropout B", vd.GaussianDropout(type="B", rate=0.5)),
    _ours("VariationalDropout A, neuron", vd.VariationalDropout(type="A", sharing="neuron"), quick=True),
    _ours("VariationalDropout B, layer", vd.VariationalDropout(type="B", sharing="layer")),
    _ours("VariationalDropout B, neuron", vd.VariationalDropout(type="B", sharing="neuron")),
    HARDEST,
    _ours("VariationalDropout B, weight, with KL", _per_weight, divergence=vd.kl_divergence),
    _ours("VariationalDropout B, weight, per_minibatch", _per_weight, estimator="per_minibatch", quick=True),
    _ours("VariationalDropout B, weight, flipout", _per_weight, estimator="flipout"),
    _ours("SparseVariationalDropout", vd.SparseVariationalDropout()),
    _ours("GaussianPosterior", vd.GaussianPosterior()),
    _ours("GaussianPosterior, with KL", vd.GaussianPosterior(), divergence=vd.kl_divergence),
]
