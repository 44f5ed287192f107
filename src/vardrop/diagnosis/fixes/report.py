"""What a cure did, and what it was worth on the given data."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

from vardrop.diagnosis.report import TEXT, Diagnosis, some

_ROUNDING = 1e-6


@dataclass(frozen=True)
class Attempt:
    """One cure, tried on a copy.

    Attributes:
        strategy: its name.
        after: the measure with it, lower is better; None if it could not be tried.
        shift: the largest distance of a k² from 1 that is left in training.
        gap: the largest distance from 1 of running variances, in variances of evaluation.
        changed: name -> what it is now.
        left: name -> why it was left alone.
        why: a sentence on what came of it.
        ks: BatchNorm -> its k with the cure, and the standard error of that.
    """

    strategy: str
    after: float | None
    shift: float | None
    gap: float | None = None
    changed: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    why: str = ""
    ks: dict[str, tuple[float, float]] = field(default_factory=dict)


@dataclass(frozen=True)
class FixReport:
    """What :func:`vardrop.fix_variance_shift_` tried and did.

    Attributes:
        chosen: the strategy that the model has now; None if it is as it was.
        measure: what ``before`` and the attempts are measured in, lower is better.
        before: the measure of the model as it was.
        attempts: everything that was tried.
        diagnosis: of the model as it was.
        outcome: of the model as it is.
    """

    chosen: str | None
    measure: str
    before: float
    attempts: tuple[Attempt, ...]
    diagnosis: Diagnosis
    outcome: Diagnosis

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        kept = "nothing that was tried is better" if self.attempts else "nothing is wrong that it could cure"
        yield f"kept: {self.chosen}" if self.chosen else f"the model is as it was: {kept}"
        yield f"{'':14} {self.measure:>16} {'|k² - 1| up to':>15} {'running off by':>15}"
        worst, gap = _small(self.diagnosis.worst), _small(self.diagnosis.gap)
        yield f"{'as it was':14} {self.before:16.4g} {worst:>15} {gap:>15}"
        for attempt in self.attempts:
            after = "-" if attempt.after is None else f"{attempt.after:.4g}"
            yield f"{attempt.strategy:14} {after:>16} {_small(attempt.shift):>15} {_small(attempt.gap):>15}"
        for attempt in self.attempts:
            if attempt.why:
                yield textwrap.fill(f"{attempt.strategy}: {attempt.why}", TEXT, subsequent_indent="    ")
        for name, what in self._kept().changed.items():
            yield f"  {name}: {what}"
        left: dict[str, list[str]] = {}
        for name, reason in self._kept().left.items():
            left.setdefault(reason, []).append(name)
        for reason, names in left.items():
            yield textwrap.fill(f"  left alone: {some(names)}: {reason}", TEXT, subsequent_indent="    ")

    def _kept(self) -> Attempt:
        return next((tried for tried in self.attempts if tried.strategy == self.chosen), Attempt("", None, None))


def _small(value: float | None) -> str:
    """A number in which rounding errors are 0."""
    return "-" if value is None else f"{0.0 if abs(value) < _ROUNDING else value:.3g}"
