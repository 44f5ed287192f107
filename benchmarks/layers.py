"""Layers of activation noise in the MLP of the paper, beside the same network without and with torch's own dropout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from benchmarks.networks import WORKLOADS, rebuilt
from benchmarks.timing import Row, interleaved, summarise
from benchmarks.variants import REFERENCE, Variant
from vardrop import layers, rates


def _before(new: Callable[[float], nn.Module], net: nn.Sequential) -> nn.Module:
    """A layer of noise before every linear one: rate 0.2 on the input, 0.5 on hidden units."""
    ps = iter([0.2])
    return rebuilt(net, lambda linear: [new(next(ps, 0.5)), linear])


def _around(new: Callable[[float, nn.Module], nn.Module], net: nn.Sequential) -> nn.Module:
    """The same noise from layers that wrap the linear ones."""
    ps = iter([0.2])
    return rebuilt(net, lambda linear: [new(next(ps, 0.5), linear)])


def _concrete(p: float, linear: nn.Module) -> nn.Module:
    return layers.ConcreteDropout(rates.learned(p), linear)


LAYERS = [
    Variant("nn.Dropout", partial(_before, nn.Dropout), quick=True),
    Variant("layers.Dropout", partial(_before, layers.Dropout), goals={"layers": 1.25}, quick=True),
    Variant("layers.GaussianDropout", partial(_before, layers.GaussianDropout), goals={"layers": 1.2}, quick=True),
    Variant("layers.FastDropout", partial(_around, layers.FastDropout)),
    Variant("layers.DropConnect", partial(_around, layers.DropConnect)),
    Variant("layers.ConcreteDropout", partial(_around, _concrete)),
]


def measure(variants: Sequence[Variant], rounds: int, warmup: int) -> list[Row]:
    """A training step with a minibatch of 1000; the reference is the network without noise, timed beside itself too."""
    workload = WORKLOADS["mlp-1000"]
    steps = {variant.name: variant.step(workload) for variant in (REFERENCE, *variants)}
    pairs = interleaved(steps, REFERENCE.step(workload), rounds, warmup)
    goals = {variant.name: variant.goals.get("layers") for variant in variants}
    return [summarise("layers", name, seen, goal=goals.get(name)) for name, seen in pairs.items()]
