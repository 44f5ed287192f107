"""A run directory read back: what its files say, checked once, so that the pages can trust it.

Only ``config.json`` has to be there. A run that is still going has no summary, a method without noise has no rates,
and both are fine; a file that is there and says something else than it should is an error with its name.
"""

from __future__ import annotations

import json
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open

QUANTILES = ("q05", "q25", "q50", "q75", "q95")
KINDS = (0, 1)  # worst, most uncertain
_CURVES = ("seconds", "train_nll", "kl", "kl_scale", "val_nll", "val_error", "val_rmse")
_RESULTS = ("test_error", "test_rmse", "test_nll", "kl", "seconds", "epochs_run", "best_epoch", "parameters")


@dataclass(frozen=True)
class Examples:
    """Test examples worth a look; n examples of C channels, or of F features."""

    inputs: NDArray[Any]  # uint8 [n, C, H, W] or float [n, F]
    label: NDArray[Any]  # [n]
    predicted: NDArray[Any]  # [n]
    score: NDArray[Any]  # [n]
    kind: NDArray[Any]  # [n], one of KINDS
    classes: tuple[str, ...] = ()  # names, where the file has them


@dataclass(frozen=True)
class Run:
    """What the files of one run directory say."""

    path: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # a line an epoch, by epoch
    summary: dict[str, Any] | None
    examples: Examples | None
    notes: tuple[str, ...] = ()  # what is odd or missing, a sentence each

    @property
    def final_rates(self) -> dict[str, dict[str, Any]]:
        """Weight name -> mean, min, max and histogram of its rates; empty where none was learned, or not yet."""
        return (self.summary or {}).get("rates") or {}

    @property
    def layers(self) -> list[str]:
        """Names of the weights with rates, in the order of the network."""
        seen = dict.fromkeys(self.final_rates)
        for line in self.metrics:
            seen.update(dict.fromkeys(line.get("rates") or {}))
        return list(seen)

    @property
    def best_epoch(self) -> int | None:
        """The epoch whose weights were kept; None while the run goes on."""
        best = (self.summary or {}).get("best_epoch")
        return None if best is None else int(best)

    @property
    def data(self) -> str:
        """Name of the data set; of a file, without its folders."""
        told = (self.summary or {}).get("data")  # how the data set is called, which may say more than its option
        data = str(told or self.config["data"])
        return Path(data).name if data.lower().endswith(".csv") else data

    @property
    def regression(self) -> bool:
        """Whether it predicts numbers."""
        return "test_rmse" in (self.summary or {}) or any("val_rmse" in line for line in self.metrics)

    @property
    def command(self) -> str:
        """The command line that trains this run again."""
        words = ["vardrop", "train"]
        for name, value in self.config.items():
            if value is True:
                words.append(f"--{name.replace('_', '-')}")
            elif value is not None and value is not False:
                words += [f"--{name.replace('_', '-')}", str(value)]
        return shlex.join([*words, "--out", f"{self.path.name}-again"])


def read(path: Path) -> Run:
    """Read a run directory.

    Args:
        path: the folder that ``vardrop train --out`` wrote.

    Raises:
        FileNotFoundError: if there is no such folder, or it has no ``config.json``.
        ValueError: if a file in it is broken, or does not belong to a run.
    """
    path = Path(path).resolve()
    if not (path / "config.json").is_file():
        given = "a folder without config.json" if path.is_dir() else "no such folder"
        raise FileNotFoundError(
            f"vardrop.report: needs the folder of a run, got {path} ({given}); `vardrop train --out DIR` makes one"
        )
    config = _config(path / "config.json")
    metrics, notes = _metrics(path / "metrics.jsonl")
    summary = _summary(path / "summary.json")
    if summary is None:
        notes.append("There is no summary.json yet: the run is still going, or was stopped before its test.")
    return Run(path, config, metrics, summary, _examples(path / "examples.safetensors"), tuple(notes))


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and bool(np.isfinite(value))


def _object(text: str, where: str) -> dict[str, Any]:
    shown = repr(text if len(text) <= 60 else text[:60] + "…")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(
            f"vardrop.report: {where} must be a JSON object, got {shown} ({error.msg}); "
            "if the run was killed while writing, continue it with --resume"
        ) from None
    if not isinstance(value, dict):
        raise ValueError(f"vardrop.report: {where} must be a JSON object, got {shown}; is this the folder of a run?")
    return value


def _numbers(table: dict[str, Any], names: tuple[str, ...], where: str) -> None:
    """Each of the names is a number, null or absent."""
    for name in names:
        value = table.get(name)
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float)):
            raise ValueError(f"vardrop.report: {name} in {where} must be a number, got {value!r}; train the run again")


