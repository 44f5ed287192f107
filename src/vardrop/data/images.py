"""Sets of images: scikit-learn's digits, the MNIST format, CIFAR-10 as it was published or as JPEG files end to end."""

from __future__ import annotations

import gzip
import io
import itertools
import pickle
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor

from vardrop.data.dataset import Data, as_tensor, partition
from vardrop.data.places import ARCHIVE_FILE, BROKEN_GZIP, IDX_FILES, need

_NUMERALS = tuple("0123456789")
_CLASSES = {
    "mnist": _NUMERALS,
    "fashion-mnist": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
    "notmnist": tuple("ABCDEFGHIJ"),
    "cifar10": ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"),
}  # fmt: skip
_TITLES = {"mnist": "MNIST", "fashion-mnist": "Fashion-MNIST", "notmnist": "notMNIST"}


def digits(split: int) -> Data:
    """1,797 digits of 8 × 8 that come with scikit-learn; ``split`` is the seed of an 80/20 split within every class."""
    bunch = load_digits()
    x, y = as_tensor(bunch.images[:, None] / 16), torch.from_numpy(bunch.target.astype(np.int64))
    train, test = partition(len(x), split, bunch.target)
    return Data("digits", "classification", x[train], y[train], x[test], y[test], _NUMERALS, images=True)


def mnist_like(name: str, root: Path | None) -> Data:
    """Four files in the format of MNIST; where only the test half is there, there are no training rows."""
    folder, files = need(name, root)
    test_x, test_y = _pairs(*(folder / file for file in files[-2:]))
    train_x, train_y = test_x[:0], test_y[:0]
    if files == IDX_FILES:
        train_x, train_y = _pairs(*(folder / file for file in files[:2]))
    return Data(_TITLES[name], "classification", train_x, train_y, test_x, test_y, _CLASSES[name], images=True)


def cifar10(root: Path | None) -> Data:
    """The original archive of Python pickles, else the JPEG re-encoding, whose name says so."""
    folder, files = need("cifar10", root)
    if files == (ARCHIVE_FILE,):
        name, halves = "CIFAR-10", _from_archive(folder / ARCHIVE_FILE)
    else:
        name, halves = "CIFAR-10 (JPEG q75)", _from_jpeg(folder / files[0])
    (train_x, train_y), (test_x, test_y) = halves
    return Data(name, "classification", train_x, train_y, test_x, test_y, _CLASSES["cifar10"], images=True)


def read_idx(path: Path, ndim: int) -> np.ndarray:
    """An array of bytes in the idx format of MNIST: two zeros, type 8, rank, sizes (big-endian), bytes; gzipped.

    Args:
        path: of the ``.gz``.
        ndim: the rank it must have, 3 for images and 1 for labels.

    Raises:
        ValueError: if the file is not whole, or something else.
    """
    try:
        with gzip.open(path) as file:
            raw = file.read()
    except BROKEN_GZIP as error:
        raise ValueError(
            f"vardrop.data: {path} must be a whole gzip file, got one that breaks ({error}); get it anew"
        ) from None
    magic = bytes((0, 0, 8, ndim))
    if raw[:4] != magic:
        raise ValueError(
            f"vardrop.data: {path} must be an idx file of rank {ndim}, which starts with {magic.hex()}, got "
            f"{raw[:4].hex() or 'an empty file'}; get it anew"
        )
    start = 4 + 4 * ndim
    sizes = [int.from_bytes(raw[i : i + 4], "big") for i in range(4, start, 4)]
    if len(raw) - start != np.prod(sizes, dtype=np.int64):
        raise ValueError(
            f"vardrop.data: {path} must have {' × '.join(map(str, sizes))} bytes after its header, got "
            f"{len(raw) - start}; get it anew"
        )
    return np.frombuffer(raw, np.uint8, offset=start).reshape(sizes)


def _pairs(images: Path, labels: Path) -> tuple[Tensor, Tensor]:
    x, y = read_idx(images, 3), read_idx(labels, 1)
    if x.shape[1:] != (28, 28):
        raise ValueError(f"vardrop.data: {images} must have images of 28 × 28, got {' × '.join(map(str, x.shape[1:]))}")
    return _scaled(x[:, None]), _labels(y, len(x), labels)


def _scaled(x: np.ndarray) -> Tensor:
    """Bytes as float32 in [0, 1]."""
    return torch.from_numpy(x.astype(np.float32)).div_(255)


def _labels(y: np.ndarray, images: int, path: Path) -> Tensor:
    if y.shape != (images,) or (images and y.max() > 9):
        raise ValueError(
            f"vardrop.data: {path} must have a label from 0 to 9 for each of {images} images, got {y.size} labels"
            + (f" up to {y.max()}" if y.size else "")
        )
    return torch.from_numpy(y.astype(np.int64))


def _from_jpeg(path: Path) -> list[tuple[Tensor, Tensor]]:
    """Arrays ``jpeg_``, ``offset_``, ``y_`` of ``train`` and ``test``: JPEG files end to end, and where each starts."""
    halves = []
    try:
        with path.open("rb") as file, np.load(file) as arrays:
            for half in ("train", "test"):
                stream, offset, y = arrays[f"jpeg_{half}"], arrays[f"offset_{half}"], arrays[f"y_{half}"]
                x = np.empty((len(offset) - 1, 32, 32, 3), np.uint8)
                for i, (start, end) in enumerate(itertools.pairwise(offset)):
                    x[i] = np.asarray(Image.open(io.BytesIO(stream[start:end].tobytes()))).reshape(32, 32, 3)
                halves.append((_scaled(x.transpose(0, 3, 1, 2)), _labels(y, len(x), path)))
    except (ValueError, KeyError, TypeError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"vardrop.data: {path} must have CIFAR-10 as JPEG files, arrays jpeg_, offset_, y_ of train and test, got "
            f"one that breaks ({error}); get it anew"
        ) from None
    return halves


class _ArraysOnly(pickle.Unpickler):
    """Nothing but arrays and plain values: a pickle can run any code."""

    rebuild = np.zeros(1).__reduce__()[0]

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray"):
            if name == "_reconstruct":
                return self.rebuild
            if name in ("ndarray", "dtype"):
                return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            return lambda text, encoding: text.encode(encoding)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _from_archive(path: Path) -> list[tuple[Tensor, Tensor]]:
    """The published archive: six pickles of 10,000 images, channels first."""
    batches = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = Path(member.name).name
                if member.isfile() and (name.startswith("data_batch_") or name == "test_batch"):
                    batch = _ArraysOnly(archive.extractfile(member), encoding="bytes").load()  # type: ignore[arg-type]
                    batches[name] = batch[b"data"].reshape(-1, 3, 32, 32), np.asarray(batch[b"labels"])
        train = [batches[f"data_batch_{i}"] for i in range(1, 6)]
        test = [batches["test_batch"]]
    except (
        *BROKEN_GZIP, tarfile.TarError, pickle.UnpicklingError, KeyError, ValueError, AttributeError, TypeError,
    ) as error:  # fmt: skip
        raise ValueError(
            f"vardrop.data: {path} must be CIFAR-10's archive for Python, got one that breaks ({error}); get it anew"
        ) from None
    halves = []
    for half in (train, test):
        x, y = (np.concatenate(parts) for parts in zip(*half, strict=True))
        halves.append((_scaled(x), _labels(y, len(x), path)))
    return halves
