"""`vd.diagnose`: looks at a model with the user's data, and tells what dropout does to it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _LazyNormBase

from vardrop.diagnosis.batchnorms import NO_STATISTICS, batchnorms, judged, measure, with_causes
from vardrop.diagnosis.passes import Passes
from vardrop.diagnosis.paths import path_to
from vardrop.diagnosis.placement import PLACEMENT_RULES
from vardrop.diagnosis.recalibrate import keeps_statistics, recalibrate
from vardrop.diagnosis.report import BatchNormShift, Cost, Diagnosis, Finding, Unjudged
from vardrop.diagnosis.rules import FEW, SHIFT_RULES, Facts, shifts_surely
from vardrop.diagnosis.scores import Loss, Scores, difference, score
from vardrop.diagnosis.tracing import Trace, tracing
from vardrop.prediction.stochastic import Noise, stochastic
from vardrop.prediction.structure import tensors

_CAUSES = 16  # sources that are measured one by one
_VARIES = 1e-4  # share of the output's spread; below it is rounding
_SALT = 7  # of the second pass in evaluation


def diagnose(
    model: nn.Module,
    loader: Any,
    *,
    loss_fn: Loss | None = None,
    validation: Any = None,
    max_batches: int = 16,
    generator: torch.Generator | None = None,
) -> Diagnosis:
    r"""Tell what dropout does to a model: its quarrel with BatchNorm, and where it stands.

    For every BatchNorm the variance of its input is measured on these data with the noise on, as in training, and with
    the noise off, as in evaluation. BatchNorm keeps to its running statistics in both, so that the noise makes all the
    difference (Li et al. 2019):

    .. math:: k^2 = \sigma^2_{train} / \sigma^2_{test}

    Where dropout is right before it, or before the linear layer in front of it, theory says what k² must be
    (:mod:`vardrop.diagnosis.theory`). Rules look for dropout in other wrong places. What a model cannot tell is listed
    in ``unjudged``, with the reason. The model is not changed: flags, buffers, hooks and torch's generators are what
    they were.

    Args:
        model: any module.
        loader: batches that it can be called with: ``(inputs, labels)``, tensors or mappings of keyword arguments; for
            the rule on underfitting they must be training data.
        loss_fn: ``loss_fn(model, batch)`` -> the mean loss of a batch, for models whose labels do not speak for
            themselves.
        validation: batches that the model was not trained with, which the rule on underfitting needs.
        max_batches: how many of each loader are looked at; they are kept in memory.
        generator: source of the noise; None for a fixed seed, so that two diagnoses agree.

    Returns:
        The diagnosis: it prints, ``findings`` are in the order of harm, ``batchnorms`` and ``unjudged`` have the rest.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if there is no batch, or ``max_batches`` is below 1.
        RuntimeError: if the model cannot be called with a batch.

    Example:
        >>> import torch, vardrop as vd
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(8, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
        >>> found = vd.diagnose(net, [torch.randn(256, 8) for _ in range(4)])
        >>> [(finding.where, finding.rule) for finding in found.findings]
        [('1', 'variance-shift')]
        >>> abs(found.batchnorms[0].ratio - found.batchnorms[0].theory) < 0.1
        True
    """
    passes = Passes(model, loader, max_batches, generator, "diagnose")
    unjudged = [Unjudged(name, reason) for name, reason in _beforehand(model)]
    if (reason := _unfit(passes)) is not None:
        return Diagnosis((), (), (*unjudged, Unjudged(type(model).__name__, reason)), None, 0)
    with passes.borrowed():
        first = passes.checked()
        noise, trace = _traced(passes, unjudged)
        modules = dict(model.named_modules())
        sources = {source.name if source.name in modules else "": source.kind for source in noise.sources}
        unjudged += [Unjudged(name, f"noise that stays off: {reason}") for name, reason in noise.left_off.items()]
        shifts = _batchnorms(passes, trace, sources, unjudged)
        varies, always_on = _varies(passes, first)
        clean = _scores(passes, loss_fn, None, unjudged)
        cost = _cost(passes, shifts, clean, loss_fn)
        facts = Facts(model, shifts, trace, sources, varies, always_on)
        if clean is not None and sources and validation is not None:
            noisy = score(passes, loss_fn, "")
            facts.training = None if noisy is None else (clean, noisy)
    if validation is not None:
        others = Passes(model, validation, max_batches, generator, "diagnose")
        with others.borrowed():
            facts.validation = score(others, loss_fn)
    elif sources:
        unjudged.append(Unjudged("underfitting", "there are no validation data to hold the error on these against"))
    found: list[Finding] = []
    for rule in (*SHIFT_RULES, *PLACEMENT_RULES):
        try:
            found += rule(facts)
        except Exception as error:  # a model that a rule does not understand must not hide what the others found
            unjudged.append(Unjudged(rule.__name__, f"the rule stopped with {type(error).__name__}: {error}"))
    found = [finding if finding.where else replace(finding, where=type(model).__name__) for finding in found]
    found.sort(key=lambda finding: -finding.severity)
    return Diagnosis(tuple(found), tuple(shifts), tuple(unjudged), cost, _examples(passes))


def _unfit(passes: Passes) -> str | None:
    """Why a model is not run at all."""
    if passes.is_lazy:
        return "it has layers without a shape yet; run one batch through it first"
    if any(isinstance(module, torch.jit.ScriptModule) for module in passes.names):
        return "it is TorchScript, which shows nothing of its inside; diagnose the module that it was made from"
    return None


def _beforehand(model: nn.Module) -> Iterator[tuple[str, str]]:
    """BatchNorms of which nothing can be said whatever the data."""
    for module, name in batchnorms(model).items():
        if isinstance(module, _LazyNormBase):
            yield name, "it is lazy and has no shape yet; run one batch through the model first"
        elif isinstance(module, torch.jit.ScriptModule):
            yield name, "it is TorchScript, which does not show what comes in"
        elif not keeps_statistics(module):
            yield name, NO_STATISTICS


def _traced(passes: Passes, unjudged: list[Unjudged]) -> tuple[Noise, Trace | None]:
    """The sources of noise, and the trace of a pass with all of it on."""
    model = passes.model
    with stochastic(model) as noise:
        pass
    try:
        with stochastic(model), tracing(model, batchnorms(model)) as trace:
            passes.run(0)
    except Exception as error:
        unjudged.append(Unjudged(type(model).__name__, f"it could not be traced: {type(error).__name__}: {error}"))
        return noise, None
    return noise, trace


def _batchnorms(
    passes: Passes, trace: Trace | None, sources: dict[str, str], unjudged: list[Unjudged]
) -> list[BatchNormShift]:
    """Every BatchNorm, in the order in which they run, with what shifts it."""
    chosen = {module: name for module, name in batchnorms(passes.model).items() if keeps_statistics(module)}
    if trace is not None:
        order = {module: calls[0] for module, calls in trace.calls.items()}
        chosen = dict(sorted(chosen.items(), key=lambda item: order.get(item[0], len(trace.nodes))))
    paths = {module: path_to(trace, module, sources) for module in chosen} if trace is not None else {}
    known = {module: path for module, path in paths.items() if path is not None}
    try:
        found, failed = measure(passes, chosen, known, "")  # there may be noise that could not be found
    except Exception as error:
        reason = f"the model does not run with its noise on: {type(error).__name__}: {error}"
        unjudged += [Unjudged(name, reason) for name in chosen.values()]
        return []
    unjudged += [Unjudged(chosen[module], reason) for module, reason in failed.items()]
    shifts: dict[nn.Module, BatchNormShift] = {}
    for module, inputs in found.items():
        upstream = _sources(trace, module, sources)
        verdict = judged(chosen[module], module, inputs, upstream, known.get(module))
        if isinstance(verdict, Unjudged):
            unjudged.append(verdict)
            continue
        shifts[module] = verdict
        if verdict.seen == 0:
            unjudged.append(Unjudged(verdict.name, "it has seen no batch, so its running statistics are not judged"))
        if verdict.sources and verdict.examples < FEW:
            words = f"{verdict.examples} examples are too few for a standard error, so its shift is not judged"
            unjudged.append(Unjudged(verdict.name, words))
    _causes(passes, shifts, unjudged)
    return list(shifts.values())


def _sources(trace: Trace | None, module: nn.Module, sources: dict[str, str]) -> list[str]:
    """What reaches a BatchNorm; all there is if that is not known."""
    if trace is None or module not in trace.calls:
        return list(sources)
    upstream = [trace.noise_upstream(call, sources) for call in trace.calls[module]]
    return list(dict.fromkeys(name for names in upstream for name in names))


def _causes(passes: Passes, shifts: dict[nn.Module, BatchNormShift], unjudged: list[Unjudged]) -> None:
    """Turn on one source at a time, where several reach a BatchNorm that shifts."""
    doubtful = {module: found for module, found in shifts.items() if shifts_surely(found) and len(found.sources) != 1}
    sources = list(dict.fromkeys(name for found in doubtful.values() for name in found.sources))
    if not doubtful:
        return
    if not sources or len(sources) > _CAUSES:
        words = f"more than {_CAUSES} sources reach it" if sources else "no source could be traced to it"
        unjudged += [Unjudged(found.name, f"which noise shifts it: {words}") for found in doubtful.values()]
        return
    causes: dict[nn.Module, dict[str, float]] = {module: {} for module in doubtful}
    for source in sources:
        reached = [module for module, found in doubtful.items() if source in found.sources]
        try:
            alone, _ = measure(passes, reached, {}, source)
        except Exception as error:
            unjudged.append(Unjudged(source, f"it does not run alone: {type(error).__name__}: {error}"))
            continue
        for module, inputs in alone.items():
            verdict = judged("", module, inputs, (), None)
            if isinstance(verdict, BatchNormShift):
                causes[module][source] = verdict.ratio
    for module, found in doubtful.items():
        shifts[module] = with_causes(found, causes[module])


def _varies(passes: Passes, first: Any) -> tuple[float, dict[str, str]]:
    """How far two passes in evaluation lie apart, and the noise functions that were on in the second."""
    try:
        with tracing(passes.model) as trace:
            second = passes.run(0, salt=_SALT)
    except Exception:  # not to be traced: nobody to name, but the outputs can be compared
        trace, second = Trace(), passes.run(0, salt=_SALT)
    apart = _apart(tensors(first), tensors(second))
    if apart < _VARIES:
        return 0.0, {}
    on = {
        owner or type(passes.model).__name__: f"{name} with p = {p:g}"
        for owner, name, p, active in trace.noises
        if active
    }
    return apart, on


def _apart(one: dict[str, Tensor], other: dict[str, Tensor]) -> float:
    """The largest distance of two outputs, relative to their spread."""
    largest = 0.0
    for name in one.keys() & other.keys():
        a, b = one[name], other[name]
        if a.shape != b.shape or not a.is_floating_point() or a.numel() < 2:
            continue
        a, b = a.detach().cpu().double(), b.detach().cpu().double()
        both = a.isfinite() & b.isfinite()
        spread = float(a[both].std()) if int(both.sum()) > 1 else 0.0
        if spread > 0:
            largest = max(largest, float((a - b)[both].square().mean().sqrt()) / spread)
    return largest


def _scores(passes: Passes, loss_fn: Loss | None, noise: str | None, unjudged: list[Unjudged]) -> Scores | None:
    found = score(passes, loss_fn, noise)
    if found is None:
        reason = "the batches have no labels that fit the output; give loss_fn(model, batch)"
        unjudged.append(Unjudged("loss of accuracy", reason))
    return found


def _cost(passes: Passes, shifts: list[BatchNormShift], clean: Scores | None, loss_fn: Loss | None) -> Cost | None:
    """The scores again with statistics that fit evaluation; what the loan ends with puts the old ones back."""
    if clean is None or not any(found.seen != 0 for found in shifts):
        return None
    recalibrate(passes)
    after = score(passes, loss_fn)
    return None if after is None else difference(clean, after)


def _examples(passes: Passes) -> int:
    """Rows of the first tensor of every batch."""
    found = (next(iter(tensors(batch).values()), None) for batch in passes.batches)
    return sum(len(x) if x is not None and x.ndim else 0 for x in found)
