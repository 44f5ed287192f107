"""Tables: the UCI regression sets with their standard splits, and any CSV file."""

from __future__ import annotations

import csv
import math
import re
from pathlib import Path

import numpy as np
import torch

from vardrop.data.dataset import Data, as_tensor, partition, standardise
from vardrop.data.places import SOURCES, UCI_FILES, Source, need, roots

FEW = 20  # an integer target with more values than this is a quantity, not a class
FEWEST_ROWS = 5


def uci(name: str, split: int, root: Path | None) -> Data:
    """A folder of ``data.txt`` and index files, one pair for each standard split (Hernández-Lobato and Adams 2015).

    Args:
        name: of the folder below ``uci``.
        split: which of the splits.
        root: see :func:`load`.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks a file.
        ValueError: if there is no such split, or the files are not what they should be.
    """
    folder = _uci_folder(name, root)
    rows = _numbers(folder / "data.txt", 2)
    features, (target, *more) = (
        _indices(folder / f"index_{which}.txt", rows.shape[1]) for which in ("features", "target")
    )
    if more:
        raise ValueError(f"vardrop.data: {folder / 'index_target.txt'} must name one column, got {1 + len(more)}")
    splits = int(_numbers(folder / "n_splits.txt", 1)[0])
    if not 0 <= split < splits:
        raise ValueError(f"vardrop.data: split of uci:{name} must be from 0 to {splits - 1}, got {split}")
    train, test = (_indices(folder / f"index_{half}_{split}.txt", len(rows)) for half in ("train", "test"))
    if np.intersect1d(train, test).size:
        raise ValueError(
            f"vardrop.data: split {split} in {folder} must have its training and test rows apart, got rows in both"
        )
    train_x, test_x = standardise(rows[train][:, features], rows[test][:, features])
    y = as_tensor(rows[:, target])
    return Data(f"UCI {name}", "regression", train_x, y[train], test_x, y[test])


def table(path: Path, split: int) -> Data:
    """A CSV file: the last column is the target, the others are numbers.

    Columns are set apart by commas, semicolons or tabs. The first row is a header if none of its cells but the last
    is a number. The target is a class if it is text, or has at most 20 values, all integer; else it is a quantity.
    A fifth of the rows, of every class, is for testing.

    Args:
        path: of the file.
        split: seed of the split.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: with row and column of what is not as it should be.
    """
    lines = _rows(path)
    header = all(_number(cell) is None for cell in lines[0][1][:-1]) and _number(lines[0][1][0]) is None
    lines = lines[1:] if header else lines
    if len(lines) < FEWEST_ROWS:
        raise ValueError(
            f"vardrop.data: {path} must have at least {FEWEST_ROWS} rows below its header, got {len(lines)}"
        )
    x = np.array(
        [[_cell(path, row, column, cell) for column, cell in enumerate(cells[:-1], 1)] for row, cells in lines]
    )
    y, classes = _target(path, [(row, cells[-1].strip()) for row, cells in lines], len(lines[0][1]))
    train, test = partition(len(x), split, y if classes else None)
    train_x, test_x = standardise(x[train], x[test])
    target = torch.from_numpy(y) if classes else as_tensor(y)
    if not torch.isfinite(target).all() or not torch.isfinite(test_x).all():
        raise ValueError(f"vardrop.data: the numbers of {path} must fit float32, got some beyond 3e38")
    task = "classification" if classes else "regression"
    return Data(path.stem, task, train_x, target[train], test_x, target[test], classes)


def _uci_folder(name: str, root: Path | None) -> Path:
    key = f"uci:{name}"
    if key in SOURCES:
        return need(key, root)[0]
    for place in roots(root):  # a folder of one's own
        folder = place / "uci" / name
        if re.fullmatch(r"[\w-]+", name) and all((folder / file).is_file() for file in UCI_FILES):
            return folder
    known = ", ".join(key for key in SOURCES if key.startswith("uci:"))
    looked = "; ".join(str(place / "uci") for place in roots(root))
    raise FileNotFoundError(
        f"vardrop.data: a UCI set must be one of {known}, or a folder in one of {looked}, got {key!r}"
    )


