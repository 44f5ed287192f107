"""Temperature scaling: one number, fitted on validation data, that makes a classifier as sure as it ought to be."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from vardrop.uncertainty.inputs import checked_labels, exact

_GRID = [float(log_beta) for log_beta in range(-7, 8)]  # of log(s / T), s the spread of the logits; then refined


class TemperatureScaling(nn.Module):
    r"""Divide the logits by a temperature T that minimises the nll of validation data (Guo et al. 2017).

    .. math:: p = \frac1T \sum_t \operatorname{softmax}(z_t / T)

    With one pass the nll is convex in 1/T. With several, the temperature is that of every pass and the nll that of
    their mean, which is not convex: a grid comes first. Accuracy stays as it is with one pass.

    Args:
        temperature: T, above 0, to begin with: 1 changes nothing.

    Shape:
        Logits ``[N, C]`` or, for T passes, ``[T, N, C]``; the same comes out.

    Raises:
        ValueError: for a temperature that is not above 0.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[8.0, 0.0]] * 4)  # 99.97% sure, and right three times of four
        >>> scaling = TemperatureScaling().fit(logits, torch.tensor([0, 0, 0, 1]))
        >>> scaling.probabilities(logits)[0]
        tensor([0.7500, 0.2500])
    """

    temperature: Tensor

    def __init__(self, temperature: float = 1.0) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(
                f"vardrop.TemperatureScaling: temperature must be above 0 and finite, got {temperature}; 1 changes "
                "nothing"
            )
        self.register_buffer("temperature", torch.tensor(float(temperature)))

    def forward(self, logits: Tensor) -> Tensor:
        """The logits divided by the temperature."""
        return logits / self.temperature.to(logits.dtype)

    def probabilities(self, logits: Tensor) -> Tensor:
        """Probabilities ``[N, C]``: of the scaled logits ``[N, C]``, or the mean over the passes of ``[T, N, C]``."""
        p = self(logits).softmax(-1)
        return p if p.ndim == 2 else p.mean(0)

    def fit(self, logits: Tensor, labels: Tensor) -> TemperatureScaling:
        """Set the temperature to the one of the least nll.

        Newton's steps in log T, where they stay between the neighbours of the best point of a grid, and bisection.

        Args:
            logits: ``[N, C]`` or ``[T, N, C]``, of data that the model was not trained on.
            labels: ``[N]``.

        Raises:
            ValueError: for shapes that do not fit, or if no finite temperature is best.

        Returns:
            Itself.
        """
        z = exact(logits)
        if z.ndim not in (2, 3) or 0 in z.shape or not bool(z.isfinite().all()):
            raise ValueError(
                "vardrop.TemperatureScaling.fit: logits [N, C] or [T, N, C], all finite, are needed, got the shape "
                f"{tuple(logits.shape)} with {int((~z.isfinite()).sum())} not finite; for probabilities p take "
                "p.clamp_min(1e-30).log()"
            )
        z = z if z.ndim == 3 else z[None]
        y = checked_labels(labels, *z.shape[1:]).to(z.device)
        spread = float((z - z.mean(-1, keepdim=True)).square().mean().sqrt()) or 1.0
        grid = [log_beta - math.log(spread) for log_beta in _GRID]
        values = [_value(z, y, math.exp(log_beta)) for log_beta in grid]
        best = max(range(len(_GRID)), key=lambda i: (-values[i], i))  # the last, as 0 may be reached early
        if best in (0, len(_GRID) - 1):
            wrong = (z.softmax(-1).mean(0).argmax(-1) != y).double().mean().item()
            raise ValueError(
                "vardrop.TemperatureScaling.fit: a finite temperature must be the best one, got a likelihood that "
                f"grows towards {'infinity' if best == 0 else '0'} on {len(y)} cases, {wrong:.2%} of them wrong; take "
                "more validation data, with some that are wrong, or leave the temperature at 1"
            )
        self.temperature.fill_(math.exp(-_refined(z, y, *grid[best - 1 : best + 2])))
        return self

    def extra_repr(self) -> str:
        return f"temperature={self.temperature.item():.4g}"


def _refined(z: Tensor, y: Tensor, low: float, start: float, high: float) -> float:
    """log(1 / T) where the slope changes its sign from - to + between low and high."""
    at = start
    for _ in range(60):
        beta = math.exp(at)
        found = _slope(z, y, beta)
        slope, bend = beta * found.slope, beta * beta * found.bend + beta * found.slope  # by log beta
        low, high = (low, at) if slope > 0 else (at, high)
        step = at - slope / bend if bend > 0 else math.nan
        step = step if low < step < high else (low + high) / 2
        if abs(step - at) < 1e-10:
            return step
        at = step
    return at


def _value(z: Tensor, y: Tensor, beta: float) -> float:
    """The mean nll of the mean of the passes at beta = 1 / T."""
    log_p_y = (beta * z).log_softmax(-1).gather(-1, y.expand(len(z), -1)[..., None]).squeeze(-1)
    return math.log(len(z)) - log_p_y.logsumexp(0).mean().item()


class _Slope(NamedTuple):
    slope: float
    bend: float


def _slope(z: Tensor, y: Tensor, beta: float) -> _Slope:
    r"""The first two derivatives of the nll by :math:`\beta = 1/T`.

    With :math:`d_t = z_{ty} - E_{p_t} z`, :math:`v_t = \mathrm{Var}_{p_t} z` and weights :math:`w_t \propto p_t(y)`,
    slope and bend of one case are :math:`-E_w d` and :math:`E_w v - \mathrm{Var}_w d`.
    """
    log_p = (beta * z).log_softmax(-1)  # [T, N, C]
    p, rows = log_p.exp(), y.expand(len(z), -1)[..., None]
    mean = (p * z).sum(-1)
    v = (p * (z - mean[..., None]).square()).sum(-1)
    d = z.gather(-1, rows).squeeze(-1) - mean  # [T, N]
    w = log_p.gather(-1, rows).squeeze(-1).softmax(0)
    first = (w * d).sum(0)
    bend = (w * v).sum(0) - (w * (d - first).square()).sum(0)
    return _Slope(-first.mean().item(), bend.mean().item())
