"""Tables on disk: CSV for everybody, Parquet for large ones, npz with every array; whole or not there."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

Columns = Mapping[str, Any]  # name -> [N], numbers or text


def write_table(columns: Columns, out: Path, more: Columns | None = None) -> Path:
    """Write a table in the format that the name of the file asks for.

    Args:
        columns: name -> a column; all of one length.
        out: a file that ends in .csv, .parquet or .npz.
        more: arrays that only an .npz can hold beside them, such as ``[N, C]``.

    Returns:
        ``out``.

    Raises:
        ValueError: if the name ends in something else.
        ImportError: if Parquet is asked for, and pyarrow is not installed.
        OSError: if it cannot be written; a file that was there is still there.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from vardrop.evaluation.output import write_table
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_table({"index": [0, 1], "mean": [0.5, 2.0]}, Path(folder) / "a.csv").read_text().split()
        ['index,mean', '0,0.5', '1,2']
    """
    write = writer_of(out)
    make_ready(out.parent)
    save(out, write(columns, more or {}))
    return out


def writer_of(out: Path) -> Callable[[Columns, Columns], bytes]:
    """What makes the content of a file of this name; asked for early, so that nothing is computed in vain."""
    writers = {".csv": _csv, ".parquet": _parquet, ".npz": _npz}
    write = writers.get(out.suffix.lower())
    if write is None:
        raise ValueError(
            f"vardrop.predict: --out must end in {', '.join(writers)}, which says the format, got {out}; rename it"
        )
    if write is _parquet:
        _pyarrow()
    return write


def save(path: Path, content: bytes) -> None:
    """Write beside, then move: a full disk leaves the file that was there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _writing(path):
        try:
            draft.write_bytes(content)
            draft.replace(path)
        except OSError:
            with contextlib.suppress(OSError):
                draft.unlink(missing_ok=True)
            raise


def make_ready(folder: Path) -> None:
    """Make a folder, or say that it cannot be, before minutes are spent on what is to be in it."""
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(
            f"vardrop.evaluation: needs room and permission to write {path}, got {error.strerror or error}; choose "
            "another --out"
        ) from error


def _pyarrow() -> Any:
    try:
        import pyarrow.parquet  # type: ignore[import-untyped,unused-ignore]
    except ModuleNotFoundError as error:
        raise ImportError(
            "vardrop.predict: a .parquet file needs pyarrow, got no such module; install it by pip install "
            "'vardrop[parquet]', or write a .csv"
        ) from error
    return pyarrow


def _cell(value: Any) -> str:
    """A number to six digits; what is not known is empty."""
    if isinstance(value, float | np.floating):
        return "" if np.isnan(value) else f"{value:.6g}"
    return str(value)


def _csv(columns: Columns, _: Columns) -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([_cell(value) for value in row] for row in zip(*columns.values(), strict=True))
    return text.getvalue().encode()


def _parquet(columns: Columns, _: Columns) -> bytes:
    arrow = _pyarrow()
    file = arrow.BufferOutputStream()
    arrow.parquet.write_table(arrow.table({name: arrow.array(column) for name, column in columns.items()}), file)
    content: bytes = file.getvalue().to_pybytes()
    return content


def _npz(columns: Columns, more: Columns) -> bytes:
    file = io.BytesIO()
    np.savez_compressed(file, allow_pickle=False, **{name: np.asarray(v) for name, v in {**columns, **more}.items()})
    return file.getvalue()
