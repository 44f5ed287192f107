"""The page on uncertainty: what may be left to the model, whether its confidence holds, what it finds strange."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import markupsafe

from vardrop.evaluation.referral import position_of
from vardrop.report import uncertainty_figures as figures
from vardrop.report.examples import Shown
from vardrop.report.pages import _embed, _render, _save
from vardrop.report.uncertainty_words import count, headline, honesty, percent, positions, quantity, tells_apart

DEFAULT_SHARE = 0.1  # where the slider starts if validation has chosen no threshold


@dataclass(frozen=True)
class Group:
    """Examples to look at.

    Attributes:
        title: heading.
        score: name of the number under each.
        caption: what they are, in a sentence.
        shown: the examples, in the order of the page.
    """

    title: str
    score: str
    caption: str
    shown: Sequence[Shown]


def write_uncertainty(evaluation: Mapping[str, Any], groups: Sequence[Group], out: Path) -> Path:
    """Make the page of an evaluation: one file that opens from a disk, without a network.

    The slider and the figures show what is in ``evaluation``; ``page.html#hand=8`` opens it with 8 % handed over.

    Args:
        evaluation: what ``vardrop evaluate`` writes to ``evaluation.json``.
        groups: examples to look at; may be empty.
        out: the HTML file.

    Returns:
        ``out``.

    Raises:
        OSError: if it cannot be written; a page that was there is still there.
    """
    numbers = evaluation["task"] == "regression"
    slider = positions(evaluation)
    at = start(evaluation)
    page = _render(
        "uncertainty.html.j2",
        evaluation=evaluation,
        regression=numbers,
        headline=headline(evaluation, slider[at], slider[0]),
        honesty=honesty(evaluation),
        slider=slider,
        at=at,
        slider_json=_script_json([dataclasses.asdict(position) for position in slider]),
        risk=_embed(figures.risk(slider, evaluation["referral"], at, numbers), "risk"),
        marker=figures.MARKER,
        reliability=[
            (title, _embed(figures.reliability(evaluation["reliability"][when]), f"reliability-{when}"))
            for when, title in _reliability_titles(evaluation)
        ],
        intervals=_embed(figures.intervals(evaluation["intervals"]), "intervals") if numbers else None,
        strange=_strange(evaluation, slider[at].threshold or 0.0),
        lines=[f"strange-{i}-{evaluation['selection']['score']['key']}" for i in range(len(evaluation["ood"]))],
        groups=groups,
        percent=percent,
        count=count,
        quantity=quantity,
    )
    return _save(page, Path(out))


def start(evaluation: Mapping[str, Any]) -> int:
    """Where the slider starts: at what the threshold chosen on validation data hands over, else at a tenth."""
    if not tells_apart(evaluation):
        return 0
    rule = evaluation["selection"]["rule"]
    return position_of(evaluation["referral"], DEFAULT_SHARE if rule is None else 1 - rule["test"]["coverage"])


def _reliability_titles(evaluation: Mapping[str, Any]) -> list[tuple[str, str]]:
    found = []
    if "before" in evaluation.get("reliability", {}):
        found.append(("before", f"As it is: calibration error {percent(evaluation['test']['ece'])}"))
    if "after" in evaluation.get("reliability", {}):
        after = evaluation["calibrated"]
        told = f"Temperature {quantity(after['temperature'])}: calibration error {percent(after['ece'])}"
        found.append(("after", told))
    return found


def _strange(evaluation: Mapping[str, Any], threshold: float) -> list[tuple[str, list[tuple[str, Any]]]]:
    """For every set from elsewhere its name, and for every score a title and a figure."""
    found = []
    for i, (name, scores) in enumerate(evaluation["ood"].items()):
        panels = []
        for key, result in scores.items():
            if not isinstance(result, Mapping):
                continue
            histogram = evaluation["histograms"][key]
            shares = [("test examples", histogram["test"]), (name, histogram["shares"][name])]
            line = threshold if key == evaluation["selection"]["score"]["key"] else None
            figure = figures.distributions(histogram["edges"], shares, histogram["label"], line)
            title = f"{histogram['name']}: AUROC {result['auroc']:.3f}"
            panels.append((title[:1].upper() + title[1:], _embed(figure, f"strange-{i}-{key}")))
        found.append((name, panels))
    return found


def _script_json(value: Any) -> markupsafe.Markup:
    """JSON that stands inside a script element without ending it."""
    text = json.dumps(value, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return markupsafe.Markup(text)  # noqa: S704 - nothing in it can end the element
