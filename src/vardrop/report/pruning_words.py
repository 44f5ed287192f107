"""What pruning has done, in sentences: the numbers come in, the words go out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vardrop.report.uncertainty_words import count, quantity

STAGES = {
    "dense": ("as it was trained", "noise off"),
    "sparse": ("weights removed", "set to zero, nothing trained since"),
    "fine-tuned": ("trained on", "with the zeros kept"),
    "rounded": ("rounded", "to the digits that the noise pays for"),
    "compact": ("compact", "a smaller network that computes the same"),
}


@dataclass(frozen=True)
class Setting:
    """What the page says at one position of the slider.

    Attributes:
        threshold: log α above which everything goes.
        asked: the threshold in words.
        left: how many weights are left, in words.
        share: which part that is, in words.
        error: on validation rows, in words.
        size: of the compressed file, in words.
        words: all of it in a sentence.
        kept: weights left in every layer.
        value: the error as a number, in percent or in the units of the target; None if it was not measured.
        bytes: of the compressed file; None if it was not measured.
        inputs: weights of the first layer left at each input.
    """

    threshold: float
    asked: str
    left: str
    share: str
    error: str
    size: str
    words: str
    kept: list[int]
    value: float | None
    bytes: int | None
    inputs: list[int]


def shown_error(value: float | None, regression: bool) -> str:
    """An error in percent, to its hundredth, or a root mean squared error in the units of the target."""
    return "–" if value is None else quantity(value) if regression else f"{100 * value:.2f}\N{NARROW NO-BREAK SPACE}%"


def size(number: int | None) -> str:
    """Bytes as a person reads them.

    Example:
        >>> from vardrop.report.pruning_words import size
        >>> [size(number).replace(chr(0x202F), " ") for number in (812, 26_000, 1_500_000, None)]
        ['812 bytes', '26.0 kB', '1.50 MB', '–']
    """
    if number is None:
        return "–"
    if number < 10_000:
        return f"{count(number)}\N{NARROW NO-BREAK SPACE}bytes"
    value, unit = (number / 1e3, "kB") if number < 1e6 else (number / 1e6, "MB")
    return f"{value:#.3g}".rstrip(".") + f"\N{NARROW NO-BREAK SPACE}{unit}"


def part(some: int, all_: int) -> str:
    """Which part of all some are, to a tenth of a percent; never all of them or none where it is not."""
    share = 100 * some / all_
    text = f"{share:.1f}" if some in (0, all_) or 0.1 <= share <= 99.9 else f"{share:.2f}"
    return f"{text}\N{NARROW NO-BREAK SPACE}%"


def times(before: float, after: float) -> str:
    """How many times smaller."""
    ratio = before / max(after, 1)
    return f"{ratio:.1f}" if ratio < 100 else f"{ratio:.0f}"


def settings(found: Mapping[str, Any]) -> list[Setting]:
    """Every position of the slider.

    Args:
        found: what ``prune.json`` holds.
    """
    regression = found["task"] == "regression"
    name = "root mean squared error" if regression else "error"
    made = []
    for row in found["positions"]:
        left, all_ = sum(row["kept"]), found["weights"]
        words = f"{count(left)} of {count(all_)} weights are left"
        if row["error"] is not None:
            words += f", with {'an' if name == 'error' else 'a'} {name} of {shown_error(row['error'], regression)} on "
            words += f"{count(found['validation_examples'])} validation examples"
        words += f"; the file takes {size(row['bytes'])}." if row["bytes"] is not None else "."
        if row["chosen"]:
            words += " This is what was chosen."
        value = row["error"] if row["error"] is None or regression else 100 * row["error"]
        made.append(
            Setting(
                threshold=row["threshold"],
                asked=f"{row['threshold']:.2f}".replace("-", "−"),
                left=count(left),
                share=part(left, all_),
                error=shown_error(row["error"], regression),
                size=size(row["bytes"]),
                words=words,
                kept=row["kept"],
                value=value,
                bytes=row["bytes"],
                inputs=row["inputs"],
            )
        )
    return made


def headline(found: Mapping[str, Any]) -> str:
    """The first sentence of the page."""
    regression, measure = found["task"] == "regression", found["measure"]
    left, all_ = found["weights"] - found["removed"], found["weights"]
    first, last = found["test"]["dense"][measure], found["test"]["compact"][measure]
    before, after = shown_error(first, regression), shown_error(last, regression)
    name = "RMSE" if regression else "error"
    moved = f"stays at {after}" if before == after else f"goes from {before} to {after}"
    return (
        f"{count(left)} of {count(all_)} weights are left, one in {times(all_, left)}, and the {name} on "
        f"{count(found['test_examples'])} test examples {moved}."
    )


def smaller(found: Mapping[str, Any]) -> str:
    """What the smaller network and its file come to."""
    before, after = found["compaction"]["parameters"]
    work, less = found["compaction"]["multiply_adds"]
    bytes_, dense = found["bytes"]["compact"]["compressed"], found["bytes"]["dense"]["float32"]
    words = (
        f"The compact network has {count(after)} parameters instead of {count(before)}, and needs {count(less)} "
        f"multiply-adds for an example instead of {count(work)}."
    )
    if bytes_ is None:
        return words
    ratio = times(dense, bytes_)
    return f"{words} Its compressed file has {size(bytes_)}, {ratio} times less than {size(dense)} of float32."


def stages(found: Mapping[str, Any]) -> list[dict[str, str]]:
    """A row for every network that was tested."""
    regression, measure = found["task"] == "regression", found["measure"]
    rows = []
    for name, scores in found["test"].items():
        title, says = STAGES[name]
        rows.append(
            {
                "name": title,
                "says": says,
                "test": shown_error(scores[measure], regression),
                "nll": quantity(scores["nll"]),
                "validation": shown_error(found["validation"].get(name), regression),
            }
        )
    return rows


def tuned(found: Mapping[str, Any]) -> str:
    """What fine-tuning was, in a sentence; empty if there was none."""
    tuning = found["finetuning"]
    if not tuning["epochs"]:
        return ""
    kept = tuning["best_epoch"]
    told = "none was better on the validation examples" if kept is None else f"the weights are those after epoch {kept}"
    if not found["validation_examples"]:
        told = "the weights are the last ones"
    return f"Trained on for {tuning['epochs']} epochs at a learning rate of {tuning['lr']:.3g}; {told}."


def totals(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of a table of layers."""
    formats = ("float32", "csr", "compressed")
    return {
        "weights": sum(row["weights"] for row in layers),
        "removed": sum(row["removed"] for row in layers),
        "parameters": [sum(row["parameters"][i] for row in layers) for i in (0, 1)],
        "multiply_adds": [sum(row["multiply_adds"][i] for row in layers) for i in (0, 1)],
        "bytes": {
            form: None
            if any(row["bytes"][form] is None for row in layers)
            else sum(row["bytes"][form] for row in layers)
            for form in formats
        },
    }
