"""Test rows of an evaluation as things to look at, for its page."""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.data import Data
from vardrop.evaluation.answers import Classes
from vardrop.evaluation.evaluate import Evaluation
from vardrop.report.examples import MAX_FEATURES, Shown, data_uri
from vardrop.report.uncertainty import Group

EACH = 16  # of a kind


def groups(found: Evaluation, data: Data, each: int = EACH) -> list[Group]:
    """The least certain test rows, and the surest mistakes.

    Args:
        found: of :func:`vardrop.evaluation.evaluate.evaluate`.
        data: that it was found on.
        each: rows of each kind, at most.
    """
    answers, count = found.answers, len(found.y)
    doubtful, mistaken = found.most_doubtful(each), found.sure_and_wrong(each)
    if isinstance(answers, Classes):
        sure = answers.probabilities.amax(-1)
        kinds = [
            ("Least certain", "entropy", f"The highest predictive entropy of {count} test examples, in nats: what the "
             "slider hands to a person first.", doubtful, answers.doubt),
            ("Sure and wrong", "sure", "Mistakes with the highest probability for the wrong class: handing over the "
             "least certain finds these last.", mistaken, sure),
        ]  # fmt: skip
    else:
        off = answers.loss(found.y).sqrt()
        kinds = [
            ("Furthest off", "off by", "The largest errors of the mean, in the units of the target.", mistaken, off),
        ]  # fmt: skip
        if len(answers.samples) > 1:
            kinds.insert(0, ("Least certain", "std", f"The highest standard deviation of the passes among {count} test "
                             "examples: what the slider hands to a person first.", doubtful, answers.std))  # fmt: skip
    note = "" if data.images else _note(data)
    return [
        Group(title, score, caption + note, [_shown(found, data, row, values) for row in rows.tolist()])
        for title, score, caption, rows, values in kinds
    ]


def _note(data: Data) -> str:
    features = data.shape[0]
    first = f" The first {MAX_FEATURES} of {features} features are shown." if features > MAX_FEATURES else ""
    return f"{first} Features are standardised by the training rows."


def _shown(found: Evaluation, data: Data, row: int, scores: Tensor) -> Shown:
    x = found.x[row]
    pixels = (x * 255).round().clamp(0, 255).to(torch.uint8).numpy() if data.images else None
    if isinstance(found.answers, Classes):
        true, said = int(found.y[row]), int(found.answers.predicted[row])
        label, predicted, wrong = data.classes[true], data.classes[said], true != said
    else:
        label, predicted = f"{found.y[row].item():.4g}", f"{found.answers.mean[row].item():.4g}"
        wrong = False
    return Shown(
        label=label,
        predicted=predicted,
        score=float(scores[row]),
        wrong=wrong,
        picture="" if pixels is None else data_uri(pixels),
        features=[] if data.images else x[:MAX_FEATURES].tolist(),
    )
