"""What a diagnosis says: findings, every BatchNorm in numbers, and what could not be judged."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vardrop.optional import needed

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

_SHOWN = 12  # of the BatchNorms that a text lists, the worst ones
TEXT = 110  # columns


def some(names: Sequence[str], count: int = 3) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> from vardrop.diagnosis.report import some
        >>> some(["a", "b", "c", "d"], 2)
        'a, b and 2 more'
    """
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(name or "the model" for name in names[:count]) + more


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        where: the module, dotted, or the name of a weight.
        rule: which rule found it.
        severity: how bad it is; findings are in its order. Its meaning is the rule's, see ``measure``.
        measure: the severity in words, with its standard error where it has one.
        why: what is wrong, in a sentence.
        todo: what to do, in a sentence.
        affects: BatchNorms that it reaches.
    """

    where: str
    rule: str
    severity: float
    measure: str
    why: str
    todo: str
    affects: tuple[str, ...] = ()

    def __str__(self) -> str:
        body = f"{self.why} {self.todo}"
        return f"{self.where}: {self.rule} ({self.measure})\n" + textwrap.indent(textwrap.fill(body, TEXT - 4), "    ")


@dataclass(frozen=True)
class BatchNormShift:
    r"""One BatchNorm: the variance of its input with the noise on, against that in evaluation.

    Attributes:
        name: of the module.
        ratio: k², the geometric mean over the channels of the variance with noise divided by that without.
        error: its standard error over the examples.
        channels: k² of every channel, ``[channels]``; nan where a channel does not vary.
        channel_errors: their standard errors.
        theory: k² by theory, as a mean over the channels like ``ratio``; None where the path allows none.
        theory_gap: log of measured k² minus log of theory, a mean over the channels, and its standard error.
        running: ``running_var`` divided by the variance in evaluation, a mean like ``ratio``.
        running_error: its standard error.
        mean_gap: mean square of ``running_mean`` minus the mean in evaluation, in variances of the channel.
        stale: how far the running statistics are from what comes in, with the noise on or off, whichever is nearer.
        seen: batches that the running statistics come from; None if nobody counted.
        sources: noise that reaches it, in the order in which it runs.
        causes: k² that each of them gives alone, where that was measured.
        examples: how many were measured.
    """

    name: str
    ratio: float
    error: float
    channels: Tensor
    channel_errors: Tensor
    theory: float | None
    theory_gap: tuple[float, float] | None
    running: float
    running_error: float
    mean_gap: float
    stale: float
    seen: int | None
    sources: tuple[str, ...]
    causes: dict[str, float] = field(default_factory=dict)
    examples: int = 0

    @property
    def k(self) -> float:
        """The article's k, the square root of the ratio."""
        return math.sqrt(self.ratio)

    @property
    def k_error(self) -> float:
        """The standard error of k."""
        return self.error / (2 * self.k)

    @property
    def median(self) -> float:
        """k² of the median channel."""
        return float(self.channels.nanmedian())

    @property
    def extremes(self) -> tuple[float, float]:
        """The smallest and the largest k² of a channel."""
        known = self.channels[~self.channels.isnan()]
        return float(known.min()), float(known.max())

    def row(self) -> dict[str, Any]:
        """All numbers by name, for tables."""
        low, high = self.extremes
        return {
            "name": self.name, "k": self.k, "k_error": self.k_error, "ratio": self.ratio, "error": self.error,
            "median": self.median, "min": low, "max": high, "theory": self.theory, "running": self.running,
            "running_error": self.running_error, "mean_gap": self.mean_gap, "stale": self.stale,
            "sources": ", ".join(self.sources), "examples": self.examples,
        }  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What the running statistics cost: the same examples with them, and with statistics estimated without noise.

    Attributes:
        measure: ``"error rate"``, ``"squared error"`` or ``"loss"``; lower is better.
        moving: with the running statistics of the model.
        estimated: with statistics of the examples themselves, noise off.
        error: standard error of the difference.
    """

    measure: str
    moving: float
    estimated: float
    error: float

    @property
    def lost(self) -> float:
        """How much worse the model is for its running statistics."""
        return self.moving - self.estimated

    def __str__(self) -> str:
        told = (
            f"{self.moving:.4g} with running statistics, {self.estimated:.4g} with statistics estimated without noise"
        )
        return f"{self.measure}: {told} (difference {self.lost:.2g} ± {self.error:.1g})"


@dataclass(frozen=True)
class Unjudged:
    """What could not be judged, and why."""

    where: str
    reason: str

    def __str__(self) -> str:
        return f"{self.where}: {self.reason}"


@dataclass(frozen=True)
class Diagnosis:
    """What :func:`vardrop.diagnose` found.

    Args:
        findings: what is wrong, in the order of harm.
        batchnorms: every BatchNorm that could be measured, in the order in which they run.
        unjudged: what could not be judged, and why.
        cost: of the running statistics; None without labels or without a BatchNorm.
        examples: how many examples were looked at.

    Example:
        >>> from vardrop.diagnosis.report import Diagnosis, Finding
        >>> finding = Finding("drop", "extreme-rate", 0.9, "p = 0.9", "Little is left.", "Lower the rate.")
        >>> print(Diagnosis((finding,), (), (), None, 64))
        1 finding on 64 examples
        drop: extreme-rate (p = 0.9)
            Little is left. Lower the rate.
    """

    findings: tuple[Finding, ...]
    batchnorms: tuple[BatchNormShift, ...]
    unjudged: tuple[Unjudged, ...]
    cost: Cost | None
    examples: int

    @property
    def worst(self) -> float:
        """The largest distance of a BatchNorm's k² from 1; 0 if there is none."""
        return max((abs(found.ratio - 1) for found in self.batchnorms), default=0.0)

    @property
    def gap(self) -> float:
        """The largest distance from 1 of a running variance, in variances of evaluation; 0 if there is none."""
        return max((abs(found.running - 1) for found in self.batchnorms if found.seen != 0), default=0.0)

    def __str__(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        count = len(self.findings)
        yield f"{count or 'no'} finding{'' if count == 1 else 's'} on {self.examples} examples"
        yield from map(str, self.findings)
        if self.cost is not None:
            yield str(self.cost)
        if self.batchnorms:
            yield from self._table()
        if self.unjudged:
            yield f"not judged: {len(self.unjudged)}"
            by_reason: dict[str, list[str]] = {}
            for entry in self.unjudged:
                by_reason.setdefault(entry.reason, []).append(entry.where)
            for reason, names in by_reason.items():
                yield textwrap.fill(f"  {some(names)}: {reason}", TEXT, subsequent_indent="    ")

    def _table(self) -> Iterator[str]:
        """The BatchNorms that shift most."""
        shown = sorted(self.batchnorms, key=lambda found: -abs(math.log(found.ratio)))[:_SHOWN]
        width = max(len("BatchNorm"), *(len(found.name) for found in shown))
        yield f"{'BatchNorm':{width}} {'k':>7} {'±':>6} {'k²':>7} {'±':>6} {'theory':>7} {'running':>8}  noise from"
        for found in shown:
            theory = "" if found.theory is None else f"{found.theory:.3f}"
            yield (
                f"{found.name:{width}} {found.k:7.3f} {found.k_error:6.3f} {found.ratio:7.3f} {found.error:6.3f} "
                f"{theory:>7} {'' if found.seen == 0 else f'{found.running:.3g}':>8}  {some(found.sources) or '-'}"
            )
        if len(self.batchnorms) > _SHOWN:
            yield f"and {len(self.batchnorms) - _SHOWN} more, nearer to 1"

    def to_pandas(self) -> pd.DataFrame:
        """A row for every BatchNorm; needs pandas. The findings are ``pd.DataFrame(diagnosis.findings)``."""
        pandas = needed("pandas", "diagnose")
        return pandas.DataFrame([found.row() for found in self.batchnorms])

    def plot(self) -> Figure:
        """Every BatchNorm as a point of k, with two standard errors, against 1; needs matplotlib."""
        figure = needed("matplotlib.figure", "diagnose").Figure(
            figsize=(7, 1.2 + 0.28 * max(len(self.batchnorms), 1)), layout="constrained"
        )
        axes = figure.subplots()
        places = range(len(self.batchnorms))
        k, errors = [found.k for found in self.batchnorms], [2 * found.k_error for found in self.batchnorms]
        axes.axvline(1.0, color="0.6", linewidth=1)
        axes.errorbar(k, places, xerr=errors, fmt="o", label="measured")
        known = [(math.sqrt(found.theory), i) for i, found in enumerate(self.batchnorms) if found.theory is not None]
        if known:
            axes.plot(*zip(*known, strict=True), "x", color="C1", label="theory")
            axes.legend()
        axes.set_yticks(list(places), [found.name for found in self.batchnorms])
        axes.set(xlabel="k", ylim=(len(self.batchnorms) - 0.5, -0.5))
        return figure
