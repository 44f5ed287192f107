"""A plain network as JSON and back, so that a file of weights can be read by someone who has no code for it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from vardrop.sparsity.rebuild import Select

# What `vardrop.models.build` makes and what `vd.compact` puts in, with what each is built from.
_LAYERS: dict[str, tuple[type[nn.Module], tuple[str, ...]]] = {
    "Conv2d": (
        nn.Conv2d,
        ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups", "bias"),
    ),
    "Dropout": (nn.Dropout, ("p",)),
    "Flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "Linear": (nn.Linear, ("in_features", "out_features", "bias")),
    "MaxPool2d": (nn.MaxPool2d, ("kernel_size", "stride", "padding", "dilation", "ceil_mode")),
    "ReLU": (nn.ReLU, ()),
    "Softplus": (nn.Softplus, ("beta", "threshold")),
}


def describe(module: nn.Module) -> dict[str, Any]:
    """The layers of a plain network, by kind and size, without their weights.

    Args:
        module: layers that :func:`vardrop.models.build` makes, or :func:`vardrop.compact` of them.

    Raises:
        ValueError: if there is a layer of another kind.

    Example:
        >>> from torch import nn
        >>> from vardrop.pruning.architecture import describe
        >>> describe(nn.Linear(3, 2))
        {'kind': 'Linear', 'in_features': 3, 'out_features': 2, 'bias': True}
    """
    if type(module) is nn.Sequential:
        return {"kind": "Sequential", "layers": {name: describe(child) for name, child in module.named_children()}}
    if type(module) is Select:
        return {"kind": "Select", "channels": len(module.index), "dim": module.dim}
    kind = type(module).__name__
    plain, names = _LAYERS.get(kind, (None, ()))
    if type(module) is not plain:
        raise ValueError(
            f"vardrop.pruning: a network that is written with its architecture must have layers of {_known()}, got "
            f"{type(module).__module__}.{kind}; write ONNX, which has any"
        )
    values = {name: getattr(module, name) for name in names}
    if "bias" in values:
        values["bias"] = values["bias"] is not None
    return {"kind": kind, **{name: list(v) if isinstance(v, tuple) else v for name, v in values.items()}}


def rebuild(description: dict[str, Any]) -> nn.Module:
    """The network of a description, with weights that are still to be loaded.

    Args:
        description: of :func:`describe`.

    Raises:
        ValueError: if it names a layer that is not known, or does not fit one.

    Example:
        >>> from torch import nn
        >>> from vardrop.pruning.architecture import describe, rebuild
        >>> rebuild(describe(nn.Sequential(nn.Linear(3, 2), nn.ReLU())))
        Sequential(
          (0): Linear(in_features=3, out_features=2, bias=True)
          (1): ReLU()
        )
    """
    try:
        values = dict(description)
        kind = values.pop("kind")
        if kind == "Sequential":
            layers = nn.Sequential()
            for name, child in values["layers"].items():
                layers.add_module(name, rebuild(child))
            return layers
        if kind == "Select":
            return Select(torch.zeros(values["channels"], dtype=torch.int64), values["dim"])
        plain, names = _LAYERS[kind]
        with torch.random.fork_rng(devices=[]):  # of initial weights that are replaced at once
            return plain(
                **{name: tuple(v) if isinstance(v, list) else v for name, v in values.items() if name in names}
            )
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"vardrop.pruning: an architecture must be of {_known()} with their sizes, got {description!r:.80} "
            f"({type(error).__name__}: {error}); was it written by another version?"
        ) from error


def _known() -> str:
    return ", ".join(sorted([*_LAYERS, "Select", "Sequential"]))
