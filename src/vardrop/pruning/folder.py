"""A folder that is whole or not there: made beside its place, then moved into it."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from vardrop.training.folder import CONFIG, EXAMPLES, METRICS, MODEL, SUMMARY

RESULT = "prune.json"
PAGE = "index.html"
COMPACT = {"safetensors": "compact.safetensors", "compressed": "compact.vdc"}
_RUN = (CONFIG, MODEL, SUMMARY, METRICS, EXAMPLES)
_BY_OTHERS = ("report.html", "evaluation.json", "evaluation.html")  # of `vardrop report` and `vardrop evaluate`
_EXPORTED = ("network.onnx", "network.safetensors", "network.vdc", "compact.onnx")


def check_place(out: Path, run: Path, overwrite: bool) -> None:
    """Refuse a place that has something else in it, before minutes are spent on what is to stand there.

    Raises:
        FileExistsError: if something is there that ``vardrop prune`` did not write, or did and may not replace.
        OSError: if nothing can be written there.
        ValueError: if it is the run itself, or holds it.
    """
    there, source = out.resolve(), run.resolve()
    if there == source or there in source.parents:
        raise ValueError(
            f"vardrop.prune: --out must be another folder than that of the run, got {out} for the run {run}; choose "
            "another"
        )
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        with _writing(out):
            draft = _draft(out)
            draft.mkdir(parents=True)
            draft.rmdir()
        return
    if not (out / RESULT).is_file():
        raise FileExistsError(
            f"vardrop.prune: --out must be new, empty, or what `vardrop prune` wrote, got {out}; choose another"
        )
    if not overwrite:
        raise FileExistsError(
            f"vardrop.prune: --out must be a new folder, got {out}, which holds an earlier result; choose another, or "
            "replace it with --overwrite"
        )
    written = {RESULT, PAGE, *_RUN, *_BY_OTHERS, *_EXPORTED, *COMPACT.values()}
    written |= {f"{name}.json" for name in (*_EXPORTED, *COMPACT.values())}  # architectures
    strange = sorted(path.name for path in out.iterdir() if path.name not in written)
    if strange:
        raise FileExistsError(
            f"vardrop.prune: --overwrite replaces only what vardrop wrote, got {out} with {', '.join(strange[:3])} in "
            "it; move that, or choose another --out"
        )


@contextlib.contextmanager
def drafted(out: Path) -> Iterator[Path]:
    """A new folder to write into, which takes its place when the block ends well and goes when it does not.

    Raises:
        OSError: if there is no room or no permission for it; what was there is still there.
    """
    draft = _draft(out)
    old = out.with_name(f".{out.name}.{os.getpid()}.old")
    try:
        with _writing(out):
            draft.mkdir(parents=True)
        with _writing(out):
            yield draft
            if out.exists():
                out.rename(old)
            try:
                draft.rename(out)
            except OSError:
                if old.exists():
                    old.rename(out)
                raise
    finally:
        for left in (draft, old):
            shutil.rmtree(left, ignore_errors=True)


def _draft(out: Path) -> Path:
    return out.with_name(f".{out.name}.{os.getpid()}.tmp")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error  # what the system said
        raise OSError(
            f"vardrop.prune: needs room and permission to write {path}, got {cause.strerror or cause}; what was there "
            "is still there: choose another --out"
        ) from error