def _numbers(path: Path, ndim: int) -> np.ndarray:
    """Of a text file, all finite."""
    try:
        values = np.loadtxt(path, ndmin=ndim)
    except ValueError as error:
        raise ValueError(
            f"vardrop.data: {path} must have numbers set apart by blanks, got one that breaks ({error})"
        ) from None
    if values.ndim != ndim or values.size == 0 or not np.isfinite(values).all():
        raise ValueError(
            f"vardrop.data: {path} must have finite numbers in {ndim} dimension{'s' * (ndim > 1)}, got shape {values.shape} "
            f"with {int((~np.isfinite(values)).sum())} that are not finite"
        )
    return values


def _indices(path: Path, bound: int) -> np.ndarray:
    if not path.is_file():
        raise FileNotFoundError(f"vardrop.data: {path} must exist, got nothing there; get the folder anew")
    values = _numbers(path, 1)
    indices = values.astype(np.int64)  # upstream writes them as floats
    if (
        (indices != values).any()
        or indices.min() < 0
        or indices.max() >= bound
        or len(np.unique(indices)) < len(indices)
    ):
        raise ValueError(f"vardrop.data: {path} must have different whole numbers from 0 to {bound - 1}, got others")
    return indices


def _rows(path: Path) -> list[tuple[int, list[str]]]:
    """(line of the file, cells) of all rows that are not empty, of equal length."""
    if not path.is_file():
        raise FileNotFoundError(f"vardrop.data: there must be a file {path}, got none (the folder is {Path.cwd()})")
    try:
        text = path.read_text(encoding="utf-8-sig")
        first = next((line for line in text.splitlines() if line.strip()), "")
        delimiter = max(",;\t", key=first.count)
        reader = csv.reader(text.splitlines(), delimiter=delimiter, strict=True)
        rows = [(reader.line_num, cells) for cells in reader if any(cell.strip() for cell in cells)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ValueError(f"vardrop.data: {path} must be a CSV file in UTF-8, got one that breaks ({error})") from None
    if not rows:
        raise ValueError(f"vardrop.data: {path} must have rows, got an empty file")
    width = len(rows[0][1])
    if width < 2:
        raise ValueError(
            f"vardrop.data: {path} must have at least two columns, of which the last is the target, got one; columns are set "
            "apart by commas, semicolons or tabs"
        )
    for line, cells in rows:
        if len(cells) != width:
            raise ValueError(
                f"vardrop.data: every row of {path} must have {width} cells, got {len(cells)} in line {line}"
            )
    return rows


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None


def _cell(path: Path, row: int, column: int, cell: str) -> float:
    value = _number(cell)
    if value is None or not math.isfinite(value):
        raise ValueError(
            f"vardrop.data: every column of {path} but the last must have finite numbers, got {cell.strip()!r} in line {row}, "
            f"column {column}; take such rows out or fill them in"
        )
    return value


def _target(path: Path, cells: list[tuple[int, str]], column: int) -> tuple[np.ndarray, tuple[str, ...]]:
    """Class indices and their names, or quantities and no names."""
    values = [_number(cell) for _, cell in cells]
    for (row, cell), value in zip(cells, values, strict=True):
        if cell == "" or (value is not None and not math.isfinite(value)):
            raise ValueError(
                f"vardrop.data: the target of {path} must be given and finite in every row, got {cell!r} in line {row}, column {column}"
            )
    texts = [i for i, value in enumerate(values) if value is None]
    if texts and len(texts) < len(cells):
        row, cell = cells[texts[0]]
        raise ValueError(
            f"vardrop.data: the target of {path} must be all numbers or all text, got both, for example {cell!r} in line {row}"
        )
    if not texts:
        y = np.array(values, dtype=np.float64)
        distinct, counts = np.unique(y, return_counts=True)
        if len(distinct) > min(FEW, len(y) // 2) or (distinct != distinct.round()).any():
            return y, ()
        names = tuple(str(int(value)) for value in distinct)
        indices = np.searchsorted(distinct, y)
    else:
        found, indices, counts = np.unique([cell for _, cell in cells], return_inverse=True, return_counts=True)
        names = tuple(map(str, found))
    if len(names) < 2 or counts.min() < 2:
        odd = names[int(counts.argmin())]
        raise ValueError(
            f"vardrop.data: the target of {path} must have at least two classes with at least two rows each, got "
            f"{len(names)} classes of which {odd!r} has {counts.min()} rows"
        )
    return indices.astype(np.int64), names
