"""A finished run, opened: its network, its data, and the rows that were kept back while it was trained."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.modules.dropout import _DropoutNd

from vardrop.data import Data, load, split_validation
from vardrop.training.config import Config
from vardrop.training.folder import CONFIG, MODEL, SUMMARY
from vardrop.training.model_file import load_task
from vardrop.training.task import Task
from vardrop.weights.modules import RandomWeights


@dataclass(frozen=True)
class OpenRun:
    """What a finished run leaves behind.

    Attributes:
        path: its folder.
        config: its options.
        data: its data set, with training and test rows.
        task: the network and its likelihood, in evaluation mode.
        root: where data sets are looked for first.
    """

    path: Path
    config: Config
    data: Data
    task: Task
    root: Path | None = None

    @property
    def regression(self) -> bool:
        """Whether it predicts numbers."""
        return self.data.task == "regression"

    @property
    def random(self) -> bool:
        """Whether two passes can differ: whether any weight is random, or any dropout is above 0."""
        return any(
            isinstance(module, RandomWeights) or (isinstance(module, _DropoutNd) and module.p > 0)
            for module in self.task.network.modules()
        )

    def validation(self) -> tuple[Tensor, Tensor] | None:
        """The rows that training kept back to choose its epoch; None if it kept none."""
        size = self.config.validation
        if not size:
            return None
        _, x, y = split_validation(self.data, size if size < 1 else int(size), self.config.seed)
        return x, y


def open_run(path: Path, data_dir: Path | None = None, device: str = "cpu") -> OpenRun:
    """Open the folder of a run that has ended.

    Args:
        path: what ``vardrop train --out`` wrote.
        data_dir: where to look for its data first, if they have moved.
        device: where the network goes, as torch names it; the data stay where they are.

    Raises:
        FileNotFoundError: if it is no run, it has not ended, or its data are not here.
        ValueError: if a file in it is damaged, its data have changed, or this machine has no such device.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from vardrop.evaluation.runs import open_run
        >>> from vardrop.training import Config, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train(Config(model="mlp:1x8", epochs=1), Path(folder), progress=False)
        ...     run = open_run(Path(folder))
        >>> run.random, len(run.validation()[0])
        (True, 144)
    """
    path = Path(path)
    if not (path / CONFIG).is_file():
        given = "a folder without config.json" if path.is_dir() else "no such folder"
        inside = sorted(str(each.parent) for each in path.glob(f"*/{CONFIG}"))
        then = f"take one of the {len(inside)} runs in it, such as {inside[0]}" if inside else "train one"
        raise FileNotFoundError(
            f"vardrop.evaluation: RUN must be what `vardrop train --out RUN` wrote, got {path} ({given}); {then}"
        )
    if not ((path / MODEL).is_file() and (path / SUMMARY).is_file()):
        raise FileNotFoundError(
            f"vardrop.evaluation: a run must have ended, got {path}, which has no model yet; go on with "
            f"`vardrop train --out {path} --resume`"
        )
    config = Config.read(path / CONFIG)
    root = data_dir or (Path(config.data_dir) if config.data_dir else None)
    data = load(config.data, root, config.split)
    task = load_task(path, data)
    try:
        if torch.device(device).type == "meta":
            raise RuntimeError("what is there has no numbers")
        task.to(device)
    except (AssertionError, RuntimeError) as error:  # torch has another one for every kind of device
        raise ValueError(
            "vardrop.evaluation: device must be one of this machine, such as cpu, cuda, cuda:1 or mps, "
            f"got {device!r}: {str(error).splitlines()[0]}"
        ) from error
    return OpenRun(path, config, data, task, root)
