"""What `vardrop diagnose` is given: a function that makes a model or the folder of a run, and data for it."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from vardrop.data import load, split_validation
from vardrop.diagnosis.scores import Loss
from vardrop.evaluation.runs import open_run

_KEPT_BACK = 0.2  # share of the rows that cures are judged by


class Target(NamedTuple):
    """A model and its data.

    Attributes:
        name: of the model.
        model: itself.
        data: name of the data.
        training: rows to diagnose it with, x and y.
        validation: rows to judge by; None if there are none.
        loss_fn: for models whose labels do not speak for themselves.
    """

    name: str
    model: nn.Module
    data: str
    training: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor] | None
    loss_fn: Loss | None = None


def target(text: str, data: str | None, seed: int = 0, data_dir: Path | None = None) -> Target:
    """Find a model and its data.

    Args:
        text: ``package.module:factory`` or the folder of a run.
        data: a name that `vardrop data` knows, a CSV file, or an .npz file with ``x`` and ``y``; None for a run's own.
        seed: of the rows that are set aside for validation.
        data_dir: where data are looked for first.

    Raises:
        FileNotFoundError: if there is no such run or file.
        ValueError: if the text is neither, or the factory makes no model.
    """
    if ":" not in text:
        return _of_run(Path(text), data, data_dir)
    model = _made(text)
    if data is None:
        raise ValueError(
            f"vardrop.diagnose: --data must be given for {text}, got nothing; name a set or a file with x and y"
        )
    if data.endswith(".npz"):
        x, y = _arrays(Path(data))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        kept, rest = order.split([max(1, round(_KEPT_BACK * len(x))), len(x) - max(1, round(_KEPT_BACK * len(x)))])
        return Target(text, model, data, (x[rest], y[rest]), (x[kept], y[kept]))
    found, x, y = split_validation(load(data, data_dir), _KEPT_BACK, seed)
    return Target(text, model, found.name, (found.train_x, found.train_y), (x, y))


def _made(text: str) -> nn.Module:
    """The model of package.module:factory, looked for in the working folder too."""
    where, _, path = text.partition(":")
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        thing: Any = importlib.import_module(where)
        for name in path.split("."):
            thing = getattr(thing, name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"vardrop.diagnose: the model must be package.module:factory or the folder of a run, got {text}: {error}"
        ) from error
    model = thing if isinstance(thing, nn.Module) else thing()
    if not isinstance(model, nn.Module):
        raise ValueError(f"vardrop.diagnose: {text} must make a torch.nn.Module, got {type(model).__name__}")
    return model


def _of_run(path: Path, data: str | None, data_dir: Path | None) -> Target:
    run = open_run(path, data_dir)
    if data is not None and data != run.config.data:
        raise ValueError(
            f"vardrop.diagnose: a run must be diagnosed with its own data, {run.config.data}, got {data}; leave --data "
            "out"
        )
    task, validation = run.task, run.validation()

    def loss(model: nn.Module, batch: Any) -> Tensor:
        """The run's own likelihood, whose targets have units."""
        x, y = batch
        return task.likelihood(model(x), y).mean()

    rows = (run.data.train_x, run.data.train_y)
    return Target(str(path), task.network, run.data.name, rows, validation, loss if run.regression else None)


def _arrays(path: Path) -> tuple[Tensor, Tensor]:
    """x and y of an .npz file: numbers in single precision, whole numbers as classes."""
    if not path.is_file():
        raise FileNotFoundError(f"vardrop.diagnose: --data must be a file that is there, got {path}")
    with np.load(path, allow_pickle=False) as file:
        if not {"x", "y"} <= set(file.files):
            raise ValueError(
                f"vardrop.diagnose: {path} must have arrays x and y, got {', '.join(file.files) or 'none'}"
            )
        x, y = torch.from_numpy(file["x"]), torch.from_numpy(file["y"])
    if len(x) != len(y) or len(x) < 2:
        raise ValueError(
            f"vardrop.diagnose: x and y must have two rows or more, as many as each other, got {len(x)} and {len(y)}"
        )
    return x.float() if x.is_floating_point() else x, y.float() if y.is_floating_point() else y.long()


def load_weights(model: nn.Module, path: Path) -> None:
    """Load a state dict from a file.

    Args:
        model: to load it into.
        path: .pt, as ``torch.save(model.state_dict(), path)`` writes it, or .safetensors.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it does not fit the model.
    """
    if not path.is_file():
        raise FileNotFoundError(f"vardrop.diagnose: --weights must be a file that is there, got {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
        model.load_state_dict(state)
    except Exception as error:
        raise ValueError(
            f"vardrop.diagnose: {path} must be a state dict of the model, got {type(error).__name__}: {error}"
        ) from error
