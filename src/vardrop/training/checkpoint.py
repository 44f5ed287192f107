"""The whole state of a run as one safetensors file, from which it goes on as if nothing had happened.

Tensors go by names, never by positions: ``model.*``, ``optimizer.<parameter>.<key>``, ``average.*``, ``best.*``,
``rng.*``. They are whole, however many processes held them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning_fabric import Fabric
from torch import Tensor

from vardrop.training.averaging import Averages
from vardrop.training.config import Config
from vardrop.training.devices import gather, on_first, seed_noise
from vardrop.training.files import check_same, read_tensors, write_tensors
from vardrop.training.sharding import assign_, whole
from vardrop.training.task import Task

FORMAT = "vardrop checkpoint 1"


@dataclass
class Progress:
    """How far a run has come.

    Attributes:
        epoch: epochs finished.
        step: updates done.
        seconds: spent in finished epochs.
        best_epoch: the epoch whose averaged weights are the best so far.
        best: its validation error and nll.
        average_step: updates in the average.
    """

    epoch: int = 0
    step: int = 0
    seconds: float = 0.0
    best_epoch: int = 0
    best: tuple[float, float] | None = None
    average_step: int = 0


@dataclass
class State:
    """All that changes while a run goes on."""

    task: Task
    optimizer: torch.optim.Optimizer
    averages: Averages
    best: list[Tensor]
    order: torch.Generator
    progress: Progress
    digest: str = ""  # of the data

    def _by_name(self, tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip((name for name, _ in self.task.named_parameters()), tensors, strict=True))

    def _parts(self) -> dict[str, Tensor]:
        """Every tensor but the random states, by its name in the file."""
        found = {f"model.{name}": tensor for name, tensor in self.task.state_dict().items()}
        for name, parameter in self.task.named_parameters():
            for key, value in self.optimizer.state[parameter].items():
                found[f"optimizer.{name}.{key}"] = value
        found |= {f"average.{name}": tensor for name, tensor in self._by_name(self.averages.values).items()}
        return found | {f"best.{name}": tensor for name, tensor in self._by_name(self.best).items()}

    def best_model(self) -> dict[str, Tensor]:
        """The model of the best epoch, whole; every process has to ask for it."""
        tensors = self.task.state_dict() | self._by_name(self.best)
        return {name: whole(tensor) for name, tensor in tensors.items()}


def _random_states(fabric: Fabric, order: torch.Generator) -> dict[str, Tensor]:
    """The generators of every process."""
    here = {"cpu": torch.get_rng_state()}
    if fabric.device.type == "cuda":
        here["cuda"] = torch.cuda.get_rng_state(fabric.device)
    states = {"rng.order": order.get_state()}
    for kind, state in here.items():
        rows = gather(fabric, state.to(fabric.device))
        states |= {f"rng.{kind}.{rank}": row for rank, row in enumerate(rows)}
    return states


def save_checkpoint(path: Path, state: State, config: Config, fabric: Fabric) -> None:
    """Write the state atomically. Every process takes part; the first one writes.

    Raises:
        OSError: if it cannot be written; the checkpoint before stays.
    """
    tensors = {name: whole(tensor) for name, tensor in state._parts().items()} | _random_states(fabric, state.order)
    about = {
        "format": FORMAT,
        "config": dataclasses.asdict(config),
        "progress": dataclasses.asdict(state.progress),
        "digest": state.digest,
        "precision": fabric.strategy.precision.state_dict(),
        "processes": fabric.world_size,
    }
    on_first(fabric, lambda: write_tensors(path, tensors, about))


def read_checkpoint(path: Path, config: Config) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The content of a checkpoint, which has to be one of this very run.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged, something else, or of a run with other options, which are named.
    """
    tensors, about = read_tensors(path)
    if about.get("format") != FORMAT:
        raise ValueError(
            f"vardrop.train: {path} must be a checkpoint of this version, got format {about.get('format')!r}; "
            "remove it to start again"
        )
    difference = Config.from_dict(about["config"]).difference(config)
    if difference:
        raise ValueError(
            f"vardrop.train: {path} is of a run with other options ({difference}); choose the same, or another --out"
        )
    return tensors, about


def load_checkpoint(path: Path, state: State, config: Config, fabric: Fabric) -> None:
    """Put a run back to where :func:`save_checkpoint` saw it.

    With other devices, or another number of them, everything goes on but the noise, which starts anew.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: for whatever :func:`read_checkpoint` refuses, other data or other shapes.
    """
    tensors, about = read_checkpoint(path, config)
    check_same(config.data, state.digest, about, path)
    state.optimizer.state.clear()
    for name, parameter in state.task.named_parameters():
        prefix = f"optimizer.{name}."
        for key in [entry.removeprefix(prefix) for entry in tensors if entry.startswith(prefix)]:
            like = parameter if tensors[prefix + key].shape == parameter.shape else tensors[prefix + key]
            state.optimizer.state[parameter][key] = torch.zeros_like(like, requires_grad=False)
    parts = state._parts()
    wrong = sorted(set(parts) ^ {name for name in tensors if not name.startswith("rng.")}) or [
        name for name, tensor in parts.items() if tensor.shape != tensors[name].shape
    ]
    if wrong:
        raise ValueError(
            f"vardrop.train: {path} does not fit the model, first in {wrong[0]!r}; have the data changed? Remove it to "
            "start again"
        )
    for name, tensor in parts.items():
        assign_(tensor, tensors[name])
    state.order.set_state(tensors["rng.order"])
    fabric.strategy.precision.load_state_dict(about["precision"])
    progress = about["progress"]
    state.progress = Progress(**progress | {"best": None if progress["best"] is None else tuple(progress["best"])})
    state.averages.step = state.progress.average_step

    cpu, cuda = (tensors.get(f"rng.{kind}.{fabric.global_rank}") for kind in ("cpu", "cuda"))
    on_cuda = fabric.device.type == "cuda"
    if about["processes"] != fabric.world_size or cpu is None or (cuda is None) == on_cuda:
        seed_noise(config.seed + state.progress.step, fabric.global_rank)
        return
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda, fabric.device)
