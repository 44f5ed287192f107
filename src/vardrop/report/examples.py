"""Test examples as things to look at: pictures in the page itself, or rows of features."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from vardrop.report.reading import Examples

MAX_FEATURES = 10  # columns that fit a page


@dataclass(frozen=True)
class Shown:
    """One example, in words, with its picture or its features."""

    label: str
    predicted: str
    score: float
    wrong: bool
    picture: str = ""  # data URI
    features: list[float] = field(default_factory=list)


def of_kind(examples: Examples, kind: int) -> list[Shown]:
    """The examples of one kind, the highest score first."""
    chosen = np.flatnonzero(examples.kind == kind)
    order = chosen[np.argsort(-examples.score[chosen], kind="stable")]
    return [_shown(examples, i) for i in order]


def data_uri(image: NDArray[Any]) -> str:
    """A PNG inside a URI, one image pixel a PNG pixel; the page does the enlarging.

    Args:
        image: uint8 [C, H, W], C = 1 for grey or 3 for red, green, blue.
    """
    pixels = image[0] if len(image) == 1 else np.moveaxis(image, 0, -1)
    file = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(pixels)).save(file, format="PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")


def _shown(examples: Examples, i: int) -> Shown:
    inputs = examples.inputs[i]
    label, predicted = examples.label[i], examples.predicted[i]
    real = np.issubdtype(examples.predicted.dtype, np.floating)
    return Shown(
        label=_name(label, examples.classes),
        predicted=_name(predicted, examples.classes),
        score=float(examples.score[i]),
        wrong=not real and bool(label != predicted),
        picture=data_uri(inputs) if inputs.ndim == 3 else "",
        features=[] if inputs.ndim == 3 else [float(value) for value in inputs[:MAX_FEATURES]],
    )


def _name(value: Any, classes: tuple[str, ...]) -> str:
    if isinstance(value, np.floating):
        return f"{value:.0f}" if 1e3 <= abs(value) < 1e9 else f"{value:#.4g}"  # zeros kept: columns line up
    return classes[value] if 0 <= value < len(classes) else str(value)
