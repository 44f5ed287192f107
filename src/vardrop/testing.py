"""A test of noise that can be pointed at any layer: its mean, its variance, and what is independent of what."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn

from vardrop.rates import Rated

__all__ = ["NoiseError", "NoiseReport", "check_noise"]

_ROUNDING = 1e-5  # no standard error is below this, in units of the noise: float32 has no more digits


@dataclass(frozen=True)
class NoiseReport:
    """What :func:`check_noise` found.

    Attributes:
        z: name of the check -> by how many standard errors it is off; infinite where what must be equal is not.
        bound: the largest z that chance is allowed.
        samples: calls of the layer for each kind of run.
    """

    z: dict[str, float]
    bound: float
    samples: int

    @property
    def failed(self) -> dict[str, float]:
        """The checks beyond the bound."""
        return {name: z for name, z in self.z.items() if not abs(z) <= self.bound}

    def __str__(self) -> str:
        width = max(map(len, self.z))
        lines = [
            f"  {name:<{width}}  {z:8.1f}{'  too far off' if name in self.failed else ''}" for name, z in self.z.items()
        ]
        return "\n".join([f"standard errors off over {self.samples} calls, at most {self.bound:.1f} allowed", *lines])


class NoiseError(AssertionError):
    """Raised by :func:`check_noise` for noise that is not what it should be; ``report`` has all figures."""

    def __init__(self, message: str, report: NoiseReport) -> None:
        super().__init__(message)
        self.report = report


def check_noise(
    layer: nn.Module,
    x: Tensor | Sequence[int],
    *,
    variance: float | Tensor | None = None,
    independent: Mapping[str, int] | None = None,
    shared: Mapping[str, int] | None = None,
    samples: int = 1000,
    gather: Callable[[Tensor], Tensor] | None = None,
    compiled: str | None = None,
    false_alarm: float = 1e-6,
) -> NoiseReport:
    r"""Call a layer in training many times and hold its noise against what it should be.

    With y the output, m the output in evaluation, v the variance it should have and d = (y − m) / √v:

    ======================================  ==========================================================================
    mean, variance                          E[d] = 0 and E[d²] = 1, over all entries together, and for every entry
    successive calls                        E[d d′] = 0 for two calls in a row
    independent along an axis               E[d_i d_j] = 0 for all pairs i ≠ j along it, and for neighbours
    shared along an axis                    d is the same all along it
    independent across ranks                as along an axis, over the processes that ``gather`` collects from
    compiled against eager                  all of the above for the compiled layer, and both have one mean square
    ======================================  ==========================================================================

    Standard errors come from the spread over calls, so that noise which is shared within a call is no excuse. An entry
    needs its noise to strike about a hundred times: take ``samples`` of at least 100 / p for a small rate p.

    Args:
        layer: a module of one input and one output; its mode comes back as it was.
        x: its input, or a shape for an input of ones.
        variance: v, a number or a tensor that broadcasts with y; None for p / (1 − p) · m², the truth of a layer that
            multiplies with noise of its ``rate``.
        independent: name -> axis of y, for example ``{"batch": 0, "channel": 1}``, which is what None stands for.
        shared: name -> axis of y.
        samples: calls of the layer.
        gather: local tensor -> tensors of all processes stacked along a new axis 0; every process calls this function.
        compiled: a backend of torch.compile, for example ``"inductor"``; None to leave that out.
        false_alarm: the probability to refuse a layer that is right.

    Returns:
        The figures.

    Raises:
        NoiseError: an AssertionError, if some figure is beyond what chance explains.
        ValueError: if there is no variance to compare with, fewer than 2 samples, or noise in the evaluation.

    Example:
        >>> import torch, vardrop as vd
        >>> from vardrop.testing import check_noise
        >>> report = check_noise(vd.layers.Dropout2d(0.3), (4, 5, 3, 3), shared={"height": 2, "width": 3})
        >>> sorted(report.z)[:3]
        ['independent along batch', 'independent along channel', 'mean']
        >>> try:
        ...     check_noise(torch.nn.Dropout(0.3), (20, 5), variance=0.4)
        ... except AssertionError as error:  # it is 0.3 / 0.7
        ...     print(list(error.report.failed)[0])
        variance
    """
    if samples < 2:
        raise ValueError(f"vardrop.testing.check_noise: samples must be at least 2, got {samples}")
    if not isinstance(x, Tensor):
        x = torch.ones(tuple(x))
    modes = {module: module.training for module in layer.modules()}
    try:
        with torch.no_grad():
            mean = layer.eval()(x)
            if not torch.equal(mean, layer(x)):
                raise ValueError(
                    f"vardrop.testing.check_noise: in evaluation the layer must be deterministic, got two outputs from "
                    f"{layer}"
                )
            v = _variance(layer, mean, variance)
            axes = {"batch": 0, "channel": 1} if independent is None else dict(independent)
            layer.train()
            runs: dict[str, Callable[[Tensor], Tensor]] = {"": layer}
            if compiled is not None:
                runs["compiled, "] = torch.compile(layer, backend=compiled, fullgraph=True)
            found: dict[str, _Found] = {}
            for name, call in runs.items():
                found[name] = _Found(mean, v, axes, dict(shared or {}), gather)
                for _ in range(samples):
                    found[name].add(call(x))
    finally:
        for module, mode in modes.items():
            module.training = mode
    z = {prefix + name: value for prefix, one in found.items() for name, value in one.z().items()}
    if compiled is not None:
        z["compiled against eager"] = _between(*(one.squares() for one in found.values()))
    numbers = len(z) + 2 * mean.numel() * len(found)
    report = NoiseReport(z, NormalDist().inv_cdf(1 - false_alarm / (2 * numbers)), samples)
    if report.failed:
        failures = ", ".join(f"{name} ({value:.1f} standard errors)" for name, value in report.failed.items())
        raise NoiseError(
            f"vardrop.testing.check_noise: the noise of {layer} must be what the caller says, got wrong "
            f"{failures}\n{report}",
            report,
        )
    return report


def _variance(layer: nn.Module, mean: Tensor, variance: float | Tensor | None) -> Tensor:
    if variance is None:
        if not isinstance(layer, Rated):
            raise ValueError(
                "vardrop.testing.check_noise: variance must be given for a layer without a rate of vardrop's, got None "
                f"for {type(layer).__name__}"
            )
        rate = layer.rate.detach().double()
        v = rate / (1 - rate) * mean.double().square()
    else:
        v = torch.as_tensor(variance, dtype=torch.float64, device=mean.device)
    return v.expand(mean.shape)


class _Found:
    """Sums over calls. Statistics of a whole call are kept one by one, as calls are what is independent."""

    def __init__(
        self,
        mean: Tensor,
        variance: Tensor,
        independent: dict[str, int],
        shared: dict[str, int],
        gather: Callable[[Tensor], Tensor] | None,
    ) -> None:
        self.mean = mean.double()
        self.std = variance.sqrt()
        self.independent = independent
        self.shared = shared
        self.gather = gather
        self.calls: dict[str, list[Tensor]] = {}
        self.powers = [torch.zeros_like(self.mean) for _ in range(3)]  # of d, d², d⁴
        self.equal: dict[str, bool] = dict.fromkeys((f"shared along {name}" for name in shared), True)
        self.silent = True  # where no variance is expected, nothing varies
        self.last: Tensor | None = None

    def _keep(self, name: str, value: Tensor) -> None:
        self.calls.setdefault(name, []).append(value)

    def add(self, y: Tensor) -> None:
        varies = self.std > 0
        difference = y.double() - self.mean
        self.silent &= bool((difference[~varies].abs() <= 1e-5 * self.mean[~varies].abs()).all())
        d = torch.where(varies, difference / self.std, 0.0)
        share = varies.double().mean().clamp_min(1e-12)
        self._keep("mean", d.mean() / share)
        self._keep("variance", d.square().mean() / share)
        for total, power in zip(self.powers, (d, d.square(), d**4), strict=True):
            total += power
        if self.last is not None:
            self._keep("successive calls", (d * self.last).mean())
        self.last = d
        for name, axis in self.independent.items():
            if d.shape[axis] > 1:
                self._keep(f"independent along {name}", _pairs(d, axis))
                self._keep(
                    f"neighbours along {name}",
                    (d.narrow(axis, 1, d.shape[axis] - 1) * d.narrow(axis, 0, d.shape[axis] - 1)).mean(),
                )
        for name, axis in self.shared.items():
            self.equal[f"shared along {name}"] &= bool(
                torch.allclose(d, d.narrow(axis, 0, 1).expand(d.shape), atol=1e-5)
            )
        if self.gather is not None:
            self._keep("independent across ranks", _pairs(self.gather(d), 0))

    def z(self) -> dict[str, float]:
        """Standard errors off, by name of the check."""
        truth = {"variance": 1.0}
        found = {name: _z(torch.stack(values), truth.get(name, 0.0)) for name, values in self.calls.items()}
        count = len(self.calls["mean"])
        first, second, fourth = (power / count for power in self.powers)
        varies = self.std > 0
        if varies.any():
            found["mean of every entry"] = _worst(first, second, 0.0, count, varies)
            found["variance of every entry"] = _worst(second, fourth, 1.0, count, varies)
        else:
            found["mean"] = found["variance"] = 0.0
        found |= {name: 0.0 if equal else math.inf for name, equal in self.equal.items()}
        found["silent where variance is 0"] = 0.0 if self.silent else math.inf
        return found

    def squares(self) -> Tensor:
        return torch.stack(self.calls["variance"])


def _pairs(d: Tensor, axis: int) -> Tensor:
    """The mean of d_i d_j over all pairs i ≠ j along an axis."""
    n = d.shape[axis]
    if n < 2:
        return d.new_zeros(())
    return ((d.sum(axis).square() - d.square().sum(axis)) / (n * (n - 1))).mean()


def _z(values: Tensor, truth: float) -> float:
    """How many standard errors the mean of independent values is off."""
    return (float(values.mean()) - truth) / max(float(values.std()) / math.sqrt(len(values)), _ROUNDING)


def _worst(mean: Tensor, square: Tensor, truth: float, count: int, where: Tensor) -> float:
    """The largest z of all entries, by their first and second moments.

    No entry's spread is taken for less than that of all together: by chance, the entries that noise has struck least
    often would seem the surest.
    """
    variance = (square - mean * mean)[where].clamp_min(0) / (count - 1)
    spread = torch.maximum(variance, variance.mean()).sqrt()
    return float(((mean - truth)[where].abs() / spread.clamp_min(_ROUNDING)).max())


def _between(a: Tensor, b: Tensor) -> float:
    spread = math.sqrt(float(a.var() / len(a) + b.var() / len(b)))
    return float(a.mean() - b.mean()) / max(spread, _ROUNDING)
