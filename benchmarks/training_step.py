"""Time of a training step, forward and backward without an optimiser, against the same network with plain layers."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.networks import WORKLOADS
from benchmarks.timing import Pair, Row, interleaved, summarise
from benchmarks.variants import PER_EXAMPLE, REFERENCE, Variant


def measure(benchmark: str, variants: Sequence[Variant], rounds: int, warmup: int) -> list[Row]:
    """Every variant on one network. The reference is compared with itself too: its range is the machine's noise."""
    workload = WORKLOADS[benchmark]
    pairs = interleaved(
        {v.name: v.step(workload) for v in (REFERENCE, *variants)}, REFERENCE.step(workload), rounds, warmup
    )
    goals = {v.name: v.goals.get(benchmark) for v in variants}
    return [summarise(benchmark, name, seen, goal=goals.get(name)) for name, seen in pairs.items()]


def per_example(examples: int, rounds: int) -> list[Row]:
    """A weight for every example, on some examples and scaled to the minibatch of 1000: the whole takes minutes."""
    workload = WORKLOADS["mlp-1000"]
    step = PER_EXAMPLE.step(workload, examples)
    pairs = interleaved({PER_EXAMPLE.name: step}, REFERENCE.step(workload), rounds, warmup=1)[PER_EXAMPLE.name]
    factor = workload.examples / examples
    scaled = [Pair(pair.variant * factor, pair.reference) for pair in pairs]
    note = f"measured on {examples} examples of {workload.examples} and scaled"
    return [summarise("per-example", PER_EXAMPLE.name, scaled, note=note)]
