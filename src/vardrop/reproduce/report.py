"""Results and claims as one Markdown page with figures: reads JSON, runs nothing."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from vardrop.reproduce import claims as claiming
from vardrop.reproduce.claims import Claim, Verdict
from vardrop.reproduce.experiment import Experiment, Row
from vardrop.reproduce.results import Result, finished, left_over

_HEAD = """<!-- Made by `vardrop reproduce report` from results/ and claims.toml; edit those, not this page. -->
# Published results, run again

`vardrop reproduce run NAME --scale cpu` runs an experiment (`run all` runs every one; finished cells are not run
again), `vardrop reproduce report` writes this page, and `vardrop reproduce check` fails if a claim is outside its
tolerance. A target in brackets is not printed in the paper but follows from it; the notes say how. *Within tolerance*
means: not what the paper says, but as near as the claim allows.
"""
_SIGNS = {"at most": "≤", "at least": "≥", "about": "≈"}


def write(results: list[Result], claims: list[Claim], experiments: dict[str, Experiment], page: Path) -> list[Path]:
    """Write the page, and its figures into ``figures`` beside it.

    Raises:
        OSError: if they cannot be written.
    """
    paths = [page]
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        for experiment in experiments.values():
            about = [claim for claim in claims if claim.experiment == experiment.name]
            for scale, found, _ in shown(results, experiment):
                if experiment.figure is not None:
                    paths.append(page.parent / _figure_name(experiment, scale))
                    _draw(experiment, found, about, paths[-1])
        page.write_text(text(results, claims, experiments), encoding="utf-8")
    except OSError as error:
        raise OSError(
            f"vardrop.reproduce: the report must go to {page}, which cannot be written ({error.strerror or error}); "
            "choose another place with --out"
        ) from error
    return paths


def text(results: list[Result], claims: list[Claim], experiments: dict[str, Experiment]) -> str:
    """The page, in Markdown."""
    verdicts = [claiming.judge(claim, results, experiments) for claim in claims]
    parts = [_HEAD, _counts(verdicts)]
    for experiment in experiments.values():
        parts += _section(experiment, results, [v for v in verdicts if v.claim.experiment == experiment.name])
    stale = left_over(results, experiments)
    if stale:
        parts.append("## Left out\n\nNo experiment asks for these any more; the files can be deleted.\n")
        parts.append("".join(f"- `{r.cell.path(Path('results'))}`: {r.config}\n" for r in stale))
    return "\n".join(parts)


def shown(results: list[Result], experiment: Experiment) -> list[tuple[str, list[Result], int]]:
    """What a page shows of an experiment: scale, results, cells still to be run; smoke only if there is no other."""
    every = [(scale, *finished(results, experiment, scale)) for scale in ("gpu", "cpu", "smoke")]
    some = [entry for entry in every if entry[1]]
    return [entry for entry in some if entry[0] != "smoke"] or some


def target(claim: Claim) -> str:
    """The paper's side of a claim, with its tolerance."""
    number = f"{_SIGNS[claim.relation]} {_cell(claim.target)}"
    ((kind, size),) = claim.tolerance.items()
    sign = {"at most": ("×", "+"), "at least": ("÷", "−"), "about": ("×÷", "±")}[claim.relation][kind == "absolute"]
    slack = "" if (kind, size) in (("factor", 1), ("absolute", 0)) else f", {sign} {size:g}"
    return f"{number}{slack}" if claim.published is not None else f"({number}{slack})"


def verdict_text(verdict: Verdict) -> str:
    """A verdict in words."""
    return verdict.status + (f": {verdict.reason}" if verdict.reason else "")


def table(rows: Iterable[Row]) -> str:
    """Rows as a Markdown table; a column for every key, in order of appearance."""
    rows = list(rows)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [[column.replace("_", " ") for column in columns], ["---"] * len(columns)]
    lines += [[_cell(row.get(column)) for column in columns] for row in rows]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def _counts(verdicts: list[Verdict]) -> str:
    order = (claiming.HOLDS, claiming.WITHIN, claiming.OUTSIDE, claiming.UNCLEAR, claiming.NOT_RUN)
    counts = {status: sum(v.status == status for v in verdicts) for status in order}
    return f"{len(verdicts)} claims: " + ", ".join(f"{n} {status}" for status, n in counts.items() if n) + ".\n"


def _section(experiment: Experiment, results: list[Result], verdicts: list[Verdict]) -> list[str]:
    parts = [f"## {experiment.name}\n\n{experiment.summary}\n"]
    if verdicts:
        parts.append(table({
            "claim": v.claim.id, "paper": f"{v.claim.paper}, {v.claim.where}",
            "what": f"{v.claim.row}: {v.claim.quantity}",
            "published": target(v.claim), "ours": v.ours, "scale": v.scale, "verdict": verdict_text(v),
        } for v in verdicts))  # fmt: skip
        parts.append("".join(f"- {v.claim.id}: {v.claim.note}\n" for v in verdicts if v.claim.note))
    every = shown(results, experiment)
    for scale, found, missing in every:
        parts.append(f"### {experiment.name} at scale {scale}\n\n{_provenance(found, missing)}\n")
        if scale == "smoke":
            parts.append("A smoke run shows that the experiment runs; it answers no claim.\n")
        if experiment.figure is not None:
            parts.append(f"![{experiment.summary}]({_figure_name(experiment, scale)})\n")
        rows = [row for row in experiment.rows(found) if row.get("table") not in experiment.figure_only]
        for name in dict.fromkeys(row.get("table") for row in rows):
            parts.append(table({k: v for k, v in r.items() if k != "table"} for r in rows if r.get("table") == name))
    if not every:
        parts.append("Not run yet.\n")
    return parts


def _provenance(found: list[Result], missing: int) -> str:
    def distinct(values: Iterable[object]) -> str:
        return " / ".join(dict.fromkeys(str(value) for value in values))

    cells = f"{len(found)} of {len(found) + missing} cells" if missing else f"{len(found)} cell{'s' * (len(found) > 1)}"
    versions = distinct(", ".join(f"{k} {v}" for k, v in r.versions.items()) for r in found)
    return (
        f"{cells}, {sum(r.seconds for r in found):.0f} s on {distinct(r.device for r in found)}, "
        f"threads: {distinct(r.threads for r in found)}; commit {distinct(r.commit or 'unknown' for r in found)}; "
        f"{versions}."
    )


def _cell(value: object) -> str:
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value).replace("|", "\\|")


def _figure_name(experiment: Experiment, scale: str) -> str:
    return f"figures/{experiment.name}-{scale}.svg"


def _draw(experiment: Experiment, results: list[Result], claims: list[Claim], path: Path) -> None:
    import matplotlib as mpl

    assert experiment.figure is not None  # noqa: S101 - the callers have seen to it
    settings: dict[Any, Any] = {
        "svg.hashsalt": experiment.name,
        "svg.fonttype": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
    }
    with mpl.rc_context(settings):
        drawn = experiment.figure(results, claims)
        path.parent.mkdir(parents=True, exist_ok=True)
        drawn.savefig(path, metadata={"Date": None, "Creator": None})  # nothing that changes from run to run
