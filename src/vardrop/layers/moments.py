"""Mean and variance carried through a network in one pass, in place of many noisy ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.functional import moments_linear, moments_relu
from vardrop.layers.base import is_sequence
from vardrop.layers.dropout import Dropout
from vardrop.layers.fast import FastDropout
from vardrop.layers.gaussian import GaussianDropout
from vardrop.weights.modules import RandomWeights
from vardrop.weights.random_kinds import CorrelatedWeight

__all__ = ["propagate_moments"]

Moments = tuple[Tensor, Tensor]
_SHAPES = (nn.Flatten, nn.Unflatten)
_KNOWN = "nn.Linear (its weights may be random), vd.layers.FastDropout, nn.ReLU, dropout of units, nn.Flatten"


def propagate_moments(net: nn.Module, x: Tensor) -> Moments:
    r"""Mean and variance of a network's outputs under its own noise, by one deterministic pass (Wang, Manning 2013).

    .. math:: m' = W m + b, \quad v' = W^2 (v + \alpha (m^2 + v)), \qquad
              \text{ReLU: the moments of } \max(0, a), \; a \sim N(m, v)

    The alternative to sampling in evaluation: the noise counts whatever mode the network is in. Exact for one linear
    layer behind dropout; beyond it leaves out that the units of a layer depend on each other, and takes what goes into
    a ReLU for Gaussian, so it is near where layers are wide. What it says of classes are moments of logits.

    Args:
        net: an ``nn.Sequential``, nested as one likes, of linear layers (plain, in :class:`FastDropout`, or with random
            weights), ReLU, dropout of single units (torch's or ours, Bernoulli or Gaussian), Flatten and Identity.
        x: its input, ``[N, ...]``.

    Returns:
        Mean and variance of the outputs, of the shape of the outputs.

    Raises:
        TypeError: if the network has a module of another kind.

    Example:
        >>> import torch, vardrop as vd
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(0.5), nn.Linear(64, 1))
        >>> mean, variance = vd.layers.propagate_moments(net, torch.randn(7, 4))
        >>> mean.shape, bool((variance > 0).all())
        (torch.Size([7, 1]), True)
    """
    moments = x, torch.zeros_like(x)
    for name, module in _steps(net, ""):
        moments = _step(name, module, *moments)
    return moments


def _steps(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    """The modules that are no sequence of others, in the order they run."""
    if is_sequence(module):
        for key, child in module._modules.items():  # not named_children(), which leaves out repetitions
            if child is not None:
                yield from _steps(child, f"{name}.{key}" if name else key)
    else:
        yield name or type(module).__name__, module


def _step(name: str, module: nn.Module, mean: Tensor, variance: Tensor) -> Moments:
    rate = _rate_of_units(module)
    if rate == 1:
        return torch.zeros_like(mean), torch.zeros_like(variance)
    if rate is not None:
        return mean, variance + rate / (1 - rate) * (mean * mean + variance)
    if isinstance(module, RandomWeights) and isinstance(module, nn.Linear):
        return _random_linear(module, mean, variance)
    if isinstance(module, FastDropout):
        return module.moments(mean, variance)
    if type(module) is nn.Linear:
        return moments_linear(mean, variance, module.weight, module.bias)
    if isinstance(module, nn.ReLU):
        return moments_relu(mean, variance)
    if isinstance(module, (*_SHAPES, nn.Identity)):
        return module(mean), module(variance)
    raise TypeError(
        f"vardrop.propagate_moments: the network must be an nn.Sequential of {_KNOWN} and nn.Identity, got "
        f"{type(module).__name__} ({name}); sample with vd.mc_predict instead"
    )


def _rate_of_units(module: nn.Module) -> Tensor | float | None:
    """p of a dropout of single units, None for everything else."""
    if isinstance(module, Dropout) or (isinstance(module, GaussianDropout) and not module.shared):
        return 0.0 if module.off else module.rate
    return module.p if type(module) is nn.Dropout else None


def _random_linear(module: Any, mean: Tensor, variance: Tensor) -> Moments:
    """Of a linear layer whose weight is random: its variance acts on m² + v, its mean on v."""
    config, geometry, key = module.vardrop_noise["weight"]
    weight = config.random(module._parameters["weight"], getattr(module, key), geometry)
    if isinstance(weight, CorrelatedWeight):
        spread = variance + weight.std.square() * (mean * mean + variance)
        return moments_linear(mean, spread, weight.loc, module.bias)
    mean_, variance_ = moments_linear(mean, variance, weight.loc, module.bias)
    return mean_, variance_ + (mean * mean + variance) @ weight.variance.to(mean.dtype).t()
