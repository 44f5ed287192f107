"""A network in two files: its weights, and beside them what it takes to build it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vardrop.pruning.architecture import describe, rebuild
from vardrop.sparsity.compact import plain_copy
from vardrop.sparsity.compressed import load_compressed, plain_state, save_compressed
from vardrop.sparsity.export import load_sparse, save_sparse

FORMAT = "vardrop network 1"
SAVE = {"safetensors": save_sparse, "compressed": save_compressed}
LOAD = {"safetensors": load_sparse, "compressed": load_compressed}


def beside(path: Path) -> Path:
    """Where the architecture of a file of weights is."""
    return path.with_name(path.name + ".json")


def write_network(model: nn.Module, path: Path, form: str, about: dict[str, Any] | None = None) -> None:
    """Write the weights of a network to a file, and its architecture to ``<file>.json``.

    Args:
        model: a plain or converted network, written as it is in evaluation; its layers are those of
            :func:`vardrop.pruning.architecture.describe`.
        path: of the weights.
        form: ``"safetensors"`` (matrices with many zeros as compressed sparse rows) or ``"compressed"``.
        about: what else to keep beside the architecture, such as the names of the classes.

    Raises:
        ValueError: if the network has a layer that cannot be described.
        ModuleNotFoundError: if the package of the format is missing.
    """
    plain = plain_copy(model)
    (dtype,) = {value.dtype for value in plain.parameters()}
    description = {
        "format": FORMAT,
        "weights": form,
        "dtype": str(dtype).removeprefix("torch."),
        **(about or {}),
        "network": describe(plain),
    }
    SAVE[form](plain, path)
    beside(path).write_text(json.dumps(description, indent=1), encoding="utf-8")


def load_network(path: str | Path) -> nn.Module:
    """A network from a file that ``vardrop prune`` or ``vardrop export`` wrote, without its architecture at hand.

    Args:
        path: of the weights, ``.safetensors`` or ``.vdc``; ``<path>.json`` has to be beside it.

    Returns:
        A plain ``torch.nn.Module``, in evaluation mode.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if one of them is damaged, or they do not belong together.

    Example:
        >>> import tempfile, torch
        >>> from pathlib import Path
        >>> from vardrop.pruning.network_file import load_network, write_network
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU())
        >>> path = Path(tempfile.mkdtemp()) / "net.safetensors"
        >>> write_network(net, path, "safetensors")
        >>> torch.equal(load_network(path)[0].weight, net[0].weight)
        True
    """
    path = Path(path)
    for file in (path, beside(path)):
        if not file.is_file():
            raise FileNotFoundError(
                f"vardrop.load_network: needs the weights and their architecture side by side, got no file {file}; "
                "keep FILE and FILE.json together"
            )
    try:
        description = json.loads(beside(path).read_text(encoding="utf-8"))
        form, dtype, network = (description[name] for name in ("weights", "dtype", "network"))
        load, kind = LOAD[form], getattr(torch, dtype)
    except (UnicodeDecodeError, json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"vardrop.load_network: {beside(path)} must hold the architecture of {path.name}, got "
            f"{type(error).__name__}: {error}; write both again with `vardrop export`"
        ) from error
    model = rebuild(network).to(kind)
    load(path, model)
    return model.eval()


def float32_bytes(model: nn.Module) -> int:
    """Four bytes for every parameter and buffer that a network has in evaluation."""
    return 4 * sum(value.numel() for value in plain_state(model).values())


def tensor_bytes(path: Path) -> dict[str, int]:
    """What each tensor takes of a safetensors file, from its header."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    ends = {name: entry["data_offsets"] for name, entry in header.items() if name != "__metadata__"}
    return {name: end - start for name, (start, end) in ends.items()}
