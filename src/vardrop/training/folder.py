"""The folder of a run: its files, and whether a run may begin or go on in it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from vardrop.training.config import Config
from vardrop.training.files import write_atomically, writing

CONFIG = "config.json"
METRICS = "metrics.jsonl"
SUMMARY = "summary.json"
CHECKPOINT = "checkpoint.safetensors"
MODEL = "model.safetensors"
EXAMPLES = "examples.safetensors"


def claim(config: Config, out: Path, resume: bool) -> dict[str, Any] | None:
    """Make the folder ready for a run, or refuse.

    Args:
        config: of the run that wants it.
        out: the folder.
        resume: whether the run may go on from what is there.

    Returns:
        The summary, if the run is finished already; None if there is something to do.

    Raises:
        FileExistsError: if the folder holds a run and ``resume`` is not set, or a network that nothing goes on from.
        ValueError: if it holds a run with other options.
        OSError: if the folder cannot be made or written to.
    """
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
    summary = out / SUMMARY
    if not resume:
        for name, what in ((SUMMARY, "a finished run"), (CHECKPOINT, "an unfinished run")):
            if (out / name).exists():
                raise FileExistsError(
                    f"vardrop.train: out must be a folder without a run, got {out}, which holds {what}; "
                    "choose another, or go on with --resume"
                )
        return None
    if (out / CONFIG).exists() and ((out / CHECKPOINT).exists() or summary.exists()):
        there = Config.read(out / CONFIG)
        difference = there.difference(config)
        if difference:
            raise ValueError(
                f"vardrop.train: {out} holds a run with other options ({difference}); choose the same, or another --out"
            )
    if summary.exists():
        found: dict[str, Any] = _read_json(summary)
        stopped_early = found["epochs_run"] < found["config"]["epochs"]
        if found["epochs_run"] == config.epochs or (stopped_early and found["epochs_run"] < config.epochs):
            return found
        if not (out / CHECKPOINT).exists():
            raise FileExistsError(
                f"vardrop.train: {out} holds a finished network without the checkpoint that training could go on from "
                f"(it was removed, or `vardrop prune` made it); go on elsewhere with --start {out} --out another"
            )
    return None


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"vardrop.training: {path} is not valid JSON ({error}); remove it") from error


def append_line(path: Path, line: dict[str, Any]) -> None:
    """Add a line to the metrics, and see it on its way to the disk."""
    with writing(path), open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        os.fsync(file.fileno())


def keep_epochs(path: Path, epochs: int) -> None:
    """Leave the lines of the first epochs in the metrics; later ones, or half a line, are of a run that was killed."""
    if not path.exists():
        return
    kept = []
    for line in path.read_bytes().split(b"\n"):
        try:
            if json.loads(line)["epoch"] <= epochs:
                kept.append(line + b"\n")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError):
            continue
    write_atomically(path, b"".join(kept))
