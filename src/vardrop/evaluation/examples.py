"""Which examples a run is to predict: rows of its own data, another set of the same shape, or a new file.

A new file is standardised by the training rows of the run, never by itself: its first column times two is a different
file, not the same one in other units.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from vardrop.data import Data, load, tables
from vardrop.evaluation.runs import OpenRun

SPLITS = ("test", "train")
MADE = ("noise", "shuffled")  # sets of strange examples that need no files
NO_CLASS = -1  # the label of an example whose class is not known; of a number it is nan
_FAR = 5.0  # standard deviations up to which made rows of a table go


class Examples(NamedTuple):
    """What to predict.

    Attributes:
        name: what to call the set.
        x: ``[N, *shape]``.
        y: ``[N]``, classes or numbers, where known: else ``NO_CLASS`` or nan.
        note: what a reader should know about it, or nothing.
    """

    name: str
    x: Tensor
    y: Tensor
    note: str = ""

    @property
    def known(self) -> Tensor:
        """``[N]``, whether the truth is known."""
        return ~self.y.isnan() if self.y.is_floating_point() else self.y != NO_CLASS

    def first(self, limit: int | None) -> Examples:
        """At most so many of them."""
        return self if limit is None else self._replace(x=self.x[:limit], y=self.y[:limit])


def examples(run: OpenRun, data: str | None = None, split: str = "test") -> Examples:
    """The examples of a set, as the run's network wants them.

    Args:
        run: whose network is to see them.
        data: None for the run's own data; the name of a set of images of the same shape; a CSV file with the columns of
            the run's table, with or without the last one, the target.
        split: ``"test"`` or ``"train"``; a file that is not the run's own is taken whole.

    Raises:
        FileNotFoundError: if the set is not there.
        ValueError: if it does not fit the run, or there is no such split.
    """
    if split not in SPLITS:
        raise ValueError(f"vardrop.evaluation: split must be one of {', '.join(SPLITS)}, got {split!r}")
    own = run.data
    if data is None or data == run.config.data:
        x, y = (own.train_x, own.train_y) if split == "train" else (own.test_x, own.test_y)
        return Examples(own.name, x, y)
    if data.lower().endswith(".csv"):
        return _file(run, Path(data).expanduser())
    other = load(data, run.root)
    if not (own.images and other.images):
        raise ValueError(
            f"vardrop.evaluation: a run on a table must be given a CSV file with its columns, got {data!r} for a run "
            f"on {own.name}; other tables have columns of another meaning"
            if not own.images
            else f"vardrop.evaluation: a run on images must be given images, got {data!r} for a run on {own.name}"
        )
    _same_shape(other.name, other.shape, own)
    x, y = (other.train_x, other.train_y) if split == "train" else (other.test_x, other.test_y)
    if not len(x):
        raise ValueError(f"vardrop.evaluation: {other.name} must have {split} rows, got none; choose another --split")
    if other.classes == own.classes:
        return Examples(other.name, x, y)
    note = f"The classes of {other.name} are not those of {own.name}, so its labels are left out."
    return Examples(other.name, x, torch.full_like(y, NO_CLASS), note)


def strange(run: OpenRun, name: str, number: int, seed: int) -> Examples:
    """Examples that the run's data do not have.

    ``"noise"`` is drawn evenly from [0, 1] for every pixel, or from five standard deviations around the mean of a
    column. ``"shuffled"`` are test examples with the pixels of each picture in random order, or with every column of a
    table in an order of its own: what one pixel or column says stays as it was, what several say together is gone.
    Anything else is as for :func:`examples`.

    Args:
        run: whose data they are not.
        name: of the set.
        number: at most so many.
        seed: of what is drawn.

    Raises:
        FileNotFoundError: if the set is not there.
        ValueError: if it does not fit the run, or is the run's own.
    """
    own = run.data
    if name not in MADE:
        if name == run.config.data:
            raise ValueError(f"vardrop.evaluation: a strange set must not be the run's own, got {name!r}; name another")
        return examples(run, name).first(number)
    generator = torch.Generator().manual_seed(seed)
    x = own.test_x[:number]
    if name == "noise":
        low, high = (0.0, 1.0) if own.images else (-_FAR, _FAR)
        drawn = low + (high - low) * torch.rand(x.shape, generator=generator)
    elif own.images:
        pixels = x.flatten(2)  # [N, channels, pixels]
        order = torch.rand(len(x), 1, pixels.shape[2], generator=generator).argsort(-1)
        drawn = pixels.gather(2, order.expand_as(pixels)).reshape(x.shape)
    else:
        drawn = x.gather(0, torch.rand(x.shape, generator=generator).argsort(0))
    return Examples(name, drawn, torch.full((len(x),), NO_CLASS))


def _same_shape(name: str, shape: tuple[int, ...], own: Data) -> None:
    if shape != own.shape:
        raise ValueError(
            f"vardrop.evaluation: examples must have the shape of those of {own.name}, "
            f"{' × '.join(map(str, own.shape))}, got {name} of {' × '.join(map(str, shape))}; choose a set of that "
            "shape, or one that is made: noise, shuffled"
        )


def _file(run: OpenRun, path: Path) -> Examples:
    """A CSV file with the columns of the run's table."""
    if run.data.images:
        raise ValueError(
            f"vardrop.evaluation: a run on images must be given images, got the table {path} for a run on "
            f"{run.data.name}; name a set of images"
        )
    (width,), header, scaling = run.data.shape, list(run.data.columns), run.data.scaling
    lines = tables.read_lines(path)
    names = lines[0][1]
    if all(tables.as_number(cell) is None for cell in names):
        lines = lines[1:]
        if header and names not in (header, header[:-1]):
            raise ValueError(
                f"vardrop.evaluation: the columns of {path} must be those of the run's own file, {', '.join(header)} "
                f"(the last may be left out), got {', '.join(names)}; put them in that order"
            )
    if not lines:
        raise ValueError(f"vardrop.evaluation: {path} must have rows below its header, got none")
    if len(names) not in (width, width + 1):
        raise ValueError(
            f"vardrop.evaluation: {path} must have {width} columns, or {width + 1} with the target, got {len(names)}"
        )
    rows = [
        [tables.finite_number(path, line, column, cell) for column, cell in enumerate(cells[:width], 1)]
        for line, cells in lines
    ]
    x = scaling(np.array(rows)) if scaling is not None else torch.tensor(rows)
    targets = [(line, cells[width]) for line, cells in lines] if len(names) > width else [(0, "")] * len(lines)
    return Examples(path.stem, x, _truths(run, path, targets))


def _truths(run: OpenRun, path: Path, cells: list[tuple[int, str]]) -> Tensor:
    """Classes by their names, or numbers; an empty cell is a truth that is not known."""
    found: list[float] = []
    for line, cell in cells:
        value = tables.as_number(cell)
        if run.regression:
            if cell and value is None:
                raise ValueError(
                    f"vardrop.evaluation: the target in line {line} of {path} must be a number, got {cell!r}; leave "
                    "the cell empty where it is not known"
                )
            found.append(float("nan") if value is None else value)
            continue
        name = f"{value:.0f}" if value is not None and value.is_integer() else cell
        if cell and name not in run.data.classes:
            raise ValueError(
                f"vardrop.evaluation: the label in line {line} of {path} must be a class of the run, "
                f"{', '.join(run.data.classes)}, got {cell!r}; leave the cell empty where it is not known"
            )
        found.append(run.data.classes.index(name) if cell else NO_CLASS)
    return torch.tensor(found, dtype=torch.float32 if run.regression else torch.int64)