def _rates(table: dict[str, Any], names: tuple[str, ...], where: str) -> dict[str, dict[str, Any]]:
    """The rates of each weight, with all the named numbers."""
    rates = table.get("rates") or {}
    whole = isinstance(rates, dict) and all(
        isinstance(row, dict) and all(row.get(name) is not None for name in names) for row in rates.values()
    )
    if not whole:
        raise ValueError(
            f"vardrop.report: rates in {where} must have {', '.join(names)} for every weight, got {rates!r:.80}; "
            "train the run again"
        )
    for weight, row in rates.items():
        _numbers(row, names, f"the rates of {weight} in {where}")
    return rates


def _config(path: Path) -> dict[str, Any]:
    config = _object(path.read_text("utf-8", errors="replace"), str(path))
    for name in ("data", "model", "method"):
        if not isinstance(config.get(name), str):
            raise ValueError(
                f"vardrop.report: {path} must name the data, the model and the method of a run, got "
                f"{name}={config.get(name)!r}; is this the folder of a run?"
            )
    return config


def _metrics(path: Path) -> tuple[list[dict[str, Any]], list[str]]:
    if not path.is_file():
        return [], ["There is no metrics.jsonl: no epoch has been finished."]
    lines: dict[int, dict[str, Any]] = {}
    repeated = False
    for number, text in enumerate(path.read_text("utf-8", errors="replace").splitlines(), start=1):
        where = f"line {number} of {path}"
        line = _object(text, where)
        epoch = line.get("epoch")
        if isinstance(epoch, bool) or not isinstance(epoch, int):
            raise ValueError(
                f"vardrop.report: {where} must have an epoch, an integer, got {epoch!r}; is this the folder of a run?"
            )
        _numbers(line, _CURVES, where)
        _rates(line, QUANTILES, where)
        repeated |= epoch in lines
        lines[epoch] = line
    notes = []
    if not lines:
        notes.append("metrics.jsonl is empty: no epoch has been finished.")
    if repeated:
        notes.append("metrics.jsonl has some epochs more than once; the last line of each is shown.")
    return [lines[epoch] for epoch in sorted(lines)], notes


def _summary(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    summary = _object(path.read_text("utf-8", errors="replace"), str(path))
    if "test_error" not in summary and "test_rmse" not in summary:
        raise ValueError(
            f"vardrop.report: {path} must have test_error or test_rmse, got {', '.join(summary) or 'an empty object'}; "
            "is this the folder of a run?"
        )
    _numbers(summary, _RESULTS, str(path))
    for weight, row in _rates(summary, ("mean", "min", "max"), str(path)).items():
        edges, counts = row.get("edges"), row.get("counts")
        whole = isinstance(edges, list) and isinstance(counts, list) and len(edges) == len(counts) + 1
        if not whole or not all(_finite(value) for value in [*row["edges"], *row["counts"]]):
            raise ValueError(
                f"vardrop.report: the histogram of {weight} in {path} must have one more edge than counts, all of them "
                f"finite numbers, got edges={edges!r:.40} counts={counts!r:.40}; train the run again"
            )
    return summary


def _examples(path: Path) -> Examples | None:
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="numpy") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
            classes = json.loads((file.metadata() or {}).get("classes", "[]"))
    except (SafetensorError, json.JSONDecodeError) as error:
        raise ValueError(
            f"vardrop.report: {path} must be a safetensors file, got one that cannot be read ({error}); "
            "delete it to have a page without examples"
        ) from None
    columns = {name: tensors.get(name) for name in ("label", "predicted", "score", "kind")}
    image, features = tensors.get("image"), tensors.get("features")
    inputs = features if image is None else image
    right = (
        inputs is not None
        and (inputs.ndim == 2 if image is None else inputs.ndim == 4 and inputs.shape[1] in (1, 3))
        and (image is None or image.dtype == np.uint8)
        and all(column is not None and column.shape == (len(inputs),) for column in columns.values())
    )
    if not right:
        shapes = ", ".join(f"{name} {tensor.dtype}{list(tensor.shape)}" for name, tensor in tensors.items())
        raise ValueError(
            f"vardrop.report: {path} must have image uint8[n, 1 or 3, H, W] or features [n, F], and label, predicted, "
            f"score, kind [n], got {shapes or 'nothing'}; delete it to have a page without examples"
        )
    return Examples(inputs, classes=tuple(map(str, classes)), **columns)  # type: ignore[arg-type]
