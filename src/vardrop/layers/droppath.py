"""Residual branches that are dropped at random, the depth rule, and what layers that are left out have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from vardrop.layers.base import Drop, check_choice, inverse
from vardrop.masks import from_generator
from vardrop.rates import Rate
from vardrop.schedules import checked_rate

__all__ = ["DropPath", "drop_path", "survival_rates"]

Mode = Literal["row", "batch"]
Scaling = Literal["inverted", "original"]


def coins(count: int, rate: Tensor, device: torch.device, generator: torch.Generator | None) -> Tensor:
    """Independent coins, True with probability 1 - rate to within 2^-24."""
    draws = torch.rand(count, device=device, **from_generator(generator))
    return draws >= rate.detach().to(device, torch.float32)


def drop_path(
    x: Tensor,
    rate: float | Tensor,
    mode: Mode = "row",
    scaling: Scaling = "inverted",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Drop the residual branch of whole examples, as in training (stochastic depth, Huang et al. 2016).

    .. math:: y_i = x_i b_i / (1 - p), \quad b_i \sim \text{Bernoulli}(1 - p)

    Args:
        x: the branch, before it is added to its shortcut.
        rate: p, the probability to drop, from 0 to 1; a 0-dim tensor changes without a new compilation, and is not
            checked.
        mode: ``"row"``, a coin for every example; ``"batch"``, one coin for all.
        scaling: ``"inverted"`` as above; ``"original"`` leaves the division out, and at inference the branch has to be
            multiplied by 1 − p instead, which :class:`DropPath` does. Both have the expectation that inference has.
        generator: source of the coins; torch's default one if None.

    Shape:
        [batch, ...] with any number of dimensions; the same shape out.

    Raises:
        TypeError: if x is of an integer type.
        ValueError: if x has no batch dimension, p is no rate, or a choice is unknown.

    Example:
        >>> import torch
        >>> from vardrop.layers.droppath import drop_path
        >>> drop_path(torch.ones(6, 1), 0.5, generator=torch.Generator().manual_seed(0)).flatten()
        tensor([0., 2., 0., 0., 0., 2.])
    """
    check_choice("drop_path", "mode", mode, Mode)
    check_choice("drop_path", "scaling", scaling, Scaling)
    if x.ndim == 0:
        raise ValueError("vardrop.drop_path: x must have a batch dimension, got a number")
    if not (x.is_floating_point() or x.is_complex()):
        raise TypeError(f"vardrop.drop_path: x must be of a floating-point or complex type, got {x.dtype}")
    p = rate.detach() if isinstance(rate, Tensor) else torch.tensor(checked_rate(rate, "drop_path"), device="cpu")
    noise = coins(x.shape[0] if mode == "row" else 1, p, x.device, generator).to(x.real.dtype)
    if scaling == "inverted":
        noise = noise * inverse(1 - p.to(noise.device), noise.dtype)
    return x * noise.reshape(-1, *[1] * (x.ndim - 1))


class DropPath(Drop):
    """Drops the residual branch of whole examples in training: see :func:`drop_path`.

    It is applied to what a branch has computed already. :class:`StochasticDepth` wraps the branch and saves its cost.

    Args:
        p: probability to drop, or a schedule. For a network of several blocks see :func:`survival_rates`.
        mode: ``"row"``, a coin for every example; ``"batch"``, one coin for all.
        scaling: ``"inverted"`` divides by 1 − p in training, ``"original"`` multiplies by it in evaluation.

    Shape:
        [batch, ...] with any number of dimensions, and the same out.

    Raises:
        ValueError: as :func:`drop_path` does.

    Example:
        >>> import torch
        >>> from vardrop.layers.droppath import DropPath
        >>> layer = DropPath(0.25, scaling="original")
        >>> layer.eval()(torch.ones(2, 3))
        tensor([[0.7500, 0.7500, 0.7500],
                [0.7500, 0.7500, 0.7500]])
    """

    def __init__(self, p: Rate = 0.1, mode: Mode = "row", scaling: Scaling = "inverted") -> None:
        super().__init__(p)
        check_choice("DropPath", "mode", mode, Mode)
        check_choice("DropPath", "scaling", scaling, Scaling)
        self.mode: Mode = mode
        self.scaling: Scaling = scaling

    def noise(self, x: Tensor, generator: torch.Generator | None) -> Tensor:
        return drop_path(x, self.rate, self.mode, self.scaling, generator)

    def forward(self, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        y = super().forward(x, generator)
        return y if self.training or self.scaling == "inverted" else y * (1 - self.rate).to(y.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, mode={self.mode!r}" + (
            f", scaling={self.scaling!r}" if self.scaling != "inverted" else ""
        )


def survival_rates(depth: int, last: float = 0.5) -> list[float]:
    r"""The probability that each of so many residual blocks survives, falling linearly (Huang et al. 2016, eq. 4).

    .. math:: 1 - \frac{l}{L} (1 - p_L), \quad l = 1, \dots, L

    A block is dropped with the rest: ``StochasticDepth(block, 1 - survival)``. Accounts that give the rate of dropping
    as :math:`(l / L)\, p_L` have taken the survival rate :math:`p_L` for a drop rate; only at 0.5 is it the same.

    Args:
        depth: L, the number of blocks.
        last: :math:`p_L`, the survival of the last block, from 0 to 1; 0.5 in the paper.

    Raises:
        ValueError: if there is no block, or ``last`` is no probability.

    Example:
        >>> from vardrop.layers.droppath import survival_rates
        >>> survival_rates(4, last=0.5)
        [0.875, 0.75, 0.625, 0.5]
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise ValueError(f"vardrop.survival_rates: depth must be a number of blocks, 1 or more, got {depth!r}")
    if not 0 <= last <= 1:
        raise ValueError(f"vardrop.survival_rates: last must be a survival rate in [0, 1], got {last!r}")
    return [1 - block / depth * (1 - last) for block in range(1, depth + 1)]


def shapes_may_depend_on_coins() -> bool:
    """Not inside a compiler or a torch.func transform."""
    return not torch.compiler.is_compiling() and torch._C._functorch.peek_interpreter_stack() is None


def as_if_used(y: Tensor, skipped: Iterable[nn.Module]) -> Tensor:
    """y, with gradients of 0 for the parameters of modules that did not run, which distributed training waits for."""
    unused = {id(p): p for module in skipped for p in module.parameters() if p.requires_grad}
    if not unused or not torch.is_grad_enabled():
        return y
    nothing = [p.flatten()[:0].sum().to(y.device, y.dtype) for p in unused.values()]  # reads no number, so no NaN
    return y + torch.stack(nothing).sum()
