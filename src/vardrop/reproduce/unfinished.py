"""What a cell that takes hours has done so far: killed or stopped, it goes on from there."""

from __future__ import annotations

import contextlib
import os
import pickle
import time
import warnings
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vardrop.reproduce.experiment import Cell

State = dict[str, Any]  # tensors, and what JSON has; no code is read from the file


@dataclass
class _Place:
    path: Path
    made_by: State  # what has to be the same for the numbers to be
    began: float = field(default_factory=time.perf_counter)
    before: float = 0.0


_HERE: ContextVar[_Place | None] = ContextVar("unfinished cell", default=None)


def place(cell: Cell, root: Path) -> Path:
    """Where the state of an unfinished cell is kept: beside its result to come."""
    return cell.path(root).with_suffix(".unfinished")


@contextlib.contextmanager
def kept_at(path: Path | None, made_by: State) -> Iterator[None]:
    """Let the cell that runs in the block keep its state in a file; None for a cell that has nowhere to.

    Args:
        path: of the file.
        made_by: what computes it, such as versions: the state of something else is not gone on with.
    """
    token = _HERE.set(None if path is None else _Place(path, made_by))
    try:
        yield
    finally:
        _HERE.reset(token)


def found() -> State | None:
    """The state that this cell has kept, or None where it begins; torch's random numbers go on as well.

    A long cell asks for it once, after its seed is set.
    """
    here = _HERE.get()
    if here is None or not here.path.exists():
        return None
    try:
        content = torch.load(here.path, weights_only=True)
        made_by, state, random, before = (content[name] for name in ("made_by", "state", "random", "seconds"))
    except (OSError, EOFError, RuntimeError, KeyError, TypeError, pickle.UnpicklingError) as error:
        _say(f"an unfinished cell must be readable, got {here.path} ({type(error).__name__}); it begins anew")
        return None
    other = [name for name in here.made_by if made_by.get(name) != here.made_by[name]]
    if other:
        _say(
            f"an unfinished cell must go on as it began, got {here.path} of another {', '.join(other)}; it begins "
            "anew, and replaces that file in a while: to go on with it, stop it now and go back"
        )
        return None
    here.before = before
    torch.set_rng_state(random)
    return state


def keep(state: State) -> None:
    """Keep the state of the cell that runs, at once: whatever was kept before is there until this is.

    Args:
        state: tensors, numbers, text, lists and dictionaries of them.
    """
    here = _HERE.get()
    if here is None:
        return
    part = here.path.with_name(f".{here.path.name}.{os.getpid()}")
    try:
        here.path.parent.mkdir(parents=True, exist_ok=True)
        took = before() + time.perf_counter() - here.began
        random = torch.get_rng_state()
        torch.save({"made_by": here.made_by, "state": state, "random": random, "seconds": took}, part)
        part.replace(here.path)
    except (OSError, RuntimeError) as error:  # torch has RuntimeError for a full disk
        _say(f"an unfinished cell must be kept in {here.path}, which cannot be written ({error}); it runs on")
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def before() -> float:
    """Seconds that the cell had taken up to the state that was found."""
    here = _HERE.get()
    return 0.0 if here is None else here.before


def _say(words: str) -> None:
    warnings.warn(f"vardrop.reproduce: {words}", stacklevel=3)
