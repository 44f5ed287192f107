"""Where a number that is not finite came from."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vardrop.data import Data
from vardrop.training.sharding import is_sharded, local
from vardrop.training.task import NETWORK, Task
from vardrop.weights.modules import noisy_weights


def check_data(data: Data) -> None:
    """Refuse data with NaN or Inf in it, before anything is trained on them.

    Raises:
        ValueError: naming the part and its first row.
    """
    for part in ("train_x", "train_y", "test_x", "test_y"):
        values: Tensor = getattr(data, part)
        if not values.is_floating_point():
            continue
        bad = ~torch.isfinite(values.reshape(len(values), -1)).all(1)
        if bad.any():
            raise ValueError(
                f"vardrop.train: the data must be finite, got NaN or Inf in {int(bad.sum())} of {len(bad)} rows of "
                f"{data.name}'s {part}, first in row {int(bad.nonzero()[0])}; remove or fill in those rows"
            )


def bad_parameters(module: nn.Module) -> list[str]:
    """Names of the parameters that are not finite, in this process."""
    named = dict(module.named_parameters())
    parts = local(named.values())
    finite = [bool(flag) for flag in torch.stack([part.isfinite().all() for part in parts]).tolist()]
    return [name.removeprefix(NETWORK) for name, good in zip(named, finite, strict=True) if not good]


def _finite(value: Any) -> bool:
    return not isinstance(value, Tensor) or not value.is_floating_point() or bool(value.isfinite().all())


@torch.no_grad()
def blame(task: Task, x: Tensor, y: Tensor) -> str:
    """Say what is not finite when a task runs on a batch, first things first: weights, data, layers, divergences.

    The random state has to be that before the batch, for the noise to be the same.

    Args:
        task: in training mode.
        x: ``[M, ...]``.
        y: ``[M]``.

    Returns:
        The start of a sentence, such as ``"the output of layer '3' (Linear)"``.
    """
    bad = bad_parameters(task)
    if bad:
        return f"the parameter '{bad[0]}'" + (f" (and {len(bad) - 1} more)" if len(bad) > 1 else "")
    for part, values in (("x", x), ("y", y)):
        if not _finite(values):
            return f"the data ({part} of the batch)"
    if any(is_sharded(p) for p in task.parameters()):  # a forward pass needs every process, and not all may get here
        return "the loss"

    first: list[str] = []

    def look(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not first and not _finite(output):
                first.append(f"the output of layer '{name}' ({type(module).__name__})")

        return hook

    layers = [(n, m) for n, m in task.network.named_modules() if not any(m.children())]
    handles = [module.register_forward_hook(look(name)) for name, module in layers]
    try:
        _, nll = task(x, y)
    finally:
        for handle in handles:
            handle.remove()
    if first:
        return first[0]
    for name, mean, noise, config, geometry in noisy_weights(task.network):
        if not _finite(config.kl(mean, noise, geometry)):
            return f"the divergence of '{name}', by its rates,"
    return "the loss" if not _finite(nll) else "the loss of another process or of an overflow in passing"
