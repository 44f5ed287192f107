"""Running statistics estimated again, without noise: what evaluation sees, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vardrop.diagnosis.batchnorms import batchnorms, measure
from vardrop.diagnosis.passes import Passes
from vardrop.diagnosis.statistics import Inputs

_PASSES = 5  # at most
_SAME = 1e-3


def recalibrate(passes: Passes) -> list[str]:
    """Set the running statistics of every BatchNorm to those of its inputs with the noise off.

    First all normalise by their batch, and averages over all batches are taken: statistics of a layer hang on those of
    the layers before. From there passes in evaluation give means and variances over all examples; each makes one more
    layer exact, whatever the sizes of the batches, and they end as soon as one changes next to nothing.

    Args:
        passes: the model, borrowed; the buffers are changed until the loan ends.

    Returns:
        The names of the BatchNorms.
    """
    chosen = {module: name for module, name in batchnorms(passes.model).items() if keeps_statistics(module)}
    _averages(passes, [m for m in chosen if isinstance(m, _BatchNorm) and m.num_batches_tracked is not None])
    found: dict[nn.Module, Inputs] = {}
    for _ in range(_PASSES):
        found, _failed = measure(passes, chosen, {}, noise=None)
        if max((_set(module, inputs) for module, inputs in found.items()), default=0.0) < _SAME:
            break
    return [chosen[module] for module in found]


def _set(module: nn.Module, inputs: Inputs) -> float:
    """Take over measured statistics; by what share of a variance, at most, any of them changes."""
    mean, variance = module._buffers["running_mean"], module._buffers["running_var"]
    if mean is None or variance is None:
        return 0.0
    new = (inputs.mean().to(mean), (inputs.variance() * inputs.count / max(inputs.count - 1, 1)).to(variance))
    scale = new[1].clamp_min(1e-12)
    change = torch.maximum((mean - new[0]).square() / scale, (variance - new[1]).abs() / scale)[
        inputs.alive().to(mean.device)
    ]
    mean.copy_(new[0])
    variance.copy_(new[1])
    return float(change.max()) if len(change) else 0.0


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm has running statistics that can be measured, and set."""
    if isinstance(module, torch.jit.ScriptModule):
        return False
    return all(getattr(module, name, None) is not None for name in ("running_mean", "running_var"))


def _averages(passes: Passes, chosen: Iterable[_BatchNorm]) -> None:
    """Plain averages over the batches of what each BatchNorm normalises by."""
    momenta = {module: (module.momentum, module.training) for module in chosen}
    counts = {module: int(module.num_batches_tracked) for module in momenta}  # type: ignore[arg-type]
    kept = {module: (module.running_mean.clone(), module.running_var.clone()) for module in momenta}  # type: ignore[union-attr]
    try:
        for module in momenta:
            module.reset_running_stats()
            module.momentum, module.training = None, True
        for index in range(len(passes.batches)):
            try:
                passes.run(index)
            except ValueError as error:  # a batch of one example has no variance
                if "more than 1 value per channel" not in str(error):
                    raise
    finally:
        for module, (momentum, training) in momenta.items():
            module.momentum, module.training = momentum, training
            if not int(module.num_batches_tracked):  # type: ignore[arg-type]
                module.running_mean.copy_(kept[module][0])  # type: ignore[union-attr]
                module.running_var.copy_(kept[module][1])  # type: ignore[union-attr]
            module.num_batches_tracked.clamp_min_(counts[module])  # type: ignore[union-attr]
