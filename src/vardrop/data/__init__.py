"""Real data sets, found or fetched, in memory as tensors."""

from __future__ import annotations

import difflib
from pathlib import Path

from vardrop.data.dataset import Data, split_validation
from vardrop.data.images import cifar10, digits, mnist_like
from vardrop.data.listing import Found, listing
from vardrop.data.places import SOURCES, download
from vardrop.data.tables import csv_path, table, uci

__all__ = ["Data", "Found", "download", "listing", "load", "split_validation"]


def load(name: str, root: Path | None = None, split: int = 0) -> Data:
    """Read a data set into memory.

    Folders are looked for below ``root``, then ``$VARDROP_DATA``, ``./data`` and the user's cache:
    ``mnist``, ``fashion-mnist``, ``notmnist`` (idx files, gzipped), ``cifar10`` (the original archive, else a JPEG
    re-encoding, whose name says so), ``uci/NAME``. notMNIST in its usual form has no training rows: it is there to be
    told from MNIST.

    Args:
        name: ``digits``, ``mnist``, ``fashion-mnist``, ``cifar10``, ``notmnist``, ``uci:NAME`` or the path of a CSV
            file, whose last column is the target.
        root: a folder to look in first; for a CSV file that is no longer where it was, a folder with one of its name.
        split: of a UCI set, the standard split; of digits and of CSV files, the seed that chooses the test rows.

    Returns:
        The data.

    Raises:
        FileNotFoundError: if the files are not there, with the folders looked in and how to get them.
        ValueError: if there is no such name or split, or if a file is not what it should be.

    Example:
        >>> from vardrop.data import load
        >>> data = load("digits")
        >>> data.shape, data.outputs, len(data.train_x), len(data.test_x)
        ((1, 8, 8), 10, 1438, 359)
    """
    if isinstance(split, bool) or not isinstance(split, int) or split < 0:
        raise ValueError(f"vardrop.data: split must be a whole number from 0 on, got {split!r}")
    if name.lower().endswith(".csv"):
        return table(csv_path(name, root), split)
    if name.startswith("uci:"):
        return uci(name.removeprefix("uci:"), split, root)
    if name == "digits":
        return digits(split)
    if name not in SOURCES:
        close = difflib.get_close_matches(name, ["digits", *SOURCES], n=1)
        raise ValueError(
            "vardrop.data: name must be digits, mnist, fashion-mnist, cifar10, notmnist, uci:NAME or the path of a "
            f".csv file, got {name!r}" + (f"; did you mean {close[0]}?" if close else "")
        )
    if split != 0:
        raise ValueError(f"vardrop.data: split of {name} must be 0, for it has one standard split, got {split}")
    return cifar10(root) if name == "cifar10" else mnist_like(name, root)
