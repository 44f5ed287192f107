"""The rules on BatchNorm: each looks at the facts for one kind of fault."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from vardrop.diagnosis.report import BatchNormShift, Finding, some
from vardrop.diagnosis.scores import Scores
from vardrop.diagnosis.tracing import Trace

SHIFT = 0.1  # k² − 1 below which a shift does no harm worth a line: statistics of 200 values err as much
STALE = 0.25  # distance of running statistics that a moving average does not explain
ERRORS = 3.0  # standard errors that a deviation must have
FEW = 16  # examples, below which a standard error is itself a guess


@dataclass
class Facts:
    """What is known of a model when the rules are asked.

    Attributes:
        model: itself.
        batchnorms: measured.
        trace: of a pass with the noise on; None if it could not be traced.
        sources: name -> kind of noise.
        varies: how far two passes in evaluation lie apart, relative to the spread of the output.
        always_on: noise that ran in evaluation: name -> what it was.
        training: scores on the loader, noise off and noise on.
        validation: scores on validation data, noise off.
    """

    model: nn.Module
    batchnorms: list[BatchNormShift]
    trace: Trace | None
    sources: dict[str, str]
    varies: float = 0.0
    always_on: dict[str, str] = field(default_factory=dict)
    training: tuple[Scores, Scores] | None = None
    validation: Scores | None = None


Rule = Callable[[Facts], Iterator[Finding]]


def variance_shift(facts: Facts) -> Iterator[Finding]:
    """BatchNorms whose input has another variance in training: one finding for each source, at its worst BatchNorm."""
    harmful = [found for found in facts.batchnorms if shifts_surely(found) and not _fits_evaluation(found)]
    for where, hit in by_cause(harmful).items():
        worst = max(hit, key=lambda found: abs(math.log(alone(found, where))))
        ratio = alone(worst, where)
        names = some([found.name for found in hit])
        theory = "" if worst.theory is None else f", by theory {worst.theory:.3g}"
        yield Finding(
            where,
            "variance-shift",
            abs(ratio - 1),
            f"k² = {worst.ratio:.3g} ± {worst.error:.1g} at {worst.name}{theory}"
            + (f", {ratio:.3g} by this noise alone" if len(worst.causes) > 1 else ""),
            f"With this noise on, the input of {names} has another variance than in evaluation, which its running "
            "statistics do not know.",
            _remedy(facts, where, hit),
            tuple(found.name for found in hit),
        )


def shifts_surely(found: BatchNormShift) -> bool:
    """Whether a shift is large enough to do harm, and is none of chance."""
    return (
        found.examples >= FEW
        and abs(found.ratio - 1) > SHIFT
        and abs(math.log(found.ratio)) > ERRORS * found.error / found.ratio
    )


def _fits_evaluation(found: BatchNormShift) -> bool:
    """Whether running statistics were taken without the noise: then evaluation is not hurt by it."""
    return found.seen != 0 and abs(math.log(found.running)) < 0.5 * abs(math.log(found.ratio))


def by_cause(shifted: Iterable[BatchNormShift]) -> dict[str, list[BatchNormShift]]:
    """The BatchNorms that each source of noise shifts; those whose source is not known under their own names."""
    found: dict[str, list[BatchNormShift]] = {}
    for shift in shifted:
        for where in _causes(shift):
            found.setdefault(where, []).append(shift)
    return found


def _causes(found: BatchNormShift) -> list[str]:
    """What shifts a BatchNorm: each source that does so alone, else the one that does most."""
    if not found.causes:
        return [found.sources[0] if len(found.sources) == 1 else found.name]
    strong = [name for name, ratio in found.causes.items() if abs(ratio - 1) > SHIFT]
    return strong or [max(found.causes, key=lambda name: abs(math.log(found.causes[name])))]


def alone(found: BatchNormShift, where: str) -> float:
    """k² that a source gives alone, where that is known."""
    return found.causes.get(where, found.ratio)


def _remedy(facts: Facts, where: str, hit: list[BatchNormShift]) -> str:
    last = hit[-1].name
    for found in facts.batchnorms:  # in the order in which they run
        if where in found.sources:
            last = found.name
    if facts.sources.get(where, "random weight") == "random weight":
        return "Re-estimate the statistics without noise: vd.fix_variance_shift_(model, loader, 'recalibrate')."
    return (
        f"Move it behind {last}, the last BatchNorm that it reaches, or lower its rate; vd.fix_variance_shift_ does "
        "either, or re-estimates the statistics without noise."
    )


def unproven_shift(facts: Facts) -> Iterator[Finding]:
    """Dropout before a BatchNorm that these examples are too few to measure, and theory says that it shifts."""
    for found in facts.batchnorms:
        if found.theory is None or shifts_surely(found) or _fits_evaluation(found) or found.theory - 1 <= SHIFT:
            continue
        if found.examples < FEW or not found.error < found.theory - 1 - SHIFT:  # it cannot be said that it does not
            yield Finding(
                found.sources[0],
                "dropout-before-batchnorm",
                found.theory - 1,
                f"k² = {found.theory:.3g} by theory at {found.name}, measured {found.ratio:.3g} ± {found.error:.1g}",
                f"It puts noise on the input of {found.name}, and {found.examples} examples are too few to measure how "
                "much that shifts its variance.",
                f"Move it behind {found.name}, or give more batches to be sure.",
                (found.name,),
            )


def stale_statistics(facts: Facts) -> Iterator[Finding]:
    """Running statistics that are neither those of training nor those of evaluation."""
    for found in facts.batchnorms:
        if found.seen == 0 or found.stale <= STALE + ERRORS * found.running_error / max(found.running, 1e-30):
            continue
        yield Finding(
            found.name,
            "stale-statistics",
            found.stale,
            f"running variance {found.running:.3g} times that of its input, means off by "
            f"{math.sqrt(found.mean_gap):.2g} standard deviations",
            "Its running statistics are neither those of its input with the noise on nor with the noise off: they come "
            "from other weights or other data.",
            "Re-estimate them: vd.fix_variance_shift_(model, loader, 'recalibrate').",
        )


SHIFT_RULES: tuple[Rule, ...] = (variance_shift, unproven_shift, stale_statistics)
