"""Running statistics estimated again, without noise: what evaluation sees, and nothing else."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from vardrop.diagnosis.batchnorms import batchnorms, measure
from vardrop.diagnosis.passes import Passes


def recalibrate(passes: Passes) -> list[str]:
    """Set the running statistics of every BatchNorm to those of its inputs with the noise off.

    First all normalise by their batch, and averages over all batches are taken: statistics of a layer hang on those of
    the layers before. Then a pass in evaluation gives the exact means and variances over all examples.

    Args:
        passes: the model, borrowed; the buffers are changed until the loan ends.

    Returns:
        The names of the BatchNorms.
    """
    chosen = {module: name for module, name in batchnorms(passes.model).items() if keeps_statistics(module)}
    _averages(passes, [module for module in chosen if isinstance(module, _BatchNorm)])
    found, _ = measure(passes, chosen, {}, noise=None)
    for module, inputs in found.items():
        unbiased = inputs.count / max(inputs.count - 1, 1)
        module.running_mean.copy_(inputs.mean())  # type: ignore[operator]
        module.running_var.copy_(inputs.variance() * unbiased)  # type: ignore[operator]
    return [chosen[module] for module in found]


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a BatchNorm has running statistics."""
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
