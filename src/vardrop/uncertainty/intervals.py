r"""Whether the intervals of a regression hold as many targets as they promise.

Everything follows from where each target falls in its predictive distribution, the probability integral transform
(Dawid 1984): uniform on [0, 1] if the predictions are calibrated. The central interval of level q holds a target if
its transform u satisfies :math:`|2u - 1| \le q`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vardrop.optional import needed
from vardrop.uncertainty.inputs import exact

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LEVELS = tuple(i / 20 for i in range(1, 20))


def gaussian_pit(mean: Tensor, std: Tensor, targets: Tensor) -> Tensor:
    """Where targets fall in normal predictive distributions.

    Args:
        mean: ``[N]``.
        std: ``[N]``, above 0, of a new observation: with the noise in the data.
        targets: ``[N]``.

    Raises:
        ValueError: for other shapes, or a standard deviation that is not above 0.

    Example:
        >>> import torch
        >>> gaussian_pit(torch.zeros(2), torch.ones(2), torch.tensor([0.0, 1.96]))
        tensor([0.5000, 0.9750], dtype=torch.float64)
    """
    return mixture_pit(mean[None], std, targets)


def mixture_pit(samples: Tensor, noise_std: float | Tensor, targets: Tensor) -> Tensor:
    r"""Where targets fall in the mixture of the passes: :math:`u_i = \frac1T \sum_t \Phi((y_i - f_{ti}) / \sigma)`.

    Args:
        samples: ``[T, N]``, the passes.
        noise_std: σ, the standard deviation of the noise in the data, τ^(-1/2); a number or ``[N]``, above 0.
        targets: ``[N]``.

    Raises:
        ValueError: for other shapes, or a standard deviation that is not above 0.

    Example:
        >>> import torch
        >>> mixture_pit(torch.tensor([[-1.0], [1.0]]), 0.1, torch.tensor([0.0]))
        tensor([0.5000], dtype=torch.float64)
    """
    f = exact(samples)
    std = exact(torch.as_tensor(noise_std)).to(f.device)
    y = exact(targets).to(f.device)
    if samples.ndim != 2 or y.shape != samples.shape[1:] or std.shape not in ((), y.shape) or not len(y):
        raise ValueError(
            "vardrop.uncertainty: a prediction and a target for every case are needed, all [N] (passes [T, N]), got "
            f"{tuple(samples.shape[-1:])}, std {tuple(std.shape)} and targets {tuple(targets.shape)}; squeeze outputs"
        )
    if not bool((std > 0).all()):
        raise ValueError(
            f"vardrop.uncertainty: every standard deviation must be above 0, got {std.min().item():.4g}; add the noise "
            "in the data, 1 / precision, to the variance of the passes"
        )
    return torch.special.ndtr((y - f) / std).mean(0)


@dataclass(frozen=True, eq=False)
class IntervalCalibration:
    """What :func:`interval_calibration` returns.

    Attributes:
        levels: ``[L]``, what the central intervals promise.
        coverage: ``[L]``, the share of targets they hold.
        cases: N.
    """

    levels: Tensor
    coverage: Tensor
    cases: int

    @property
    def error(self) -> float:
        """The mean absolute difference of coverage and level."""
        return (self.coverage - self.levels).abs().mean().item()

    @property
    def standard_error(self) -> Tensor:
        """Of the coverage of a calibrated model, ``[L]``."""
        return (self.levels * (1 - self.levels) / self.cases).sqrt()

    def plot(self, ax: Axes | None = None) -> Axes:
        """Draw coverage against level, with two standard errors of a calibrated model; needs matplotlib."""
        ax = ax or needed("matplotlib.pyplot", "uncertainty.IntervalCalibration.plot").subplots()[1]
        levels, around = self.levels.cpu().numpy(), 2 * self.standard_error.cpu().numpy()
        ax.fill_between(levels, levels - around, levels + around, color="lightgrey", label="calibrated")
        ax.plot(levels, self.coverage.cpu().numpy(), "o-", label=f"mean error {self.error:.4f}")
        ax.set(xlabel="level of the central interval", ylabel="share of targets in it", xlim=(0, 1), ylim=(0, 1))
        ax.legend(loc="upper left")
        return ax


def interval_calibration(pit: Tensor, levels: tuple[float, ...] = LEVELS) -> IntervalCalibration:
    """The coverage of central intervals at several levels.

    Args:
        pit: ``[N]``, of :func:`gaussian_pit` or :func:`mixture_pit`.
        levels: in (0, 1).

    Raises:
        ValueError: for entries or levels that are no probabilities.

    Example:
        >>> import torch
        >>> interval_calibration(torch.linspace(0, 1, 1001), levels=(0.5, 0.9)).coverage
        tensor([0.5005, 0.9001], dtype=torch.float64)
    """
    if pit.ndim != 1 or not len(pit) or not bool(((pit >= 0) & (pit <= 1)).all()):
        raise ValueError(
            "vardrop.uncertainty.interval_calibration: the places of targets in their distributions, [N] in [0, 1], "
            f"are needed, got {tuple(pit.shape)}; make them with gaussian_pit or mixture_pit"
        )
    if not levels or not all(0 < level < 1 for level in levels):
        raise ValueError(
            f"vardrop.uncertainty.interval_calibration: levels must be above 0 and below 1, got {levels}; 0.9 is 90%"
        )
    off = (2 * exact(pit) - 1).abs()
    asked = torch.tensor(levels, dtype=off.dtype, device=off.device)
    share = (off[:, None] <= asked * (1 + math.ulp(4.0))).double().mean(0)
    return IntervalCalibration(asked, share, len(pit))
