"""Every BatchNorm of a model, measured: its inputs with noise, without it, and by theory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from vardrop.diagnosis.passes import Passes, hooked
from vardrop.diagnosis.paths import Path, conditional_kind
from vardrop.diagnosis.report import BatchNormShift, Unjudged
from vardrop.diagnosis.statistics import Inputs, Sums, over_positions
from vardrop.diagnosis.theory import conditional_variance

NO_STATISTICS = "it keeps no running statistics and normalises by the batch in evaluation too, so nothing can shift"


def batchnorms(model: nn.Module) -> dict[nn.Module, str]:
    """All BatchNorms of a model by name, those of other people too: what has running means and variances of channels.

    Args:
        model: any module.
    """
    return {module: name or type(module).__name__ for name, module in model.named_modules() if _is_batchnorm(module)}


def _is_batchnorm(module: nn.Module) -> bool:
    if isinstance(module, _BatchNorm):
        return True
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return False
    if isinstance(module, torch.jit.ScriptModule):
        return module.original_name.startswith("BatchNorm")
    running = [module._buffers.get(name) for name in ("running_mean", "running_var")]
    return all(isinstance(x, Tensor) and x.ndim == 1 for x in running)


def measure(
    passes: Passes, chosen: Iterable[nn.Module], paths: dict[nn.Module, Path], noise: str | None = ""
) -> tuple[dict[nn.Module, Inputs], dict[nn.Module, str]]:
    """The inputs of some BatchNorms over all batches, without noise and with it.

    BatchNorm keeps to its running statistics in both, so that nothing but the noise makes a difference.

    Args:
        passes: the model, borrowed.
        chosen: the BatchNorms.
        paths: where theory follows.
        noise: whose noise is on, "" for all, None for none.

    Returns:
        The inputs by module, and the modules that could not be measured with the reason.
    """
    found = {module: Inputs() for module in chosen}
    failed: dict[nn.Module, str] = {}
    through = {module: path for module, path in paths.items() if module in found and path.at is not module}
    for index in range(len(passes.batches)):
        off = _seen(passes, index, None, found, through)
        on = off if noise is None else _seen(passes, index, noise, found, {})
        for module in [module for module in found if module not in failed]:
            reason = _add(found[module], off[module], on[module])
            if reason is not None:
                failed[module] = reason
    for module, inputs in found.items():
        if module not in failed and inputs.examples == 0:
            failed[module] = "it did not run on these batches"
    return {module: inputs for module, inputs in found.items() if module not in failed}, failed


class _Seen(NamedTuple):
    """What one pass showed of one BatchNorm, call by call; None for an input that is none."""

    inputs: list[Sums | None]
    excess: list[Tensor]


def _seen(
    passes: Passes, index: int, noise: str | None, found: dict[nn.Module, Inputs], paths: dict[nn.Module, Path]
) -> dict[nn.Module, _Seen]:
    """One pass. Sums are taken at once, so that no activation outlives it."""
    seen = {module: _Seen([], []) for module in found}

    def at_norm(module: nn.Module, x: Tensor) -> None:
        fits = x.ndim >= 2 and x.is_floating_point() and x.numel() > 0
        seen[module].inputs.append(found[module].sums_of(x) if fits else None)

    def before(module: nn.Module, x: Tensor) -> None:
        variance = conditional_variance(module, x) if conditional_kind(module) else x.square()
        for norm, path in paths.items():
            if path.at is module and variance is not None:
                seen[norm].excess.append(over_positions(variance))

    hooks: dict[nn.Module, Callable[[nn.Module, Tensor], None]] = dict.fromkeys(found, at_norm)
    with hooked(hooks | {path.at: before for path in paths.values()}):
        passes.run(index, noise)
    return seen


def _add(inputs: Inputs, off: _Seen, on: _Seen) -> str | None:
    """Add one batch; the reason if that is not possible."""
    if len(off.inputs) != len(on.inputs):
        return "it does not run as often with the noise on"
    for place, (clean, noisy) in enumerate(zip(off.inputs, on.inputs, strict=True)):
        if clean is None or noisy is None:
            return "its inputs are no batches of channels"
        if clean.shape != noisy.shape:
            return "its inputs have other shapes with the noise on"
        if not (clean.table.isfinite().all() and noisy.table.isfinite().all()):
            return "its inputs are not finite"
        inputs.add_sums(clean, noisy, off.excess[place] if off.excess else None)
    return None


def judged(
    name: str, module: nn.Module, inputs: Inputs, sources: Iterable[str], path: Path | None
) -> BatchNormShift | Unjudged:
    """The numbers of one BatchNorm.

    Args:
        name: of the module.
        module: the BatchNorm.
        inputs: what was measured.
        sources: noise that reaches it.
        path: how, if theory can follow.
    """
    if inputs.examples < 2:
        return Unjudged(name, f"it has seen {inputs.examples} example, and a variance needs two or more")
    alive = inputs.alive()
    if not alive.any():
        return Unjudged(name, "no channel of its input varies")
    clean = inputs.log_variance()
    shift = (inputs.log_variance(noise=True) - clean).only(alive)
    value, error = shift.mean()
    channels = torch.full_like(clean.value, math.nan)
    errors = channels.clone()
    channels[alive], errors[alive] = shift.value.exp(), shift.value.exp() * shift.error
    theory, gap = None, None
    if path is not None:
        expected = inputs.log_theory(path.alpha, direct=path.at is module)
        theory = math.exp((expected - clean).only(alive).mean()[0])
        gap = (inputs.log_variance(noise=True) - expected).only(alive).mean()
    mean, variance = (module._buffers[key].cpu().double() for key in ("running_mean", "running_var"))  # type: ignore[union-attr]
    unbiased = inputs.count / max(inputs.count - 1, 1)
    running = float((variance[alive].clamp_min(1e-30).log() - (clean.value[alive] + math.log(unbiased))).mean())
    gaps = [float(((mean - inputs.mean(on)).square() / inputs.variance(on))[alive].mean()) for on in (False, True)]
    stale = min(_distance(variance[alive], inputs.variance(on)[alive] * unbiased, gaps[on]) for on in (False, True))
    counted = getattr(module, "num_batches_tracked", None)
    return BatchNormShift(
        name, math.exp(value), math.exp(value) * error, channels, errors, theory, gap,
        math.exp(running), math.exp(running) * clean.only(alive).mean()[1], gaps[0], stale,
        None if counted is None else int(counted), tuple(sources), {}, inputs.examples,
    )  # fmt: skip


def _distance(running: Tensor, variance: Tensor, mean_gap: float) -> float:
    """How far running statistics are off: the larger of the factor in variance, less 1, and the gap of the means."""
    factor = math.exp(abs(float((running.clamp_min(1e-30) / variance).log().mean())))
    return max(factor - 1, mean_gap)


def with_causes(found: BatchNormShift, causes: dict[str, float]) -> BatchNormShift:
    """The same with what each source gives alone."""
    return replace(found, causes=causes)
