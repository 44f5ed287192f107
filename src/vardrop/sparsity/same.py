"""Whether two networks compute the same, and how much they compute."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
TRIALS = 3


def tensors(output: Any) -> Iterator[Tensor]:
    """The tensors in an output of any structure."""
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, dict):
        for value in output.values():
            yield from tensors(value)
    elif isinstance(output, list | tuple):
        for value in output:
            yield from tensors(value)


def _random_like(inputs: tuple[Any, ...], generator: torch.Generator) -> tuple[Any, ...]:
    """Inputs of the same shapes: real values of the same mean and spread, others in another order."""

    def one(x: Any) -> Any:
        if not isinstance(x, Tensor) or not x.numel():
            return x
        if not x.is_floating_point():
            order = torch.randperm(x.numel(), generator=generator).to(x.device)
            return x.flatten()[order].view(x.shape) if x.dtype != torch.bool else x
        noise = torch.randn(x.shape, generator=generator).to(x)
        spread = x.float().std(correction=0).to(x)
        return x.mean() + noise * torch.where(spread > 0, spread, torch.ones_like(spread))

    return tuple(one(x) for x in inputs)


def _twice(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """A batch of twice the size, if the first axis is one of examples."""
    return tuple(torch.cat([x, x]) if isinstance(x, Tensor) and x.ndim else x for x in inputs)


def difference(dense: nn.Module, small: nn.Module, inputs: tuple[Any, ...]) -> tuple[float, float]:
    """The largest difference of outputs, relative to their largest entry, and what rounding may do."""
    with torch.no_grad():
        wanted, got = list(tensors(dense(*inputs))), list(tensors(small(*inputs)))
    worst, allowed = 0.0, 0.0
    if [x.shape for x in wanted] != [x.shape for x in got]:
        return float("inf"), 0.0
    for x, y in zip(wanted, got, strict=True):
        allowed = max(allowed, _TOLERANCE.get(x.dtype, 0.0))
        if x.numel():
            equal = (x == y) | (x.isnan() & y.isnan())
            size = x.double()[x.isfinite()].abs().max() if x.isfinite().any() else torch.ones(())
            error = torch.where(equal, 0.0, (x.double() - y.double()).abs().nan_to_num(nan=torch.inf))
            worst = max(worst, float(error.max() / max(float(size), 1e-30)))
    return worst, allowed


def check_same(dense: nn.Module, small: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Refuse a network that computes something else than another."""
    generator = torch.Generator().manual_seed(0)
    trials = [inputs, *(_random_like(inputs, generator) for _ in range(TRIALS))]
    try:
        with torch.no_grad():
            dense(*_twice(trials[-1]))
        trials.append(_twice(trials[-1]))
    except Exception:  # noqa: S110 - the network takes no other batch
        pass
    for trial in trials:
        try:
            worst, allowed = difference(dense, small, trial)
        except Exception as error:
            raise RuntimeError(
                f"vardrop.compact: the smaller network must run where the model does, got {error}; please report the "
                "model, and leave it as it is"
            ) from error
        if worst > allowed:
            raise RuntimeError(
                f"vardrop.compact: the smaller network must compute what the model does, got a difference of "
                f"{worst:.2g} of the largest output; please report the model, and leave it as it is"
            )


def multiply_adds(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    """Multiplications (with their additions) in matrix products and convolutions on these inputs."""
    from torch.utils.flop_counter import FlopCounterMode  # here, for it is slow to import

    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # fused layers and fused attention are not counted
    try:
        with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            model(*inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)
    return counter.get_total_flops() // 2
