"""How noisy the gradient is, parameter by parameter, under each estimator: the measurement of the paper's Table 1."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.given import check_module
from vardrop.weights.estimators import NAMES, estimator


def gradient_variance(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: Iterable[Any],
    estimators: Sequence[str] = ("local", "per_example", "per_minibatch", "none"),
    repeats: int = 1,
    generator: torch.Generator | None = None,
) -> dict[str, dict[str, float]]:
    r"""Variance of the stochastic gradient of every parameter, for every estimator (eq. 4-5; Table 1).

    .. math:: \frac{1}{P} \sum_{k=1}^{P} \mathrm{Var}\left[\frac{\partial\,loss}{\partial\phi_k}\right]

    over the noise and over the batches, averaged over the P entries of a parameter. All estimators see the same
    batches. The variance is that of the loss as it is given: scale a mean loss by N for the paper's figures.

    The model runs in training mode and comes back as it was: mode, gradients and buffers.

    Args:
        model: a converted module.
        loss_fn: ``loss_fn(model, batch)`` -> scalar.
        batches: the minibatches, at least two, or one and ``repeats`` of two or more.
        estimators: names that :class:`vardrop.estimator` knows.
        repeats: gradients drawn from every batch.
        generator: source of the noise; torch's default one if None.

    Returns:
        Estimator -> parameter name -> variance, unbiased, for every parameter that the loss depends on.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for an unknown estimator, fewer than two gradients, or a loss that is not a finite scalar.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(20, 1)
        >>> _ = vd.convert_(layer, vd.VariationalDropout(type="B", sharing="layer", rate=0.5))
        >>> batches = torch.randn(200, 32, 20, generator=torch.Generator().manual_seed(0))
        >>> found = vd.gradient_variance(layer, lambda net, x: net(x).square().mean(), batches)
        >>> found["local"]["weight"] < found["per_minibatch"]["weight"]
        True
    """
    check_module(model, "gradient_variance")
    for name in estimators:
        if name not in NAMES:
            raise ValueError(f"vardrop.gradient_variance: estimator must be one of {', '.join(NAMES)}, got {name!r}")
    batches = list(batches)
    if len(batches) * repeats < 2:
        raise ValueError(
            "vardrop.gradient_variance: a variance needs two gradients or more, got "
            f"{len(batches)} batches x {repeats} repeats"
        )
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    found = {}
    with in_training(model):
        for name in estimators:
            with estimator(name, generator=generator):
                found[name] = _variance(model, loss_fn, batches, repeats, named)
    return found


@contextmanager
def in_training(model: nn.Module) -> Iterator[None]:
    """Training mode for a while; modes and buffers come back as they were."""
    modes = {module: module.training for module in model.modules()}
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    try:
        model.train()
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                buffer.copy_(buffers[name])


def gradients(loss: Tensor, parameters: list[nn.Parameter], caller: str) -> list[Tensor | None]:
    """The gradient of every parameter, None for those that the loss does not depend on.

    Raises:
        ValueError: if the loss is not a finite scalar.
    """
    if loss.ndim or not bool(loss.isfinite()):
        raise ValueError(
            f"vardrop.{caller}: loss_fn must return a finite scalar, got "
            f"{f'shape {tuple(loss.shape)}' if loss.ndim else loss.item()}"
        )
    return list(torch.autograd.grad(loss, parameters, allow_unused=True))


def _variance(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    batches: list[Any],
    repeats: int,
    named: dict[str, nn.Parameter],
) -> dict[str, float]:
    """Welford's running variance of every entry of the gradients, averaged over the entries."""
    mean: dict[str, Tensor] = {}
    spread: dict[str, Tensor] = {}
    count = 0
    for batch in (batch for batch in batches for _ in range(repeats)):
        grads = gradients(loss_fn(model, batch), list(named.values()), "gradient_variance")
        count += 1
        for name, grad in zip(named, grads, strict=True):
            if grad is None:
                continue
            grad = grad.double()
            if name not in mean:
                mean[name], spread[name] = torch.zeros_like(grad), torch.zeros_like(grad)
            change = grad - mean[name]
            mean[name].add_(change, alpha=1 / count)
            spread[name].addcmul_(change, grad - mean[name])
    return {name: (total / (count - 1)).mean().item() for name, total in spread.items()}
