"""The finished model on disk, and back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from vardrop.convert import restore_
from vardrop.data import Data, load
from vardrop.methods import prepare
from vardrop.training.config import Config
from vardrop.training.files import check_same, read_tensors
from vardrop.training.folder import MODEL
from vardrop.training.task import NETWORK, Categorical, Gaussian, Task
from vardrop.weights.modules import noisy_weights


def strip(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names as in a model file: those of the network as they are, the likelihood's with ``likelihood.`` before them."""
    return {name.removeprefix(NETWORK): tensor for name, tensor in tensors.items()}


def load_task(run: Path, data: Data | None = None) -> Task:
    """The tested network of a run together with its likelihood, in evaluation mode.

    Args:
        run: a folder that :func:`vardrop.training.train` wrote.
        data: the run's data, if they are loaded already, as they were in training: their shapes make the network.

    Raises:
        FileNotFoundError: if there is no model, or its data set is not here.
        ValueError: if the file is damaged or does not fit, or the data have changed.
    """
    path = Path(run) / MODEL
    tensors, about = read_tensors(path)
    if "config" not in about:
        raise ValueError(f"vardrop.training: {path} must be the model of a run, got a file without its config")
    config = Config.from_dict(about["config"])
    if data is not None:
        check_same(config.data, data.digest, about, path)
    data = data or load(config.data, Path(config.data_dir) if config.data_dir else None, config.split)
    with torch.random.fork_rng(devices=[]):  # of initial weights that are replaced at once
        network, _, _ = prepare(config.method, config.model, data.shape, data.outputs, config.sharing)
    likelihood = Gaussian(data.train_y) if data.task == "regression" else Categorical()
    task = Task(network, likelihood)
    if config.precision == "64-true":
        task.double()
    prefixed = {name if name.startswith("likelihood.") else NETWORK + name: tensor for name, tensor in tensors.items()}
    try:
        task.load_state_dict(prefixed)
    except RuntimeError as error:
        raise ValueError(
            f"vardrop.training: {path} does not fit its own config: {' '.join(str(error).split())}"
        ) from error
    return task.eval()


def load_model(run: Path) -> nn.Module:
    """The tested network of a run, in evaluation mode: averaged weights of its best epoch, rates and all.

    Args:
        run: a folder that :func:`vardrop.training.train` wrote.

    Raises:
        FileNotFoundError: if there is no model, or its data set is not here.
        ValueError: if the file is damaged or does not fit.

    Example:
        >>> import tempfile
        >>> from pathlib import Path
        >>> from vardrop.training import Config, load_model, train
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     _ = train(Config(model="mlp:1x8", epochs=1), Path(folder), progress=False)
        ...     network = load_model(Path(folder))
        >>> network.training
        False
    """
    return load_task(run).network


def start_from_(network: nn.Module, run: Path) -> None:
    """Give a network the weights of a finished run, in place; its own noise stays where it starts.

    The two need the same layers; dropout between them may differ.

    Raises:
        FileNotFoundError: if there is no model, or its data set is not here.
        ValueError: if its weights have other shapes.
    """
    finished = load_task(run).network
    restore_(finished)
    theirs = list(finished.parameters())
    noise = {id(noise) for _, _, noise, *_ in noisy_weights(network)}
    ours = [p for p in network.parameters() if id(p) not in noise]
    shapes = [[tuple(p.shape) for p in parameters] for parameters in (ours, theirs)]
    if shapes[0] != shapes[1]:
        raise ValueError(
            f"vardrop.train: start must be a run of the same network, got one with weights of {shapes[1]} for one with "
            f"{shapes[0]}; give --model as it was there"
        )
    with torch.no_grad():
        for our, their in zip(ours, theirs, strict=True):
            our.copy_(their)
