"""The answer of :func:`vardrop.mc_predict`: a prediction with what it does not know."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from vardrop.prediction import measures
from vardrop.prediction.moments import KINDS, Summary, joined


@dataclass(frozen=True, eq=False, repr=False)
class Prediction:
    """Mean, spread and uncertainty over T noisy passes, of what the outputs are turned into.

    With ``outputs="logits"``, ``"probabilities"`` or ``"log_probabilities"`` that is the probabilities of classes, else
    the outputs as they are. Variances are those of the T passes themselves, divided by T: the passes *are* the mixture
    that predicts, so the total variance adds up exactly. Entropies are in nats.

    Attributes:
        summary: what was collected over the passes.
        passes: T.
        kind: the ``outputs`` that was asked for.
        class_dim: where the classes are in ``[N, ...]``.
        engine: ``"vmap"`` or ``"loop"``: how the passes were made.
        chunk: how many of them were made at once, at most.
        reason: why the loop was used, or nothing.
        name: which tensor of the model's output this is about.
        sources: what made the noise.
        outputs: the other tensors of the model's output by name, each a prediction of its values.
        left_off: names of tensors that are not in ``outputs``, and why.
        noise_left_off: modules that look like noise and stayed off, and why: their part of the spread is missing.

    Example:
        >>> import torch, vardrop as vd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 3))
        >>> p = vd.mc_predict(net, torch.randn(7, 4), samples=20, outputs="logits")
        >>> p.probabilities.shape, p.samples.shape, bool((p.mutual_information >= 0).all())
        (torch.Size([7, 3]), torch.Size([20, 7, 3]), True)
    """

    summary: Summary
    passes: int
    kind: str | None = None
    class_dim: int = 1
    engine: str = "loop"
    chunk: int = 1
    reason: str = ""
    name: str = "output"
    sources: tuple[str, ...] = ()
    outputs: Mapping[str, Prediction] = field(default_factory=dict)
    left_off: Mapping[str, str] = field(default_factory=dict)
    noise_left_off: Mapping[str, str] = field(default_factory=dict)

    # ------------------------------------------------------------------------------------------------- any output

    @property
    def samples(self) -> Tensor | None:
        """Every pass, ``[T, N, ...]``; None if they were not kept."""
        return self.summary.samples

    @property
    def mean(self) -> Tensor:
        """``[N, ...]``."""
        return self.summary.mean

    @property
    def variance(self) -> Tensor:
        """Over the passes, ``[N, ...]``."""
        return self.summary.variance

    @property
    def std(self) -> Tensor:
        """The root of the variance, ``[N, ...]``."""
        return self.summary.variance.sqrt()

    def __len__(self) -> int:
        return len(self.mean)

    def to(self, device: torch.device | str) -> Prediction:
        """The same on another device, as ``prediction.to("cpu")`` for numpy or a long stay."""
        others = {name: other.to(device) for name, other in self.outputs.items()}
        return replace(self, summary=self.summary.to(device), outputs=others)

    def quantile(self, q: float | Sequence[float] | Tensor) -> Tensor:
        """Quantiles over the passes, entry by entry.

        Args:
            q: in [0, 1]; one, or several, which come first in the result.

        Shape:
            ``[N, ...]`` or ``[len(q), N, ...]``.

        Raises:
            RuntimeError: if the passes were not kept.
            ValueError: for q outside [0, 1].
        """
        samples = self._kept("quantile")
        exact = samples if samples.dtype == torch.float64 else samples.float()
        levels = torch.as_tensor(q, dtype=exact.dtype, device=exact.device)
        if not bool(((levels >= 0) & (levels <= 1)).all()):
            raise ValueError(f"vardrop.Prediction.quantile: q must be in [0, 1], got {q}")
        ordered = exact.sort(0).values  # torch.quantile takes 16 million entries at most
        place = levels * (len(ordered) - 1)
        low = place.floor().long()
        share = (place - low).reshape(*levels.shape, *[1] * (exact.ndim - 1))
        return torch.lerp(ordered[low], ordered[(low + 1).clamp(max=len(ordered) - 1)], share)

    # ---------------------------------------------------------------------------------------------------- classes

    @property
    def probabilities(self) -> Tensor:
        """Mean probabilities, ``[N, C, ...]``."""
        self._classes("probabilities")
        return self.summary.mean

    @property
    def predicted(self) -> Tensor:
        """The most probable class, ``[N, ...]``."""
        return self.probabilities.argmax(self.class_dim)

    @property
    def predictive_entropy(self) -> Tensor:
        """H of the mean probabilities: all there is to be unsure about, ``[N, ...]``."""
        return self._classes("predictive_entropy", self.summary.predictive_entropy)

    @property
    def expected_entropy(self) -> Tensor:
        """The mean H of a pass: the noise in the data, ``[N, ...]``."""
        return self._classes("expected_entropy", self.summary.expected_entropy)

    @property
    def mutual_information(self) -> Tensor:
        """What the passes disagree about: predictive minus expected entropy, at least 0, ``[N, ...]``."""
        return self._classes("mutual_information", self.summary.mutual_information)

    @property
    def variation_ratio(self) -> Tensor:
        """The share of passes that do not choose the class most of them choose, ``[N, ...]``."""
        return 1 - self._classes("variation_ratio", self.summary.votes).amax(self.class_dim) / self.passes

    # ----------------------------------------------------------------------------------------------------- values

    def total_variance(self, precision: float | Tensor) -> Tensor:
        """Of a new observation: the variance over the passes plus that of the noise in the data, 1 / τ.

        Args:
            precision: τ, above 0; a number, or a tensor that broadcasts with the mean.

        Shape:
            ``[N, ...]``.

        Raises:
            ValueError: if a precision is not above 0.
            RuntimeError: for classes.
        """
        self._values("total_variance")
        return self.variance + (1 / measures.checked_precision(precision, self.mean, self.mean.shape)).to(
            self.mean.dtype
        )

    def log_likelihood(self, y: Tensor, precision: float | Tensor, degrees: float | Tensor | None = None) -> Tensor:
        """Log-density of the truths under the mixture of the passes; :func:`.measures.log_likelihood` has the formula.

        Args:
            y: the truths, of the shape of the mean.
            precision: τ, above 0; a number, or a tensor that broadcasts with the mean.
            degrees: ν, above 0, for a precision that is not the same for all examples.

        Shape:
            ``[N]``.

        Raises:
            RuntimeError: if the passes were not kept, or for classes.
            ValueError: if the shapes do not fit, or a precision or degrees are not above 0.
        """
        self._values("log_likelihood")
        return measures.log_likelihood(self._kept("log_likelihood"), y, precision, degrees)

    # ----------------------------------------------------------------------------------------------------- showing

    def to_pandas(self) -> Any:
        """One row for every example: for classes what is predicted and the uncertainties, else mean and std.

        Raises:
            ModuleNotFoundError: without pandas.
        """
        from vardrop.prediction.showing import table

        return table(self)

    def plot(self) -> Any:
        """A plotly figure: for classes the two kinds of uncertainty of every example, else the mean with two std.

        Raises:
            ModuleNotFoundError: without plotly.
        """
        from vardrop.prediction.showing import figure

        return figure(self)

    def __repr__(self) -> str:
        kept = "kept" if self.samples is not None else "not kept"
        lines = [
            f"Prediction: {len(self)} examples, {self.name} {list(self.mean.shape)} from {self.passes} passes ({kept})"
        ]
        if len(self):
            if self.kind in KINDS[:3]:
                means = {
                    name: getattr(self, name).mean().item() for name in ("predictive_entropy", "mutual_information")
                }
                lines.append("mean " + ", ".join(f"{name} {value:.3g}" for name, value in means.items()))
            else:
                lines.append(f"mean std {self.std.mean().item():.3g}, largest {self.std.max().item():.3g}")
        how = f"{self.engine}, {self.chunk} passes at once"
        lines.append(f"by {how}{f', because {self.reason}' if self.reason else ''}")
        if self.sources:
            shown = ", ".join(self.sources[:4])
            lines.append(f"noise: {shown}{f' and {len(self.sources) - 4} more' if len(self.sources) > 4 else ''}")
        lines += [f"noise left off: {name}: {reason}" for name, reason in list(self.noise_left_off.items())[:4]]
        if len(self.noise_left_off) > 4:
            lines.append(f"noise left off: {len(self.noise_left_off) - 4} more")
        if self.outputs:
            lines.append(f"also in .outputs: {', '.join(self.outputs)}")
        return "\n  ".join(lines)

    def _kept(self, what: str) -> Tensor:
        if self.samples is None:
            raise RuntimeError(f"vardrop.Prediction.{what}: needs every pass, and they were not kept; use keep=True")
        return self.samples

    def _classes(self, what: str, found: Tensor | None = None) -> Tensor:
        if self.kind not in KINDS[:3]:
            raise RuntimeError(
                f"vardrop.Prediction.{what}: needs probabilities of classes, got outputs={self.kind!r}; say what the "
                "model returns: vd.mc_predict(..., outputs='logits')"
            )
        return self.mean if found is None else found

    def _values(self, what: str) -> None:
        if self.kind in KINDS[:3]:
            raise RuntimeError(
                f"vardrop.Prediction.{what}: is for predicted values, got classes (outputs={self.kind!r}); their "
                "uncertainty is in predictive_entropy and mutual_information"
            )


def beside(whole: Mapping[str, list[Summary]], main: str, passes: int) -> tuple[dict[str, Prediction], dict[str, str]]:
    """Predictions of all outputs but the main one, and why there is none of some.

    Args:
        whole: name of the output -> what was collected over every batch.
        main: the name of the main output.
        passes: T.
    """
    examples = [len(part.mean) for part in whole[main]]
    others, left_off = {}, {}
    for name, parts in whole.items():
        if name == main:
            continue
        try:
            fits = [part.mean.shape[:1] == (count,) for part, count in zip(parts, examples, strict=True)]
            if len(parts) > 1 and not all(fits):
                raise ValueError("its first axis is not that of the examples, so batches of it have no order")
            others[name] = Prediction(joined(parts), passes, name=name)
        except (ValueError, RuntimeError) as error:
            left_off[name] = str(error).splitlines()[0]
    return others, left_off
