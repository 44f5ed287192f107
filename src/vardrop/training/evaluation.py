"""What a model is worth on data: error and likelihood, its rates in a few numbers, its worst examples.

The two scores are a line of torch each: predictions of a whole test set fit in memory, so that nothing has to be
accumulated over batches.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vardrop.objective import dropout_rates
from vardrop.prediction.stochastic import stochastic
from vardrop.training.task import Categorical, Gaussian, Task

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 100  # of a histogram of rates, over [0, 1]
WORST, UNCERTAIN = 0, 1  # kinds of examples
_AT_ONCE = 1024  # examples of one forward pass
_LOOKED_AT = (
    2000  # examples that are passed many times to find the uncertain ones: all of a large test set takes minutes
)
_RATES_AT_MOST = 1_000_000  # of one weight whose quantiles are taken; beyond, every k-th


class Scores(NamedTuple):
    """Mean negative log-likelihood, and error or root mean squared error."""

    nll: float
    mistake: float


@torch.no_grad()
def evaluate(run: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], task: Task, x: Tensor, y: Tensor) -> Scores:
    """Scores of a task in evaluation mode, noise off.

    Args:
        run: the task, or what wraps it.
        task: the task itself.
        x: ``[N, ...]``.
        y: ``[N]``.
    """
    was_training = task.training
    task.eval()
    parts = [run(x[i : i + _AT_ONCE], y[i : i + _AT_ONCE]) for i in range(0, len(x), _AT_ONCE)]
    task.train(was_training)
    outputs, nll = (torch.cat(part) for part in zip(*parts, strict=True))
    return Scores(nll.double().mean().item(), task.likelihood.mistake(outputs, y).item())


def rate_quantiles(network: nn.Module) -> dict[str, dict[str, float]]:
    """Mean and quantiles of the rates of every random weight, by its name."""
    found = {}
    for name, rates in dropout_rates(network).items():
        flat = rates.flatten().double()
        some = flat[:: 1 + flat.numel() // _RATES_AT_MOST]
        cuts = torch.quantile(some, torch.tensor(QUANTILES, dtype=some.dtype, device=some.device)).tolist()
        named = {f"q{round(100 * q):02d}": cut for q, cut in zip(QUANTILES, cuts, strict=True)}
        found[name] = {"mean": flat.mean().item(), **named}
    return found


def rate_histograms(network: nn.Module) -> dict[str, dict[str, Any]]:
    """Mean, extremes and a histogram over [0, 1] of the rates of every random weight, by its name."""
    found = {}
    for name, rates in dropout_rates(network).items():
        flat = rates.flatten().double().cpu()
        counts, edges = torch.histogram(flat, BINS, range=(0.0, 1.0))
        found[name] = {
            "mean": flat.mean().item(),
            "min": flat.min().item(),
            "max": flat.max().item(),
            "edges": [round(edge, 6) for edge in edges.tolist()],
            "counts": [int(count) for count in counts.tolist()],
        }
    return found


@torch.no_grad()
def _uncertainty(task: Task, x: Tensor, passes: int) -> Tensor | None:
    """Entropy of the mean prediction, or its standard deviation for a number; None where nothing is uncertain."""
    with stochastic(task.network) as noise:
        noisy = bool(noise.sources)
        if isinstance(task.likelihood, Gaussian):
            if not noisy:
                return None
            runs = [task.likelihood.predict(task.network(x)) for _ in range(passes)]
            return torch.stack(runs).std(0)
        runs = [task.network(x).float().softmax(-1) for _ in range(passes if noisy else 1)]
        mean = torch.stack(runs).mean(0)
        return torch.special.entr(mean).sum(-1)


@torch.no_grad()
def telling_examples(
    task: Task, x: Tensor, y: Tensor, images: bool, each: int = 16, passes: int = 32, seed: int = 0
) -> dict[str, Tensor]:
    """The examples to look at: those with the lowest likelihood, and those the model is least certain of.

    Args:
        task: on the device of ``x``.
        x: ``[N, C, H, W]`` in [0, 1], or ``[N, features]``.
        y: ``[N]``.
        images: whether x holds images.
        each: how many of each kind.
        passes: stochastic forward passes that a prediction is averaged over, for the uncertain ones among at most 2000
            examples drawn at random; one for a model without noise.
        seed: of the draw and the noise. Torch's global generators are left as they were.

    Returns:
        ``image`` (uint8) or ``features``, ``label``, ``predicted``, ``score`` (nll, or the uncertainty) and ``kind``
        (uint8: 0 for the worst, 1 for the most uncertain), n rows each.
    """
    task.eval()
    pieces = range(0, len(x), _AT_ONCE)
    outputs, nll = (
        torch.cat(part) for part in zip(*(task(x[i : i + _AT_ONCE], y[i : i + _AT_ONCE]) for i in pieces), strict=True)
    )
    predicted = task.likelihood.predict(outputs)
    wrong = predicted != y if isinstance(task.likelihood, Categorical) else torch.ones_like(predicted, dtype=torch.bool)
    rows = torch.where(wrong, nll, -torch.inf).topk(min(each, int(wrong.sum()))).indices
    chosen, scores, kinds = [rows], [nll[rows]], [torch.full_like(rows, WORST)]

    with torch.random.fork_rng(devices=[x.device] if x.device.type == "cuda" else []):
        torch.manual_seed(seed)
        looked_at = torch.randperm(len(x))[:_LOOKED_AT].sort().values.to(x.device)
        doubts = [_uncertainty(task, x[part], passes) for part in looked_at.split(_AT_ONCE)]
    if all(doubt is not None for doubt in doubts):
        doubt = torch.cat(doubts)  # type: ignore[arg-type]
        most = doubt.topk(min(each, len(doubt))).indices
        rows = looked_at[most]
        chosen, scores, kinds = [*chosen, rows], [*scores, doubt[most]], [*kinds, torch.full_like(rows, UNCERTAIN)]

    rows = torch.cat(chosen)
    shown = {"image": (x[rows] * 255).round().clamp(0, 255).to(torch.uint8)} if images else {"features": x[rows]}
    return shown | {
        "label": y[rows],
        "predicted": predicted[rows],
        "score": torch.cat(scores).float(),
        "kind": torch.cat(kinds).to(torch.uint8),
    }
