"""Whether every claim holds: reads JSON, runs nothing."""

from __future__ import annotations

from collections.abc import Iterable

from vardrop.reproduce.claims import FAILURES, NOT_RUN, Claim, Verdict, judge
from vardrop.reproduce.experiment import Experiment
from vardrop.reproduce.report import target, verdict_text
from vardrop.reproduce.results import Result


def verdicts(claims: Iterable[Claim], results: list[Result], experiments: dict[str, Experiment]) -> list[Verdict]:
    """A verdict for every claim."""
    return [judge(claim, results, experiments) for claim in claims]


def failures(verdicts: Iterable[Verdict], strict: bool = False) -> list[Verdict]:
    """The claims that are outside their tolerance or cannot be judged; if strict, those without a result as well."""
    return [v for v in verdicts if v.status in FAILURES or (strict and v.status == NOT_RUN)]


def line(verdict: Verdict) -> str:
    """One line on one claim."""
    ours = "" if verdict.ours is None else f"ours {verdict.ours:.4g} at scale {verdict.scale}, "
    return f"{verdict_text(verdict)}: {verdict.claim.id} ({ours}target {target(verdict.claim)})"
