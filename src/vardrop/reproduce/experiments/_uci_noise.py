"""The noise of the targets around noisy passes: the precision τ and degrees of freedom ν that fit them, and the scores.

Legend: K members, M rows, T passes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from vardrop.prediction.measures import log_likelihood

DEGREES = (3, 4, 6, 10, 20, 50, 1000)  # of freedom of the precision; the last is all but a fixed one


def log_density(said: Tensor, y: Tensor, log_precision: Tensor, degrees: Tensor | None = None) -> Tensor:
    """Under the mixture of the passes, mean over rows: ``[K, T, M]``, ``[K, M]`` and ``[K]``, ``[K]`` -> ``[K]``."""

    def of_rows(values: Tensor) -> Tensor:
        return values.unsqueeze(1).expand(y.shape).flatten()

    nu = None if degrees is None else of_rows(degrees)
    found = log_likelihood(said.transpose(0, 1).flatten(1), y.flatten(), of_rows(log_precision.exp()), nu)
    return found.view(y.shape).mean(1)


def best_precision(said: Tensor, y: Tensor, degrees: Tensor | None = None, rounds: int = 5, points: int = 15) -> Tensor:
    """log τ ``[K]`` under which the rows are most probable: a grid that closes in on its best point."""
    residual = (said.mean(1) - y).square().mean(1).clamp_min(1e-12)
    centre, width = -residual.log(), 4.0
    for _ in range(rounds):
        offsets = torch.linspace(-width, width, points, device=y.device)
        scores = torch.stack([log_density(said, y, centre + offset, degrees) for offset in offsets])
        centre = centre + offsets[scores.argmax(0)]
        width *= 2.5 / (points - 1)
    return centre


def best_noise(said: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """log τ and the degrees of freedom ν, ``[K]`` each, under which the rows are most probable."""
    degrees = [torch.full((len(y),), float(nu), device=y.device) for nu in DEGREES]
    precisions = [best_precision(said, y, nu) for nu in degrees]
    scores = torch.stack([log_density(said, y, *both) for both in zip(precisions, degrees, strict=True)])
    best = scores.argmax(0, keepdim=True)
    log_precision, nu = (torch.stack(some).gather(0, best).squeeze(0) for some in (precisions, degrees))
    return log_precision, nu


def scores(
    said: Tensor, y: Tensor, std: Tensor, log_precision: Tensor, degrees: Tensor | None = None
) -> list[dict[str, float]]:
    """RMSE of the mean of the passes and mean log-density for every split, in the units of the data."""
    found = {
        "rmse": (said.mean(1) - y).square().mean(1).sqrt() * std,
        "ll": log_density(said, y, log_precision, degrees) - std.log(),
        "precision": log_precision.exp() / std.square(),
    }
    if degrees is not None:
        found["degrees"] = degrees
    columns = [values.tolist() for values in found.values()]
    return [dict(zip(found, row, strict=True)) for row in zip(*columns, strict=True)]
