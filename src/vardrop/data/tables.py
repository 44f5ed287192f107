"""Tables: the UCI regression sets with their standard splits, and any CSV file."""

from __future__ import annotations

import csv
import hashlib
import io
import math
import re
import warnings
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from vardrop.data.dataset import Data, Scaling, as_tensor, partition
from vardrop.data.places import SOURCES, UCI_FILES, need, roots

FEW = 20  # an integer target with more values than this is a quantity, not a class
FEWEST_ROWS = 5


def uci(name: str, split: int, root: Path | None) -> Data:
    """A folder of ``data.txt`` and index files, a pair for each standard split (Hernández-Lobato and Adams 2015).

    Args:
        name: of the folder below ``uci``.
        split: which of the splits.
        root: see :func:`vardrop.data.load`.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file.
        ValueError: if there is no such split, or the files are not what they should be.
    """
    folder = uci_folder(name, root)
    rows = read_numbers(folder / "data.txt", ndim=2)
    features = read_indices(folder / "index_features.txt", rows.shape[1])
    target = read_indices(folder / "index_target.txt", rows.shape[1])
    if len(target) != 1 or target[0] in features:
        raise ValueError(
            f"vardrop.data: {folder} must have one target column, which is no feature, got target {target.tolist()} "
            f"and features {features.tolist()}"
        )
    splits = int(read_numbers(folder / "n_splits.txt", ndim=1)[0])
    if split >= splits:
        raise ValueError(f"vardrop.data: split of uci:{name} must be from 0 to {splits - 1}, got {split}")
    train, test = (read_indices(folder / f"index_{half}_{split}.txt", len(rows)) for half in ("train", "test"))
    if np.intersect1d(train, test).size:
        raise ValueError(f"vardrop.data: split {split} of {folder} must have no row in both halves, got some")
    scaling = Scaling.of(rows[train][:, features])
    x, y = scaling(rows[:, features]), as_tensor(rows[:, target[0]])
    return Data(f"UCI {name}", "regression", x[train], y[train], x[test], y[test], scaling=scaling)


def table(path: Path, split: int) -> Data:
    """A CSV file: the last column is the target, the others are numbers.

    Columns are set apart by commas, semicolons or tabs. The first row is a header if none of its cells is a number.
    The target is a class if it is text, or integer with at most 20 values, each twice on average; else it is a
    quantity. A fifth of the rows, of every class, is for testing.

    Args:
        path: of the file.
        split: seed of the split.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with line and column of what is not as it should be.
    """
    header, lines = without_header(read_lines(path))
    if len(lines) < FEWEST_ROWS:
        raise ValueError(
            f"vardrop.data: {path} must have at least {FEWEST_ROWS} rows below its header, got {len(lines)}"
        )
    x = np.array(
        [
            [finite_number(path, line, column, cell) for column, cell in enumerate(cells[:-1], 1)]
            for line, cells in lines
        ]
    )
    y, classes = as_target(path, [(line, cells[-1]) for line, cells in lines])
    train, test = partition(len(x), split, y if classes else None)
    scaling = Scaling.of(x[train])
    rows, target = scaling(x), torch.from_numpy(y) if classes else as_tensor(y)
    if not torch.isfinite(target).all() or not torch.isfinite(rows).all():
        raise ValueError(f"vardrop.data: the numbers of {path} must fit float32, got some beyond 3e38")
    task = "classification" if classes else "regression"
    return Data(
        path.stem, task, rows[train], target[train], rows[test], target[test], classes,
        scaling=scaling, columns=header, digest=hashlib.sha256(path.read_bytes()).hexdigest(),
    )  # fmt: skip


def csv_path(name: str, root: Path | None) -> Path:
    """Where a CSV file is: at its name, or in a folder under the last part of it, if it has moved there."""
    path = Path(name).expanduser()
    moved = None if root is None else root / path.name
    return moved if moved is not None and moved.is_file() and not path.is_file() else path


def uci_folder(name: str, root: Path | None) -> Path:
    """The folder of one of the UCI sets."""
    key = f"uci:{name}"
    if key in SOURCES:
        return need(key, root)[0]
    for place in roots(root):  # a folder of one's own
        folder = place / "uci" / name
        if re.fullmatch(r"[\w-]+", name) and all((folder / file).is_file() for file in UCI_FILES):
            return folder
    known = ", ".join(key for key in SOURCES if key.startswith("uci:"))
    looked = "; ".join(str(place / "uci") for place in roots(root))
    raise FileNotFoundError(f"vardrop.data: a UCI set must be {known}, or a folder in one of {looked}, got {key!r}")


