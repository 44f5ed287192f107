"""`vd.fix_variance_shift_`: tries cures on copies, and keeps the one that helps, or none."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import nn

from vardrop.diagnosis.diagnose import diagnose
from vardrop.diagnosis.fixes.layernorm import fit, layernorm
from vardrop.diagnosis.fixes.lower_rate import lower_rate
from vardrop.diagnosis.fixes.move import move
from vardrop.diagnosis.fixes.plan import Changes, Offender, offenders
from vardrop.diagnosis.fixes.report import Attempt, FixReport
from vardrop.diagnosis.fixes.uniform import uniform
from vardrop.diagnosis.passes import Passes
from vardrop.diagnosis.recalibrate import keeps_statistics, recalibrate
from vardrop.diagnosis.report import Diagnosis
from vardrop.diagnosis.scores import Loss, Scores, score, standard_error

Strategy = Literal["auto", "recalibrate", "lower_rate", "uniform", "move", "layernorm"]
_CURED = ("variance-shift", "stale-statistics", "dropout-before-batchnorm")
_STATISTICS = "statistics' gap"  # of running to evaluation's, where there are no labels


def _nothing(model: nn.Module, found: Sequence[Offender]) -> Changes:
    return Changes({"running statistics": "those of evaluation"})


_STRUCTURAL: dict[str, Callable[[nn.Module, Sequence[Offender]], Changes]] = {
    "recalibrate": _nothing,
    "lower_rate": lower_rate,
    "uniform": uniform,
    "move": move,
    "layernorm": layernorm,
}  # in the order of how little they change: of cures that do equally well, auto keeps the first


def fix_variance_shift_(
    model: nn.Module,
    loader: Any,
    strategy: Strategy = "auto",
    *,
    validation: Any = None,
    metric: Loss | None = None,
    finetune: Callable[[nn.Module], object] | None = None,
    max_batches: int = 16,
    generator: torch.Generator | None = None,
) -> FixReport:
    """Cure a model of the variance shift between dropout and BatchNorm, in place, if that makes it no worse.

    * ``"recalibrate"``: running statistics estimated again with the noise off, so that they are those of evaluation.
    * ``"lower_rate"``: rates that theory says shift a variance by 5 % at most, and 0.1 at most.
    * ``"uniform"``: Uout in the place of dropout, noise of a variance that hardly shifts (Li et al. 2019).
    * ``"move"``: dropout behind the last BatchNorm that its noise reaches.
    * ``"layernorm"``: GroupNorm or LayerNorm in the place of every BatchNorm, fitted to its answers.
    * ``"auto"``: all of them on copies, if anything is wrong at all. The best is kept; of those within a standard error
      of the best, the one that changes least, in the order above.

    All of them re-estimate the statistics that are left. Evaluation is cured by that alone; what the other cures change
    is training from then on, and ``finetune`` lets them show it. A cure that makes the model worse on the given
    data is not kept, and the report says so. ``"layernorm"`` cannot keep the function exactly and needs fine-tuning.

    Args:
        model: any module that can be copied; parameters and buffers keep their identity where they stay.
        loader: batches as in :func:`vardrop.diagnose`, of training data.
        strategy: one of those above.
        validation: batches to judge by; the loader's own if None.
        metric: ``metric(model, batch)`` -> a number for a batch, lower is better; None for the error rate or the
            squared error of labels, or without labels for how far running statistics are from those of evaluation.
        finetune: trains a model in place; every cure is judged after it.
        max_batches: how many of each loader are used.
        generator: source of the noise; None for a fixed seed.

    Returns:
        The report: it prints; ``chosen`` is the strategy that the model has now, or None if it is as it was.

    Raises:
        ValueError: for an unknown strategy.
        RuntimeError: if the model cannot be copied.

    Example:
        >>> import torch, vardrop as vd
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
        >>> data = [torch.randn(256, 8) for _ in range(4)]
        >>> _ = [net(x) for _ in range(20) for x in data]  # training, as far as BatchNorm is concerned
        >>> report = vd.fix_variance_shift_(net, data, "recalibrate")
        >>> report.chosen, [found.rule for found in report.diagnosis.findings], report.outcome.findings
        ('recalibrate', ['variance-shift'], ())
    """
    if strategy not in get_args(Strategy):
        raise ValueError(
            f"vardrop.fix_variance_shift_: strategy must be one of {', '.join(get_args(Strategy))}, got {strategy!r}"
        )
    data = Passes(model, loader, max_batches, generator, "fix_variance_shift_").batches
    seen = data if validation is None else Passes(model, validation, max_batches, generator, "").batches
    work = _Work(model, data, seen, metric, finetune, max_batches, generator)
    before = diagnose(model, data, max_batches=max_batches, generator=generator)
    found = offenders(before)
    now = work.measured(model, before)
    if strategy != "auto":
        names: Sequence[str] = (strategy,)
    else:
        names = tuple(_STRUCTURAL) if found or any(f.rule in _CURED for f in before.findings) else ()
    tried = [work.attempt(name, found, before, now) for name in names]
    best = _best([result for result in tried if result.made is not None and not result.scores.mean > now.mean])
    if best is not None and best.made is not None:
        _STRUCTURAL[best.attempt.strategy](model, found)
        model.load_state_dict(best.made.state_dict())
    outcome = before if best is None else diagnose(model, data, max_batches=max_batches, generator=generator)
    attempts = tuple(result.attempt for result in tried)
    return FixReport(best and best.attempt.strategy, now.measure, now.mean, attempts, before, outcome)


class _Tried(NamedTuple):
    """A cure, the scores with it, and the copy that has it."""

    attempt: Attempt
    scores: Scores
    made: nn.Module | None = None


def _best(tried: list[_Tried]) -> _Tried | None:
    """The first of those that are within a standard error of the best."""
    if not tried:
        return None
    lowest = min(tried, key=lambda result: result.scores.mean)
    for result in tried:
        worse = result.scores.values - lowest.scores.values
        if float(worse.mean()) <= (standard_error(worse) if len(worse) > 1 else 0.0):
            return result
    return lowest


class _Work:
    """What all attempts share."""

    def __init__(
        self,
        model: nn.Module,
        data: list[Any],
        seen: list[Any],
        metric: Loss | None,
        finetune: Callable[[nn.Module], object] | None,
        max_batches: int,
        generator: torch.Generator | None,
    ) -> None:
        self.model, self.data, self.seen = model, data, seen
        self.metric, self.finetune = metric, finetune
        self.max_batches, self.generator = max_batches, generator

    def passes(self, model: nn.Module, batches: list[Any]) -> Passes:
        return Passes(model, batches, len(batches), None, "fix_variance_shift_")

    def measured(self, model: nn.Module, diagnosis: Diagnosis) -> Scores:
        """What a model is judged by."""
        passes = self.passes(model, self.seen)
        with passes.borrowed():
            found = score(passes, self.metric)
        if found is not None:
            return found
        gaps = [abs(math.log(shift.running)) + shift.mean_gap for shift in diagnosis.batchnorms]
        return Scores(_STATISTICS, torch.tensor([max(gaps, default=0.0)]))

    def attempt(self, name: str, found: list[Offender], before: Diagnosis, now: Scores) -> _Tried:
        """A cure, tried on a copy."""
        reason = self._pointless(name, found, before, now.measure)
        if reason is not None:
            return _Tried(Attempt(name, None, None, why=reason), now)
        try:
            made = copy.deepcopy(self.model)
        except Exception as error:
            raise RuntimeError(
                f"vardrop.fix_variance_shift_: the model must be one that copy.deepcopy can copy, got "
                f"{type(error).__name__}: {error}; cures are tried on copies"
            ) from error
        changes = _STRUCTURAL[name](made, found)
        if not changes.changed:
            why = "It found nothing that it could change."
            return _Tried(Attempt(name, None, None, left=changes.left, why=why), now)
        if name == "layernorm":
            self._fit(made, changes, before)
        if self.finetune is not None:
            self.finetune(made)
        recalibrated(self.passes(made, self.data))
        after = diagnose(made, self.data, max_batches=self.max_batches, generator=self.generator)
        scores = self.measured(made, after)
        worse = scores.mean > now.mean
        why = f"It makes the model worse, {scores.mean:.4g} instead of {now.mean:.4g}." if worse else ""
        if name == "layernorm" and self.finetune is None:
            why = (why + " It changes the function and needs fine-tuning; finetune= has it judged after that.").strip()
        ks = {shift.name: (shift.k, shift.k_error) for shift in after.batchnorms}
        tried = Attempt(name, scores.mean, after.worst, after.gap, changes.changed, changes.left, why, ks)
        return _Tried(tried, scores, made)

    def _pointless(self, name: str, found: list[Offender], before: Diagnosis, measure: str) -> str | None:
        if not before.batchnorms:
            return "There is no BatchNorm that could be measured."
        if name == "layernorm":
            return "Without labels or a metric nobody could tell what it costs." if measure == _STATISTICS else None
        if name != "recalibrate" and not found:
            return "No dropout was found that shifts a BatchNorm."
        return None

    def _fit(self, made: nn.Module, changes: Changes, before: Diagnosis) -> None:
        """New layers against the old ones, whose statistics are those of evaluation first."""
        teacher = copy.deepcopy(self.model)
        recalibrated(self.passes(teacher, self.data))
        order = [shift.name for shift in before.batchnorms if shift.name in changes.changed]
        fit(self.passes(made, self.data), self.passes(teacher, self.data), order)


def recalibrated(passes: Passes) -> None:
    """Estimate the running statistics of a model again without noise, to stay.

    Args:
        passes: the model and the batches.
    """
    with passes.borrowed():
        recalibrate(passes)
        norms = [module for module in passes.names if keeps_statistics(module)]
        keys = ("running_mean", "running_var", "num_batches_tracked")
        kept = [(buffer, buffer.clone()) for m in norms for key in keys if (buffer := m._buffers.get(key)) is not None]
    with torch.no_grad():
        for buffer, value in kept:
            buffer.copy_(value)
