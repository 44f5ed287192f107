"""Run a cell, and say what it was computed with."""

from __future__ import annotations

import platform
import subprocess
import time
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vardrop
from vardrop.reproduce import results, unfinished
from vardrop.reproduce.experiment import Cell, Experiment

_PACKAGES = ("vardrop", "torch", "numpy", "scipy", "mpmath", "lightning-fabric", "scikit-learn")


def pending(
    experiments: Iterable[Experiment], scale: str, root: Path, damaged_ok: bool = False
) -> tuple[list[Cell], list[Cell]]:
    """The cells that are still to be run, and those that have a result.

    Args:
        experiments: whose cells.
        scale: at which scale.
        root: where results are kept.
        damaged_ok: do not look into the files: they will be replaced.

    Raises:
        ValueError: for an unknown scale, or if a result is there but damaged.
    """
    todo: list[Cell] = []
    done: list[Cell] = []
    for experiment in experiments:
        for cell in experiment.at(scale):
            path = cell.path(root)
            if path.exists() and not damaged_ok:
                results.read(path)
            (done if path.exists() else todo).append(cell)
    return todo, done


def compute(experiment: Experiment, cell: Cell, state: Path | None = None) -> results.Result:
    """Run one cell.

    Args:
        experiment: the cell's.
        cell: what to run.
        state: a file for what it has done so far, if it takes long: with one there, it goes on from it.

    Raises:
        ValueError: at scale gpu on a machine without one.
    """
    if cell.scale == "gpu" and not torch.cuda.is_available():
        raise ValueError(
            "vardrop.reproduce: scale gpu must have a CUDA device, got a machine without one; use --scale cpu"
        )
    device = device_name("cuda" if cell.scale == "gpu" else "cpu")
    made_by: dict[str, Any] = {
        "versions": versions(), "commit": commit(), "device": device, "threads": torch.get_num_threads()
    }  # fmt: skip
    start = time.perf_counter()
    with unfinished.kept_at(state, made_by):
        rows = experiment.run_cell(cell.config)
        seconds = unfinished.before() + time.perf_counter() - start
    return results.Result(
        experiment=cell.experiment,
        scale=cell.scale,
        config=cell.config,
        seed=cell.config.get("seed"),
        **made_by,
        seconds=round(seconds, 3),
        rows=rows,
    )


def versions() -> dict[str, str]:
    """Python's version and those of the packages that numbers depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit(package: Path = Path(vardrop.__file__).parent) -> str | None:
    """The commit that the package's source is at, with ``+changes`` if it differs; None if it is not in a checkout."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # fails where another project's checkout surrounds us
        return git("rev-parse", "HEAD") + ("+changes" if git("status", "--porcelain", "--", ".") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def device_name(kind: str) -> str:
    """What the numbers were computed on, such as the processor's model."""
    if kind == "cuda":
        return torch.cuda.get_device_name()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