def read_numbers(path: Path, ndim: Literal[1, 2]) -> np.ndarray:
    """Of a text file, all finite."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of an empty file
            values = np.loadtxt(path, ndmin=ndim)
    except ValueError as error:
        raise ValueError(f"vardrop.data: {path} must have numbers set apart by blanks, got others ({error})") from None
    bad = int((~np.isfinite(values)).sum())
    if values.ndim != ndim or values.size == 0 or bad:
        raise ValueError(
            f"vardrop.data: {path} must have finite numbers, {'one' if ndim == 1 else 'a row'} a line, got shape "
            f"{values.shape} with {bad} that are not finite"
        )
    return values


def read_indices(path: Path, bound: int) -> np.ndarray:
    """Different whole numbers below a bound, of a text file."""
    if not path.is_file():
        raise FileNotFoundError(f"vardrop.data: there must be a file {path}, got none; get the folder anew")
    values = read_numbers(path, ndim=1)
    indices = values.astype(np.int64)  # upstream writes them as floats
    outside = (indices != values).any() or indices.min() < 0 or indices.max() >= bound
    if outside or len(np.unique(indices)) < len(indices):
        raise ValueError(f"vardrop.data: {path} must have different whole numbers from 0 to {bound - 1}, got others")
    return indices


def read_lines(path: Path) -> list[tuple[int, list[str]]]:
    """(line of the file, cells) of all rows that are not empty, of equal length."""
    if not path.is_file():
        raise FileNotFoundError(f"vardrop.data: there must be a file {path}, got none (seen from {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
        header = next((line for line in text.splitlines() if line.strip()), "")
        reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count), strict=True)
        rows = [(reader.line_num, [cell.strip() for cell in cells]) for cells in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"vardrop.data: {path} must be a CSV file in UTF-8, got another ({error})") from None
    rows = [(line, cells) for line, cells in rows if any(cells)]
    if not rows:
        raise ValueError(f"vardrop.data: {path} must have rows, got an empty file")
    width = len(rows[0][1])
    if width < 2:
        raise ValueError(
            f"vardrop.data: {path} must have at least two columns, of which the last is the target, got one; columns "
            "are set apart by commas, semicolons or tabs"
        )
    for line, cells in rows:
        if len(cells) != width:
            raise ValueError(
                f"vardrop.data: every row of {path} must have {width} cells, got {len(cells)} in line {line}"
            )
    return rows


def without_header(lines: list[tuple[int, list[str]]]) -> tuple[tuple[str, ...], list[tuple[int, list[str]]]]:
    """The names of the columns, if the first row has no number, and the rows below."""
    first = lines[0][1]
    if all(as_number(cell) is None for cell in first) and any(first[:-1]):
        return tuple(first), lines[1:]
    return (), lines


def as_number(cell: str) -> float | None:
    """The number in a cell, or None."""
    try:
        return None if "_" in cell else float(cell)  # Python would read 1_000
    except ValueError:
        return None


def finite_number(path: Path, line: int, column: int, cell: str) -> float:
    """The number in a cell; refused if there is none, or it is not finite."""
    value = as_number(cell)
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"vardrop.data: every column of {path} but the last must have finite numbers, got {cell!r} in line {line}, "
            f"column {column}; take such rows out or fill them in"
        )
    return value


def as_target(path: Path, cells: list[tuple[int, str]]) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices and their names, or quantities and no names."""
    values = [as_number(cell) for _, cell in cells]
    for (line, cell), value in zip(cells, values, strict=True):
        if cell == "" or (value is not None and not math.isfinite(value)):
            raise ValueError(
                f"vardrop.data: the target of {path} must be given and finite in every row, got {cell!r} in line "
                f"{line}; take such rows out"
            )
    texts = [i for i, value in enumerate(values) if value is None]
    if texts and len(texts) < len(cells):
        line, cell = cells[texts[0]]
        raise ValueError(
            f"vardrop.data: the target of {path} must be all numbers or all text, got both: {cell!r} in line {line}"
        )
    if texts:
        words, indices, counts = np.unique([cell for _, cell in cells], return_inverse=True, return_counts=True)
        names = tuple(map(str, words))
    else:
        y = np.array(values, dtype=np.float64)
        distinct, indices, counts = np.unique(y, return_inverse=True, return_counts=True)
        if len(distinct) > min(FEW, len(y) // 2) or (distinct != distinct.round()).any():
            return y, ()
        names = tuple(f"{value:.0f}" for value in distinct)
    if len(names) < 2 or counts.min() < 2:
        rarest = names[int(counts.argmin())]
        raise ValueError(
            f"vardrop.data: the target of {path} must have at least two classes of at least two rows each, got "
            f"{len(names)} of which {rarest!r} has {counts.min()}"
        )
    return indices.astype(np.int64), names
