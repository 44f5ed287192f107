"""How noise comes into a BatchNorm, where theory can follow."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vardrop.diagnosis.tracing import Trace
from vardrop.layers.base import Drop
from vardrop.layers.dropblock import _DropBlock
from vardrop.layers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from vardrop.layers.droppath import DropPath
from vardrop.layers.gaussian import GaussianDropout
from vardrop.roles import rate_attribute

_PASSED = {"ReLU", "LeakyReLU", "Flatten", "Identity", "relu", "relu_", "leaky_relu", "flatten", "reshape", "view"}
_ADDED = {"add", "__add__", "add_", "__iadd__", "__radd__"}


class Path(NamedTuple):
    """How noise comes into a BatchNorm, where theory can follow.

    Attributes:
        alpha: the variance of the noise.
        at: the module whose input the noise is measured at: the BatchNorm itself if the dropout is right before it, the
            dropout if something else is added, or the linear layer in between.
    """

    alpha: float
    at: nn.Module


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
    return None if attribute is None else float(getattr(module, attribute))


def is_plain(module: nn.Module | None, function: str) -> bool:
    """Whether a dropout drops single units."""
    if module is None:
        return function == "dropout"
    if isinstance(module, GaussianDropout):
        return not module.shared
    return type(module) in (nn.Dropout, nn.AlphaDropout, Dropout) or (
        isinstance(module, _DropoutNd | Drop) and type(module).__name__ == "Dropout"
    )
