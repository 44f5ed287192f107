"""What all layers of activation noise share: a rate, and where their randomness comes from."""

from __future__ import annotations

from typing import Any, TypeGuard, get_args

import torch
from torch import Tensor, nn

from vardrop.rates import Rate, Rated
from vardrop.weights import estimators
from vardrop.weights.modules import RandomWeights


class Drop(Rated):
    """A layer that multiplies its input with noise in training and returns it as it is in evaluation.

    Subclasses write :meth:`noise`, the layer in training. The noise comes from the ``generator`` that a call is given,
    else from that of the ``vd.estimator`` block around it, else from torch's default one.

    Args:
        p: the rate; see :class:`vardrop.rates.Rated`.

    Attributes:
        off: whether there is no noise in training either. ``vd.convert_`` sets it where noise on weights has taken the
            place of that of the layer, whose rate then stays what it was.

    Example:
        >>> import torch
        >>> from vardrop import functional as F, layers
        >>> class RowDropout(layers.Drop):  # one draw for all columns
        ...     def noise(self, x, generator):
        ...         return F.drop(x, self.rate, shared=-1, generator=generator)
        >>> y = RowDropout(0.5)(torch.ones(4, 3))
        >>> bool((y == y[:, :1]).all())
        True
    """

    off = False  # of the class, so that it is no entry of a checkpoint, and layers of older pickles have it

    def __init__(self, p: Rate = 0.5) -> None:
        super().__init__(p)

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        """The output in training."""
        raise NotImplementedError

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        if not self.training or self.off:
            return x
        return self.noise(x, source(generator))

    def extra_repr(self) -> str:
        return super().extra_repr() + (", off" if self.off else "")


def source(generator: torch.Generator | None) -> torch.Generator | None:
    """The generator that a layer draws from: the one it is given, or that of the estimator in force."""
    return estimators.current().generator if generator is None else generator


def is_sequence(module: nn.Module) -> TypeGuard[nn.Sequential]:
    """Whether a module runs its children one after the other: a subclass that leaves it at that does too."""
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def check_plain(layer: nn.Module, owner: str) -> None:
    """Refuse to wrap a layer whose weights are random already, or have no shape yet."""
    if any(isinstance(p, nn.UninitializedParameter) for p in layer.parameters()):
        raise TypeError(
            f"vardrop.{owner}: layer must have its weights, got a {type(layer).__name__} that is lazy and has no shape "
            "yet; run a forward pass of it first"
        )
    if any(isinstance(module, RandomWeights) for module in layer.modules()):
        raise TypeError(
            f"vardrop.{owner}: layer must have plain weights, got a {type(layer).__name__} whose weights are random, "
            "which would be noise upon noise; vd.restore_ it first"
        )


def check_choice(owner: str, name: str, value: str, choices: Any) -> None:
    """Refuse an argument that is none of the strings of its ``Literal`` type."""
    if value not in get_args(choices):
        raise ValueError(f"vardrop.{owner}: {name} must be one of {', '.join(get_args(choices))}, got {value!r}")


def inverse(kept: Tensor, dtype: torch.dtype) -> Tensor:
    """1 / kept in another type, and 0 where nothing is kept; never infinite, as infinity times 0 is no number."""
    largest = min(torch.finfo(dtype).max, torch.finfo(kept.dtype).max)
    return torch.where(kept > 0, 1 / kept, 0.0).clamp(max=largest).to(dtype)
