"""Every BatchNorm of a model, measured: its inputs with noise, without it, and by theory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.modules.dropout import _DropoutNd

from vardrop.diagnosis.passes import Passes, hooked
from vardrop.diagnosis.report import BatchNormShift, Unjudged
from vardrop.diagnosis.statistics import Inputs
from vardrop.diagnosis.theory import conditional_variance
from vardrop.diagnosis.tracing import Trace
from vardrop.layers.base import Drop
from vardrop.layers.dropblock import _DropBlock
from vardrop.layers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from vardrop.layers.droppath import DropPath
from vardrop.layers.gaussian import GaussianDropout
from vardrop.roles import rate_attribute

NO_STATISTICS = "it keeps no running statistics and normalises by the batch in evaluation too, so nothing can shift"
_PASSED = {"ReLU", "LeakyReLU", "Flatten", "Identity", "relu", "relu_", "leaky_relu", "flatten", "reshape", "view"}
_ADDED = {"add", "__add__", "add_", "__iadd__", "__radd__"}


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
    running = [module._buffers.get(name) for name in ("running_mean", "running_var")]
    return all(isinstance(x, Tensor) and x.ndim == 1 for x in running)


class Path(NamedTuple):
    """How noise comes into a BatchNorm, where theory can follow.

    Attributes:
        alpha: the variance of the noise.
        at: the module whose input the noise is measured at: the BatchNorm itself if the dropout is right before it, the
            dropout if something else is added, or the linear layer in between.
    """

    alpha: float
    at: nn.Module


@dataclass
class Measured:
    """What the passes gave for one BatchNorm."""

    module: nn.Module
    inputs: Inputs
    sources: tuple[str, ...] | None
    path: Path | None


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
    found: dict[nn.Module, Inputs] = {module: Inputs() for module in chosen}
    failed: dict[nn.Module, str] = {}
    points = {path.at for module, path in paths.items() if module in found} | set(found)
    for index in range(len(passes.batches)):
        seen: list[dict[nn.Module, list[Tensor]]] = []
        for on in (None, noise):
            inputs: dict[nn.Module, list[Tensor]] = {module: [] for module in points}
            with hooked(dict.fromkeys(points, lambda module, x, kept=inputs: kept[module].append(_kept(x)))):  # type: ignore[misc]
                passes.run(index, on)
            seen.append(inputs)
            if noise is None:
                seen.append(inputs)
                break
        for module in [module for module in found if module not in failed]:
            reason = _add(found[module], module, paths.get(module), *seen)
            if reason is not None:
                failed[module] = reason
    for module, inputs_ in found.items():
        if module not in failed and inputs_.examples == 0:
            failed[module] = "it did not run on these batches"
    return {module: inputs_ for module, inputs_ in found.items() if module not in failed}, failed


def _kept(x: Tensor) -> Tensor:
    """A tensor that later code in place cannot change."""
    return x.detach().clone()


def _add(
    inputs: Inputs,
    module: nn.Module,
    path: Path | None,
    off: dict[nn.Module, list[Tensor]],
    on: dict[nn.Module, list[Tensor]],
) -> str | None:
    """Add one batch; the reason if that is not possible."""
    if [x.shape for x in off[module]] != [x.shape for x in on[module]]:
        return "its inputs have other shapes with the noise on"
    if any(x.ndim < 2 or not x.is_floating_point() or x.numel() == 0 for x in off[module]):
        return "its inputs are no batches of channels"
    for place, (clean, noisy) in enumerate(zip(off[module], on[module], strict=True)):
        if not (clean.isfinite().all() and noisy.isfinite().all()):
            return "its inputs are not finite"
        excess = None
        if path is not None and path.at is not module and len(off[path.at]) == len(off[module]):
            x = off[path.at][place]
            excess = conditional_variance(path.at, x) if conditional_kind(path.at) else x.square()
            if excess is None or excess.shape != clean.shape:
                return "the layer in front of it has inputs of other shapes than theory expects"
        inputs.add(clean, noisy, excess)
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


# ------------------------------------------------------------------------------------------------ theory's paths


def path_to(trace: Trace, module: nn.Module, sources: dict[str, str]) -> Path | None:
    """How the only noise that reaches a BatchNorm comes there, if theory can follow: None if not.

    It can from a dropout right before it, from one whose output something without noise is added to, and from dropout
    of single units through one linear layer; ReLU and reshaping in between change nothing.

    Args:
        trace: of a pass with the noise on.
        module: the BatchNorm.
        sources: name -> kind of noise.
    """
    calls = trace.calls.get(module, [])
    if len(calls) != 1 or len(trace.noise_upstream(calls[0], sources)) != 1:
        return None
    noisy = {i for i in trace.upstream(calls[0]) if trace.source(i, sources) is not None}
    noisy |= {i for i in trace.upstream(calls[0]) if trace.upstream(i) & noisy}
    if sum(trace.source(i, sources) is not None for i in noisy) != 1:
        return None  # one source that runs several times
    layer: nn.Module | None = None
    added = rectified = False
    node = _only(trace, calls[0], noisy)
    while node is not None:
        this = trace.nodes[node]
        if trace.source(node, sources) is not None:
            alpha, single = _alpha(this.module, this.name, this.rate)
            if alpha is None or (layer is not None and not single):
                return None
            if rectified and isinstance(this.module, GaussianDropout):
                return None  # its noise changes signs
            if added:
                return None if this.module is None else Path(alpha, this.module)
            return Path(alpha, layer or module)
        if layer is None and not added and this.module is not None and conditional_kind(this.module):
            layer = this.module
        elif layer is None and this.name in _ADDED and len(set(this.parents) & noisy) == 1:
            added = True
        elif layer is not None and this.name in _PASSED:
            rectified = rectified or "relu" in this.name.lower()
        else:
            return None
        node = _only(trace, node, noisy)
    return None


def conditional_kind(module: nn.Module) -> bool:
    """Whether theory knows how noise goes through a layer."""
    return type(module) in (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d) and (
        getattr(module, "padding_mode", "zeros") == "zeros"
    )


def _only(trace: Trace, node: int, noisy: set[int]) -> int | None:
    """The only parent that noise comes from."""
    parents = [parent for parent in trace.nodes[node].parents if parent in noisy]
    return parents[0] if len(parents) == 1 else None


def _alpha(module: nn.Module | None, function: str, rate: float | None) -> tuple[float | None, bool]:
    """The variance of the noise, and whether every unit has noise of its own."""
    if module is None:
        known = function in ("dropout", "dropout1d", "dropout2d", "dropout3d") and rate is not None and rate < 1
        return (rate / (1 - rate) if known and rate is not None else None), function == "dropout"
    p = _rate(module)
    if p is None or not 0 < p < 1:
        return None, False
    if isinstance(module, GaussianDropout):
        return p / (1 - p), not module.shared
    if isinstance(module, _DropBlock):
        exact = module.seeds == "extended" and module.rescale == "expected"
        return (p / (1 - p) if exact else None), False
    if isinstance(module, DropPath):
        return (p / (1 - p) if module.scaling == "inverted" else None), False
    if isinstance(module, Dropout | nn.Dropout):
        return p / (1 - p), True
    if isinstance(module, Dropout1d | Dropout2d | Dropout3d | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d):
        return p / (1 - p), False
    return None, False


def _rate(module: nn.Module) -> float | None:
    attribute = rate_attribute(module)
    return None if attribute is None or isinstance(module, _LazyNormBase) else float(getattr(module, attribute))


def is_plain(module: nn.Module | None, function: str) -> bool:
    """Whether a dropout drops single units."""
    if module is None:
        return function == "dropout"
    if isinstance(module, GaussianDropout):
        return not module.shared
    return type(module) in (nn.Dropout, nn.AlphaDropout, Dropout) or (
        isinstance(module, _DropoutNd | Drop) and type(module).__name__ == "Dropout"
    )
