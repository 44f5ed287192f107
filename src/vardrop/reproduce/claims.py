"""What the papers say, and whether our numbers agree."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass, fields
from importlib import resources
from typing import Any

from vardrop.reproduce.experiment import SCALES, Experiment, Row
from vardrop.reproduce.results import Result, finished

RELATIONS = ("at most", "at least", "about")
HOLDS, WITHIN, OUTSIDE, UNCLEAR, NOT_RUN = "holds", "within tolerance", "outside", "unclear", "not run"
FAILURES = (OUTSIDE, UNCLEAR)


@dataclass(frozen=True)
class Claim:
    """One number of a paper, and which of ours answers it.

    Args:
        id: a short name.
        paper: authors and year.
        where: table, figure or section.
        row: which row of it, or which case.
        quantity: what is measured, with its unit.
        relation: ours is ``"at most"``, ``"at least"`` or ``"about"`` the paper's.
        published: the paper's number,
        expected: or, if it prints none, the number that follows from its formula; ``note`` says how.
        tolerance: ``{"factor": f}`` or ``{"absolute": a}``: how far beyond the number ours may lie.
        experiment: the experiment that answers it.
        select: columns and values that one row of it has.
        metric: the column of that row.
        scale: the only scale that answers it; without it gpu before cpu. Smoke never does.
        note: what a reader should know.
    """

    id: str
    paper: str
    where: str
    row: str
    quantity: str
    relation: str
    tolerance: dict[str, float]
    experiment: str
    select: dict[str, Any]
    metric: str
    published: float | None = None
    expected: float | None = None
    scale: str | None = None
    note: str = ""

    @property
    def target(self) -> float:
        """The number to compare with."""
        return self.published if self.published is not None else self.expected  # type: ignore[return-value]

    def agrees(self, ours: float, tolerant: bool = True) -> bool:
        """Whether a number agrees with the claim, with or without the tolerance.

        Example:
            >>> claim = Claim("", "", "", "", "", "at least", {"factor": 2.0}, "speed", {}, "ratio", published=200.0)
            >>> claim.agrees(220), claim.agrees(150), claim.agrees(150, tolerant=False), claim.agrees(90)
            (True, True, False, False)
        """
        low = high = self.target
        if tolerant and "factor" in self.tolerance:
            low, high = sorted((low / self.tolerance["factor"], high * self.tolerance["factor"]))
        elif tolerant:
            low, high = low - self.tolerance["absolute"], high + self.tolerance["absolute"]
        return (self.relation == "at most" or ours >= low) and (self.relation == "at least" or ours <= high)


@dataclass(frozen=True)
class Verdict:
    """A claim, our number, and whether they agree."""

    claim: Claim
    status: str
    ours: float | None = None
    scale: str | None = None
    reason: str = ""


def load(experiments: dict[str, Experiment], text: str | None = None) -> list[Claim]:
    """The claims in ``claims.toml``, or in a text of the same form.

    Raises:
        ValueError: if one of them is not complete, contradicts itself or names an unknown experiment.
    """
    if text is None:
        text = resources.files("vardrop.reproduce").joinpath("claims.toml").read_text(encoding="utf-8")
    try:
        entries = tomllib.loads(text).get("claim", [])
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"vardrop.reproduce: claims must be TOML, got an error: {error}") from None
    claims = [_checked(entry, experiments) for entry in entries]
    for claim in claims:
        if sum(other.id == claim.id for other in claims) > 1:
            raise ValueError(f"vardrop.reproduce: the ids of claims must differ, got {claim.id!r} twice")
    return claims


def _checked(entry: dict[str, Any], experiments: dict[str, Experiment]) -> Claim:
    def require(condition: bool, what: str, got: object) -> None:
        if not condition:
            raise ValueError(f"vardrop.reproduce: claim {entry.get('id', '(no id)')!r}: {what}, got {got}")

    known = {f.name for f in fields(Claim)}
    needed = known - {"published", "expected", "scale", "note"}
    require(set(entry) <= known, f"its keys must be among {', '.join(sorted(known))}", sorted(set(entry) - known))
    require(needed <= set(entry), f"must have {', '.join(sorted(needed))}", f"none of {sorted(needed - set(entry))}")
    claim = Claim(**entry)
    targets = {"published": claim.published, "expected": claim.expected}
    require((claim.published is None) != (claim.expected is None), "must have published or expected, not both", targets)
    require(claim.relation in RELATIONS, f"relation must be one of {', '.join(RELATIONS)}", repr(claim.relation))
    require(claim.scale in (None, "cpu", "gpu"), "scale must be cpu or gpu", repr(claim.scale))
    names = ", ".join(experiments)
    require(claim.experiment in experiments, f"experiment must be one of {names}", repr(claim.experiment))
    kind, size = next(iter(claim.tolerance.items()), ("", 0))
    known_size = (kind == "factor" and size >= 1) or (kind == "absolute" and size >= 0)
    form = "tolerance must be {factor = f}, f at least 1, or {absolute = a}, a at least 0"
    require(len(claim.tolerance) == 1 and known_size, form, claim.tolerance)
    return claim


def judge(claim: Claim, results: list[Result], experiments: dict[str, Experiment]) -> Verdict:
    """Our number against the claim's, from the largest scale whose cells are all finished."""
    experiment = experiments[claim.experiment]
    reasons = []
    for scale in (claim.scale,) if claim.scale else ("gpu", "cpu"):
        found, missing = finished(results, experiment, scale)
        if found and not missing:
            return compare(claim, scale, experiment.rows(found))
        if found:
            reasons.append(f"{len(found)} of {len(found) + missing} cells at scale {scale}")
    if not reasons and finished(results, experiment, SCALES[0])[0]:
        reasons.append("smoke only")
    return Verdict(claim, NOT_RUN, reason=", ".join(reasons))


def compare(claim: Claim, scale: str, rows: list[Row]) -> Verdict:
    """The number that the claim selects among rows, against the claim's: it must be one number of one row."""
    chosen = [row for row in rows if all(k in row and row[k] == v for k, v in claim.select.items())]
    if len(chosen) != 1:
        return Verdict(claim, UNCLEAR, None, scale, f"must select one row, selects {len(chosen)} with {claim.select}")
    ours = chosen[0].get(claim.metric)
    if isinstance(ours, bool) or not isinstance(ours, int | float):
        return Verdict(claim, UNCLEAR, None, scale, f"must find a number in {claim.metric!r}, finds {ours!r}")
    if not claim.agrees(ours):
        return Verdict(claim, OUTSIDE, ours, scale)
    exactly = claim.relation == "about" or claim.agrees(ours, tolerant=False)
    return Verdict(claim, HOLDS if exactly else WITHIN, ours, scale)
