"""What an evaluation says, in sentences: the numbers come in, the words go out."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

NARROW = "\N{NARROW NO-BREAK SPACE}"


@dataclass(frozen=True)
class Position:
    """What the page says at one position of the slider.

    Attributes:
        share: of the examples that may go to a person, in percent; where the slider stands.
        error: of what the model keeps, in percent or in the units of the target; None where it keeps nothing.
        threshold: above it an example goes to the person; None where all go.
        asked: the share in words.
        handed: how many go, in words.
        left: the error in words.
        caught: how many of the mistakes the person gets, in words; empty for numbers.
        rule: the threshold in words.
        words: all of it in sentences.
    """

    share: float
    error: float | None
    threshold: float | None
    asked: str
    handed: str
    left: str
    caught: str
    rule: str
    words: str


def percent(share: float | None) -> str:
    """A share with as many digits as a person wants: two, and none behind the comma from 10 % on.

    Example:
        >>> from vardrop.report.uncertainty_words import percent
        >>> [percent(share).replace(chr(0x202F), " ") for share in (0.0, 0.00123, 0.0812, 0.5, 0.9984, 1.0)]
        ['0 %', '0.12 %', '8.1 %', '50 %', '99.84 %', '100 %']
    """
    if share is None or not math.isfinite(share):
        return "–"
    value = 100 * share
    near = min(value, 100 - value)  # how far from the nearer end tells how fine it has to be
    digits = 0 if near >= 10 else 1 if near >= 1 else 2
    text = f"{value:.{digits}f}"
    return (text.rstrip("0").rstrip(".") if "." in text else text) + f"{NARROW}%"


def count(number: int) -> str:
    """A whole number, thousands apart."""
    return f"{number:,}".replace(",", NARROW)


def quantity(value: float | None) -> str:
    """Three significant digits."""
    return "–" if value is None or not math.isfinite(value) else f"{value:.3g}"


def positions(evaluation: Mapping[str, Any]) -> list[Position]:
    """Every position of the slider.

    Args:
        evaluation: what ``evaluation.json`` holds; ``referral`` is read, and what the score is.
    """
    columns, score = evaluation["referral"], evaluation["selection"]["score"]
    numbers = evaluation["task"] == "regression"
    total, lost = columns["kept"][0], columns["handed_loss"][-1]
    found = []
    for i, share in enumerate(columns["share"]):
        handed, kept, loss, limit = (columns[name][i] for name in ("handed", "kept", "loss", "threshold"))
        error = loss if loss is None or not numbers else math.sqrt(loss)
        left = quantity(error) if numbers else percent(error)
        gone = round(columns["handed_loss"][i])
        parts = [_person(handed, total, limit, score, None if numbers else (gone, round(lost)))]
        parts.append(_model(handed, kept, left, None if numbers else round(lost) - gone))
        if 0 < handed < total and columns["elsewhere"]:
            told = [f"{percent(shares[i])} of {name}" for name, shares in columns["elsewhere"].items()]
            parts.append(f"By the same rule the person would get {' and '.join(told)}.")
        found.append(
            Position(
                share=100 * share,
                error=None if error is None else error if numbers else 100 * error,
                threshold=limit if handed else None,
                asked=f"{100 * share:.4g}{NARROW}%",
                handed=f"{count(handed)} of {count(total)}",
                left=left,
                caught="" if numbers else f"{count(gone)} of {count(round(lost))}",
                rule=f"above {quantity(limit)} {score['unit']}".strip() if 0 < handed < total else "–",
                words=" ".join(filter(None, parts)),
            )
        )
    return found


def _person(
    handed: int, total: int, limit: float | None, score: Mapping[str, str], mistakes: tuple[int, int] | None
) -> str:
    if not handed:
        return ""
    if handed == total:
        return f"A person gets all {count(total)} test examples."
    above = f"{score['name']} above {quantity(limit)} {score['unit']}".strip()
    caught = "" if mistakes is None else f"; {count(mistakes[0])} of the {count(mistakes[1])} mistakes are among them"
    return f"A person gets {count(handed)} of {count(total)} test examples, those with a {above}{caught}."


def _model(handed: int, kept: int, left: str, wrong: int | None) -> str:
    if not kept:
        return "The model answers none."
    which = f"the other {count(kept)}" if handed else f"all {count(kept)} test examples"
    if wrong is None:
        return f"The model answers {which}, with a root mean squared error of {left}."
    return (
        f"The model answers {which}, and {count(wrong)} of these answers {'is' if wrong == 1 else 'are'} wrong: {left}."
    )


def tells_apart(evaluation: Mapping[str, Any]) -> bool:
    """Whether the model is surer of one answer than of another; else there is nothing to hand anything over by."""
    limits = [limit for limit in evaluation["referral"]["threshold"] if limit is not None]
    return bool(limits[0] != limits[-1])


def headline(evaluation: Mapping[str, Any], at: Position, all_kept: Position) -> str:
    """The one sentence that a reader sees first.

    Args:
        evaluation: what ``evaluation.json`` holds.
        at: the position that the slider starts with.
        all_kept: its first position, where nothing is handed over.
    """
    what = "root mean squared error" if evaluation["task"] == "regression" else "error"
    before, after = all_kept.error, at.error
    if before is not None and before == 0:
        return f"The model makes no mistake on its {count(evaluation['examples'])} test examples."
    if not tells_apart(evaluation):
        unable = "The model is equally sure of all its answers, so it cannot say which to check"
        return f"{unable}. Its {what} is {all_kept.left}."
    if at.share == 0 or after is None:
        return f"If the model answers everything by itself, its {what} is {all_kept.left}."
    hand = f"Hand the {at.asked} least certain to a person"
    if before is not None and after < before:
        return f"{hand} and the {what} of the rest falls from {all_kept.left} to {at.left}."
    return f"{hand} and the {what} of the rest does not fall: it is {at.left}, and was {all_kept.left} before."


def honesty(evaluation: Mapping[str, Any]) -> list[str]:
    """Whether the model's confidence is worth its name, and whether it notices what is strange, a sentence each."""
    found = []
    test = evaluation["test"]
    if "confidence" in test:
        sure, right = test["confidence"], 1 - test["error"]
        gap = sure - right
        manner = "about as sure as it should be" if abs(gap) < 0.01 else "too sure" if gap > 0 else "not sure enough"
        found.append(f"On average it is {percent(sure)} sure and {percent(right)} right: {manner}.")
    key = evaluation["selection"]["score"]["key"]
    for name, scores in evaluation["ood"].items():
        if key not in scores:  # a single pass for numbers, which knows no doubt
            continue
        best = scores[key]["auroc"]
        found.append(
            f"Of a test example and one of {name}, it is less sure of the latter {percent(best)} of the time"
            + (", hardly better than chance." if best < 0.6 else ".")
        )
    return found
