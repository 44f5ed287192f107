"""A data set in memory, and how rows are set aside."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

TEST_SHARE = 0.2  # of the sets that come without a split of their own


class Scaling(NamedTuple):
    """How columns were given mean 0 and standard deviation 1; one that is constant becomes 0.

    Attributes:
        unit: float64 ``[features]``, by which a column is divided first: its squares cannot overflow then.
        mean: float64 ``[features]``, in that unit.
        std: float64 ``[features]``, in that unit, infinite for a constant column.
    """

    unit: np.ndarray
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def of(cls, rows: np.ndarray) -> Scaling:
        """That of float64 rows ``[N, features]``."""
        unit = np.abs(rows).max(axis=0, initial=0)
        unit[unit == 0] = 1
        rows = rows / unit
        constant = rows.max(axis=0) == rows.min(axis=0)
        return cls(unit, rows.mean(axis=0), np.where(constant, math.inf, rows.std(axis=0)))

    def __call__(self, rows: np.ndarray) -> Tensor:
        """Rows as the network wants them, float32."""
        return as_tensor((rows / self.unit - self.mean) / self.std)

    def told(self) -> dict[str, object]:
        """What someone who has only the network does with a row, for JSON."""
        std = [None if math.isinf(value) else value for value in (self.unit * self.std).tolist()]
        return {"mean": (self.unit * self.mean).tolist(), "std": std, "is": "(x - mean) / std; 0 where std is null"}


@dataclass(frozen=True)
class Data:
    """A data set in memory, split into training and test rows.

    Attributes:
        name: what to call it in a table or on a page.
        task: ``"classification"`` or ``"regression"``.
        train_x: float32 ``[N, *shape]``.
        train_y: int64 ``[N]`` classes, or float32 ``[N]`` in the units of the data.
        test_x: like ``train_x``.
        test_y: like ``train_y``.
        classes: the names of the classes, empty for regression.
        images: whether x is ``[N, C, H, W]`` in [0, 1]; else it is ``[N, features]``, standardised by the training
            rows.
        scaling: how a table was standardised.
        columns: the header of a table that has one, the target last.
        digest: SHA-256 of the file, if it is one that may change.
    """

    name: str
    task: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor
    classes: tuple[str, ...] = ()
    images: bool = False
    scaling: Scaling | None = None
    columns: tuple[str, ...] = ()
    digest: str = ""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one example."""
        return tuple(self.train_x.shape[1:])

    @property
    def outputs(self) -> int:
        """How many numbers a network has to give: one for each class, or one."""
        return len(self.classes) if self.task == "classification" else 1


def split_validation(data: Data, size: int | float, seed: int) -> tuple[Data, Tensor, Tensor]:
    """Set training rows aside for validation; the test rows are never touched.

    Args:
        data: any data set.
        size: how many rows (int), or which share of them (float between 0 and 1).
        seed: of the permutation that chooses the rows.

    Returns:
        The data with the rows that stay for training, x and y of the rows set aside.

    Raises:
        TypeError: if size is neither int nor float.
        ValueError: if not at least one row is left on either side.

    Example:
        >>> from vardrop.data import load, split_validation
        >>> data, val_x, val_y = split_validation(load("digits"), 200, seed=0)
        >>> len(data.train_x), len(val_x), len(data.test_x)
        (1238, 200, 359)
    """
    if isinstance(size, bool) or not isinstance(size, int | float):
        raise TypeError(f"vardrop.split_validation: size must be a number of rows or a share of them, got {size!r}")
    total = len(data.train_x)
    if isinstance(size, float) and not 0 < size < 1:
        raise ValueError(
            f"vardrop.split_validation: size must be above 0 and below 1 as a share, got {size}; rows are an int"
        )
    rows = round(size * total) if isinstance(size, float) else size
    if not 1 <= rows < total:
        raise ValueError(
            f"vardrop.split_validation: size must leave at least one of the {total} training rows of {data.name} on "
            f"either side, got {size!r}, which is {rows} rows"
        )
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    aside, stay = order[:rows].sort().values, order[rows:].sort().values
    rest = dataclasses.replace(data, train_x=data.train_x[stay], train_y=data.train_y[stay])
    return rest, data.train_x[aside], data.train_y[aside]


def partition(rows: int, seed: int, labels: np.ndarray | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Indices of 80 % training and 20 % test rows, the same for the same seed.

    Args:
        rows: how many there are.
        seed: of the permutation.
        labels: with classes, every class is split 80/20 for itself, with at least one row on either side.

    Returns:
        Sorted indices of the training rows and of the test rows.
    """
    rng = np.random.default_rng(seed)
    groups = [np.arange(rows)] if labels is None else [np.flatnonzero(labels == c) for c in np.unique(labels)]
    test = [rng.permutation(group)[: max(1, round(TEST_SHARE * len(group)))] for group in groups]
    chosen = np.zeros(rows, dtype=bool)
    chosen[np.concatenate(test)] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


def as_tensor(x: np.ndarray) -> Tensor:
    """As float32; what does not fit becomes infinite."""
    with np.errstate(over="ignore"):
        return torch.from_numpy(np.ascontiguousarray(x, dtype=np.float32))
