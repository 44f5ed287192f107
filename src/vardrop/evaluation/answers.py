"""What a run answers to examples, and how unsure it is: all that the two commands read off its passes.

Letters: T passes, N examples, C classes. Numbers are in the units of the data.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from vardrop.evaluation.runs import OpenRun
from vardrop.training.task import Gaussian

AT_ONCE = 1024  # examples of one batch
_TINY = torch.finfo(torch.float64).tiny


@dataclass(frozen=True)
class Passes:
    """How answers are made.

    Attributes:
        samples: T; 1 is a single pass with the noise off.
        seed: of the noise; every set of examples begins with it anew.
        engine: of :func:`vardrop.mc_predict`.
        max_memory: for it, in bytes.
        progress: whether to show a bar.
    """

    samples: int = 100
    seed: int = 0
    engine: str = "auto"
    max_memory: int | None = None
    progress: bool = False

    def __post_init__(self) -> None:
        if self.samples < 1:
            raise ValueError(
                f"vardrop.evaluation: samples must be at least 1, got {self.samples}; 1 is a pass with the noise off, "
                "100 are usual"
            )


@dataclass(frozen=True)
class Classes:
    """Answers of a classifier.

    Attributes:
        probabilities: ``[N, C]``, the mean of the passes.
        predictive_entropy: ``[N]``, in nats.
        mutual_information: ``[N]``, in nats; 0 for a single pass.
        variation_ratio: ``[N]``, the share of passes that chose another class than most did.
        passes: T.
        engine: how the passes were made, and why so.
    """

    probabilities: Tensor
    predictive_entropy: Tensor
    mutual_information: Tensor
    variation_ratio: Tensor
    passes: int = 1
    engine: str = ""

    @property
    def predicted(self) -> Tensor:
        """The most probable class, ``[N]``."""
        return self.probabilities.argmax(-1)

    @property
    def doubt(self) -> Tensor:
        """By which examples are handed to a person, ``[N]``."""
        return self.predictive_entropy

    def loss(self, y: Tensor) -> Tensor:
        """1 for a wrong class, 0 for the right one, ``[N]``."""
        return (self.predicted != y).double()

    @property
    def scores(self) -> dict[str, Tensor]:
        """What says how strange an example is; what a single pass does not have is left out."""
        found = {"predictive_entropy": self.predictive_entropy}
        return found | {"mutual_information": self.mutual_information} if self.passes > 1 else found


@dataclass(frozen=True)
class Numbers:
    r"""Answers of a regression: the mixture :math:`\frac1T \sum_t N(\hat y_t, \tau^{-1})`.

    Attributes:
        samples: ``[T, N]``, ŷ of every pass.
        noise_std: τ^(-1/2), the standard deviation of the targets around a perfect answer.
        engine: how the passes were made, and why so.
    """

    samples: Tensor
    noise_std: float
    engine: str = ""

    @property
    def mean(self) -> Tensor:
        """``[N]``."""
        return self.samples.mean(0)

    @property
    def std(self) -> Tensor:
        """Of the passes, ``[N]``: what more data could take away."""
        return self.samples.std(0, correction=0)

    @property
    def total_std(self) -> Tensor:
        """Of a new target, ``[N]``: the noise of the data and that of the passes."""
        return (self.std.square() + self.noise_std**2).sqrt()

    @property
    def doubt(self) -> Tensor:
        """By which examples are handed to a person, ``[N]``; the noise of the data is the same for all."""
        return self.std

    def loss(self, y: Tensor) -> Tensor:
        """Squared errors, ``[N]``."""
        return (self.mean - y.double()).square()

    @property
    def scores(self) -> dict[str, Tensor]:
        """What says how strange an example is; a single pass says nothing about it."""
        return {"std": self.std} if len(self.samples) > 1 else {}

    def log_likelihood(self, y: Tensor) -> Tensor:
        """Of targets ``[N]`` under the mixture, ``[N]``."""
        from vardrop.prediction.measures import log_likelihood

        return log_likelihood(self.samples, y.to(self.samples.dtype), self.noise_std**-2)

    def cdf(self, y: Tensor) -> Tensor:
        """The share of the mixture that is below y, ``[N]``: uniform on [0, 1] if the answers are honest."""
        return torch.special.ndtr((y - self.samples) / self.noise_std).mean(0)

    def interval(self, share: float) -> tuple[Tensor, Tensor]:
        """The ends of the middle part of the mixture that holds a share of it, ``[N]`` each, by bisection."""
        found = []
        for level in ((1 - share) / 2, (1 + share) / 2):
            reach = -torch.special.ndtri(torch.tensor((1 - share) / 2, dtype=torch.float64)).item() * self.noise_std
            low, high = self.samples.amin(0) - reach, self.samples.amax(0) + reach  # no part of the mixture is further
            for _ in range(60):
                middle = (low + high) / 2
                below = self.cdf(middle) < level
                low, high = torch.where(below, middle, low), torch.where(below, high, middle)
            found.append((low + high) / 2)
        return found[0], found[1]


def answer(run: OpenRun, x: Tensor, passes: Passes) -> Classes | Numbers:
    """Ask a run about examples.

    Args:
        run: whose network answers.
        x: ``[N, *shape]``.
        passes: how many, and how they are made. With more than one the noise is on.

    Raises:
        ValueError: if there is more than one pass of a network without noise, or there are no examples.
    """
    if not len(x):
        raise ValueError("vardrop.evaluation: there must be at least one example to predict, got none")
    if passes.samples > 1 and not run.random:
        raise ValueError(
            f"vardrop.evaluation: a run without noise answers the same every time, got {passes.samples} passes of "
            f"{run.config.method} in {run.path}; ask for one with --samples 1, or train with another --method"
        )
    x = x.to(_first_weight(run).dtype)
    single = passes.samples == 1
    if run.regression:
        return _numbers(run, *(_quiet(run, x) if single else _noisy(run, x, passes, "values")))
    if single:
        p = _quiet(run, x)[0][0].softmax(-1)
        nothing = torch.zeros(len(x), dtype=p.dtype)
        return Classes(p, torch.special.entr(p).sum(-1), nothing, nothing, 1, "one pass with the noise off")
    _, said, found = _noisy(run, x, passes, "logits")
    return Classes(
        found.probabilities.double().cpu(),
        found.predictive_entropy.double().cpu(),
        found.mutual_information.double().cpu(),
        found.variation_ratio.double().cpu(),
        passes.samples,
        said,
    )


def _first_weight(run: OpenRun) -> Tensor:
    """For the type and the place of all."""
    return next(run.task.network.parameters())


@torch.no_grad()
def _quiet(run: OpenRun, x: Tensor) -> tuple[Tensor, str, None]:
    """Outputs with the noise off, ``[1, N, C]`` in double precision."""
    device = _first_weight(run).device
    parts = [run.task.network(x[i : i + AT_ONCE].to(device)).cpu() for i in range(0, len(x), AT_ONCE)]
    return torch.cat(parts).double()[None], "one pass with the noise off", None


def _noisy(run: OpenRun, x: Tensor, passes: Passes, outputs: str) -> tuple[Tensor | None, str, Any]:
    """Outputs of every pass, where they are needed, how they were made, and all that is known of them."""
    import vardrop

    found = vardrop.mc_predict(
        run.task.network,
        list(x.split(AT_ONCE)),
        passes.samples,
        outputs=outputs,
        engine=passes.engine,
        max_memory=passes.max_memory,
        keep=outputs == "values",
        generator=torch.Generator().manual_seed(passes.seed),
        progress=passes.progress,
    )
    said = f"{passes.samples} passes with the noise on, engine {found.engine}"
    return found.samples, said + (f" ({found.reason})" if found.reason else ""), found


def _numbers(run: OpenRun, outputs: Tensor, said: str, _: Any) -> Numbers:
    likelihood = cast("Gaussian", run.task.likelihood)  # what a regression has
    with torch.no_grad():
        mean, std = likelihood.mean.double().item(), likelihood.std.double().item()
        noise = math.exp(-0.5 * likelihood.log_precision.double().item()) * std
    return Numbers(outputs.double().cpu().squeeze(-1) * std + mean, noise, said)


def with_temperature(probabilities: Tensor, temperature: float) -> Tensor:
    r"""Probabilities made less sure (T > 1) or more, :math:`p_c^{1/T} / \sum_k p_k^{1/T}`.

    For a softmax that is its logits divided by T (Guo et al. 2017); for the mean of many passes their logarithm stands
    for the logits. What is predicted stays what it was.

    Args:
        probabilities: ``[N, C]``.
        temperature: above 0.

    Raises:
        ValueError: if it is not.

    Example:
        >>> import torch
        >>> from vardrop.evaluation.answers import with_temperature
        >>> with_temperature(torch.tensor([[0.9, 0.1]]), 2.0)
        tensor([[0.7500, 0.2500]])
    """
    from vardrop.uncertainty import TemperatureScaling

    return TemperatureScaling(temperature).probabilities(log_of(probabilities))


def log_of(probabilities: Tensor) -> Tensor:
    """The logarithm, which stands for logits; finite where a class was ruled out."""
    return probabilities.clamp_min(_TINY if probabilities.dtype == torch.float64 else 1e-37).log()
