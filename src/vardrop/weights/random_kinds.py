"""The two kinds of random weight: independent entries (type B, mean-field), and slices that share a factor (type A)."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vardrop.weights import estimators
from vardrop.weights.geometry import spread
from vardrop.weights.linear_ops import LinearOp
from vardrop.weights.noise import add_noise, normal
from vardrop.weights.random_weight import CASTS, CUTS, TRANSPOSES, RandomWeight


class IndependentWeight(RandomWeight):
    """A weight with independent Gaussian entries, N(loc, variance).

    Args:
        loc: the mean, μ or θ.
        variance: σ², of the same shape, or a function that makes it when it is first needed.
        drawn: of a view, the same view of the sample of what it is a view of.
    """

    def __init__(
        self, loc: Tensor, variance: Tensor | Callable[[], Tensor], drawn: Callable[[], Tensor] | None = None
    ) -> None:
        self.loc = loc
        self._variance = variance
        self._draw = drawn

    def _first_draw(self, generator: torch.Generator | None) -> Tensor:
        return self.sample(generator) if self._draw is None else self._draw()

    @property
    def variance(self) -> Tensor:
        """σ², of the shape of ``loc``."""
        if not isinstance(self._variance, Tensor):
            self._variance = self._variance()
        return self._variance

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return add_noise(self.loc, self.variance, generator)

    def local(self, op: LinearOp, generator: torch.Generator | None) -> Tensor:
        """The operation by the local reparameterization trick."""
        return estimators.local(op, self.loc, self.variance, generator)

    def _carry_out(self, op: LinearOp) -> Tensor:
        return estimators.independent(op, self)

    def _view(self, name: str, view: Callable[[Tensor], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name == "__getitem__" and not _only_slices(args[0]):
            return None
        loc, variance = view(self.loc), view(self.variance)
        if name in CASTS and loc.dtype == torch.float16:  # which has no room for a variance
            variance = self.variance.to(loc.device)
        if isinstance(loc, Tensor):
            return IndependentWeight(loc, variance, lambda: view(self.drawn()))
        pieces = enumerate(zip(loc, variance, strict=True))
        return tuple(IndependentWeight(m, v, functools.partial(self._piece, view, i)) for i, (m, v) in pieces)

    def _piece(self, view: Callable[[Tensor], Any], index: int) -> Tensor:
        piece: Tensor = view(self.drawn())[index]
        return piece


class CorrelatedWeight(RandomWeight):
    """A weight whose slices along one axis share a factor: w_i = s_i θ_i, s_i ~ N(1, std_i²) (eq. 11).

    Args:
        loc: the mean, θ.
        std: √α for every slice, ``[units]``.
        axis: the axis of ``loc`` that runs over the units.
        groups: of a grouped convolution, whose weight ``[out, in / groups, ...]`` has ``in`` units.
        factor: of a view, what gives its part of the factors of what it is a view of.
    """

    def __init__(
        self,
        loc: Tensor,
        std: Tensor,
        axis: int,
        groups: int = 1,
        factor: Callable[[torch.Generator | None], Tensor] | None = None,
    ) -> None:
        self.loc = loc
        self.std = std
        self.axis = axis
        self.groups = groups
        self._make = factor or self._new_factor
        self._factor: Tensor | None = None

    def _new_factor(self, generator: torch.Generator | None) -> Tensor:
        return 1 + self.std * normal(self.std.shape, self.std, generator)

    def factor(self, generator: torch.Generator | None = None) -> Tensor:
        """The one s, ``[units]``, that everything shares which has one weight for a whole minibatch."""
        if self._factor is None:
            self._factor = self._make(generator)
        return self._factor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return self._with(self._new_factor(generator))

    def _first_draw(self, generator: torch.Generator | None) -> Tensor:
        return self._with(self.factor(generator))

    def _with(self, factor: Tensor) -> Tensor:
        return self.loc * spread(factor, self.loc.shape, self.axis, self.groups).to(self.loc.dtype)

    def _carry_out(self, op: LinearOp) -> Tensor:
        return estimators.correlated(op, self)

    def _view(self, name: str, view: Callable[[Tensor], Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if name in CASTS:
            if name == "detach":
                return self._part(view, self.axis, lambda std: std.detach())
            return self._part(view, self.axis)
        if self.groups > 1:
            return None
        if name in TRANSPOSES:
            swapped = [axis % self.loc.ndim for axis in (*args, *kwargs.values()) or (-2, -1)]
            axis = swapped[1 - swapped.index(self.axis)] if self.axis in swapped else self.axis
            return self._part(view, axis)
        if name in CUTS:
            dim = kwargs.get("dim", args[0] if name == "narrow" else args[1] if len(args) > 1 else 0)
            return None if dim % self.loc.ndim == self.axis else self._part(view, self.axis)
        if name == "__getitem__" and _only_slices(args[0]):
            cut = args[0] if isinstance(args[0], tuple) else (args[0],)
            return self._part(view, self.axis, lambda std: std[cut[self.axis]] if len(cut) > self.axis else std)
        return None

    def _part(
        self, view: Callable[[Tensor], Any], axis: int, units: Callable[[Tensor], Tensor] = lambda std: std
    ) -> Any:
        """Views of this weight; ``units`` takes theirs out of what is ``[units]``."""

        def one(loc: Tensor) -> CorrelatedWeight:
            return CorrelatedWeight(loc, units(self.std), axis, self.groups, lambda g: units(self.factor(g)))

        pieces = view(self.loc)
        return one(pieces) if isinstance(pieces, Tensor) else tuple(map(one, pieces))


def _only_slices(index: Any) -> bool:
    return all(isinstance(i, slice) for i in (index if isinstance(index, tuple) else (index,)))
