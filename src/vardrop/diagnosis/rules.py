"""The rules: each looks at the facts for one kind of fault. What a rule says is as short as it can be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from vardrop.diagnosis.batchnorms import is_plain
from vardrop.diagnosis.report import BatchNormShift, Finding, some
from vardrop.diagnosis.scores import Scores, standard_error
from vardrop.diagnosis.tracing import Trace
from vardrop.objective import dropout_rates
from vardrop.rates import Rated
from vardrop.roles import sites
from vardrop.weights.modules import noisy_weights

SHIFT = 0.1  # k² − 1 below which a shift does no harm worth a line: statistics of 200 values err as much
STALE = 0.25  # distance of running statistics that a moving average does not explain
ERRORS = 3.0  # standard errors that a deviation must have
FEW = 16  # examples, below which a standard error is itself a guess
CORRELATED = 0.5  # of neighbours, from which on a dropped unit can be read off them
EXTREME = 0.8  # rates above it keep less than a fifth
UNDERFIT = 0.05  # error on training data, above which there is something left to learn
AT_END = 0.5  # share of a layer's rates at one end, above which the end is a finding
_NEAR_ZERO, _NEAR_BOUND = 1e-3, 0.99


@dataclass
class Facts:
    """What is known of a model when the rules are asked.

    Attributes:
        model: itself.
        batchnorms: measured.
        trace: of a pass with the noise on; None if it could not be traced.
        sources: name -> kind of noise.
        varies: how far two passes in evaluation lie apart, relative to the spread of the output.
        always_on: noise that ran in evaluation: name -> what it was.
        training: scores on the loader, noise off and noise on.
        validation: scores on validation data, noise off.
    """

    model: nn.Module
    batchnorms: list[BatchNormShift]
    trace: Trace | None
    sources: dict[str, str]
    varies: float = 0.0
    always_on: dict[str, str] = field(default_factory=dict)
    training: tuple[Scores, Scores] | None = None
    validation: Scores | None = None


Rule = Callable[[Facts], Iterator[Finding]]


def variance_shift(facts: Facts) -> Iterator[Finding]:
    """BatchNorms whose input has another variance in training: one finding for each source, at its worst BatchNorm."""
    harmful = [found for found in facts.batchnorms if shifts_surely(found) and not _fits_evaluation(found)]
    for where, hit in by_cause(harmful).items():
        worst = max(hit, key=lambda found: abs(math.log(alone(found, where))))
        ratio = alone(worst, where)
        names = some([found.name for found in hit])
        theory = "" if worst.theory is None else f", by theory {worst.theory:.3g}"
        yield Finding(
            where,
            "variance-shift",
            abs(ratio - 1),
            f"k² = {worst.ratio:.3g} ± {worst.error:.1g} at {worst.name}{theory}"
            + (f", {ratio:.3g} by this noise alone" if len(worst.causes) > 1 else ""),
            f"With this noise on, the input of {names} has another variance than in evaluation, which its running "
            "statistics do not know.",
            _remedy(facts, where, hit),
            tuple(found.name for found in hit),
        )


def shifts_surely(found: BatchNormShift) -> bool:
    """Whether a shift is large enough to do harm, and is none of chance."""
    return (
        found.examples >= FEW
        and abs(found.ratio - 1) > SHIFT
        and abs(math.log(found.ratio)) > ERRORS * found.error / found.ratio
    )


def _fits_evaluation(found: BatchNormShift) -> bool:
    """Whether running statistics were taken without the noise: then evaluation is not hurt by it."""
    return found.seen != 0 and abs(math.log(found.running)) < 0.5 * abs(math.log(found.ratio))


def by_cause(shifted: Iterable[BatchNormShift]) -> dict[str, list[BatchNormShift]]:
    """The BatchNorms that each source of noise shifts; those whose source is not known under their own names."""
    found: dict[str, list[BatchNormShift]] = {}
    for shift in shifted:
        for where in _causes(shift):
            found.setdefault(where, []).append(shift)
    return found


def _causes(found: BatchNormShift) -> list[str]:
    """What shifts a BatchNorm: each source that does so alone, else the one that does most."""
    if not found.causes:
        return [found.sources[0] if len(found.sources) == 1 else found.name]
    strong = [name for name, ratio in found.causes.items() if abs(ratio - 1) > SHIFT]
    return strong or [max(found.causes, key=lambda name: abs(math.log(found.causes[name])))]


def alone(found: BatchNormShift, where: str) -> float:
    """k² that a source gives alone, where that is known."""
    return found.causes.get(where, found.ratio)


def _remedy(facts: Facts, where: str, hit: list[BatchNormShift]) -> str:
    last = hit[-1].name
    for found in facts.batchnorms:  # in the order in which they run
        if where in found.sources:
            last = found.name
    if where not in facts.sources:
        return "Re-estimate the statistics without noise: vd.fix_variance_shift_(model, loader, 'recalibrate')."
    return (
        f"Move it behind {last}, the last BatchNorm that it reaches, or lower its rate; vd.fix_variance_shift_ does "
        "either, or re-estimates the statistics without noise."
    )


def unproven_shift(facts: Facts) -> Iterator[Finding]:
    """Dropout before a BatchNorm that these examples are too few to measure, and theory says that it shifts."""
    for found in facts.batchnorms:
        if found.theory is None or shifts_surely(found) or _fits_evaluation(found) or found.theory - 1 <= SHIFT:
            continue
        if found.examples < FEW or not found.error < found.theory - 1 - SHIFT:  # it cannot be said that it does not
            yield Finding(
                found.sources[0],
                "dropout-before-batchnorm",
                found.theory - 1,
                f"k² = {found.theory:.3g} by theory at {found.name}, measured {found.ratio:.3g} ± {found.error:.1g}",
                f"It puts noise on the input of {found.name}, and {found.examples} examples are too few to measure how "
                "much that shifts its variance.",
                f"Move it behind {found.name}, or give more batches to be sure.",
                (found.name,),
            )


def stale_statistics(facts: Facts) -> Iterator[Finding]:
    """Running statistics that are neither those of training nor those of evaluation."""
    for found in facts.batchnorms:
        if found.seen == 0 or found.stale <= STALE + ERRORS * found.running_error / max(found.running, 1e-30):
            continue
        yield Finding(
            found.name,
            "stale-statistics",
            found.stale,
            f"running variance {found.running:.3g} times that of its input, means off by "
            f"{math.sqrt(found.mean_gap):.2g} standard deviations",
            "Its running statistics are neither those of its input with the noise on nor with the noise off: they come "
            "from other weights or other data.",
            "Re-estimate them: vd.fix_variance_shift_(model, loader, 'recalibrate').",
        )


def noise_in_evaluation(facts: Facts) -> Iterator[Finding]:
    """Outputs that vary in evaluation."""
    if not facts.varies:
        return
    names = dict(facts.always_on) or {type(facts.model).__name__: "noise"}
    for where, what in names.items():
        yield Finding(
            where,
            "noise-in-evaluation",
            facts.varies,
            f"two passes differ by {facts.varies:.2g} of the output's spread",
            f"The model was in evaluation, and {what} stayed on.",
            "Make it depend on self.training, as in dropout_p=self.p if self.training else 0.0.",
        )


def dropout_on_maps(facts: Facts) -> Iterator[Finding]:
    """Dropout of single units of feature maps whose neighbours say the same."""
    if facts.trace is None:
        return
    worst: dict[str, float] = {}
    for index, node in enumerate(facts.trace.nodes):
        name = facts.trace.source(index, facts.sources)
        if name is None or node.correlation is None or node.correlation <= CORRELATED:
            continue
        if is_plain(node.module, node.name) and _is_map(facts.trace, index):
            worst[name] = max(worst.get(name, 0.0), node.correlation)
    for where, correlation in worst.items():
        yield Finding(
            where,
            "dropout-on-feature-maps",
            correlation,
            f"neighbouring units correlate by {correlation:.2f}",
            "It drops single units of a feature map, and what one of them held can be read off its neighbours.",
            "Drop blocks or whole channels: vd.layers.DropBlock2d(p), nn.Dropout2d(p).",
        )


_MAPS = ("Conv2d", "Conv3d", "BatchNorm2d", "BatchNorm3d", "MaxPool2d", "MaxPool3d", "AvgPool2d", "AvgPool3d",
         "conv2d", "conv3d", "max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "BatchNormAct2d")  # fmt: skip
_NO_MAPS = ("Linear", "linear", "softmax", "Softmax", "matmul", "__matmul__", "bmm", "permute", "transpose", "movedim",
            "LayerNorm", "layer_norm", "scaled_dot_product_attention", "einsum", "view", "reshape")  # fmt: skip


def _is_map(trace: Trace, index: int) -> bool:
    """Whether a four-dimensional tensor has channels and space: it comes from a convolution or a relative of one."""
    todo, seen = list(trace.nodes[index].parents), set()
    if not todo:
        return True  # an input of the model
    while todo:
        this = todo.pop(0)
        name = trace.nodes[this].name
        if name in _MAPS:
            return True
        if name in _NO_MAPS or this in seen:
            continue
        seen.add(this)
        todo += trace.nodes[this].parents
    return False


def learned_rates_at_an_end(facts: Facts) -> Iterator[Finding]:
    """Learned rates that a posterior has driven to nothing, or against their bound."""
    bounds = {name: getattr(config, "max_alpha", None) for name, _, _, config, _ in noisy_weights(facts.model)}
    for name, module in facts.model.named_modules():
        if isinstance(module, Rated) and module.is_learned:
            bound = getattr(module, "max_log_alpha", None)
            bounds[name or type(module).__name__] = None if bound is None else math.exp(bound)
    for where, alpha in dropout_rates(facts.model, "alpha").items():
        if where not in bounds or not _is_learned(facts.model, where):
            continue
        bound = bounds[where]
        yield from _ends(where, alpha, math.inf if bound is None else bound)


def _is_learned(model: nn.Module, where: str) -> bool:
    """Whether gradients reach the rates of a weight, or of a layer."""
    for name, _, noise, config, _ in noisy_weights(model):
        if name == where:
            return hasattr(config, "max_alpha") and noise.requires_grad
    return True


def _ends(where: str, alpha: Tensor, bound: float) -> Iterator[Finding]:
    low = float((alpha < _NEAR_ZERO).float().mean())
    high = float((alpha > _NEAR_BOUND * bound).float().mean()) if math.isfinite(bound) else 0.0
    if low > AT_END:
        yield Finding(
            where,
            "rates-at-zero",
            low,
            f"{low:.0%} of its rates below {_NEAR_ZERO:g}",
            "Its posterior has driven the noise to nothing, so that it regularises nothing.",
            "Raise the weight of the KL, or check that it is in the loss; if it stays so, leave the noise out here.",
        )
    if high > AT_END:
        yield Finding(
            where,
            "rates-at-bound",
            high,
            f"{high:.0%} of its rates at α = {bound:g}",
            "Its posterior wants more noise than its bound allows.",
            "Make the layer smaller, or let it prune: vd.SparseVariationalDropout() has no bound.",
        )


def extreme_rates(facts: Facts) -> Iterator[Finding]:
    """Fixed rates that leave next to nothing."""
    for site in sites(facts.model):
        running = (
            any(name == site.name or site.name.startswith(f"{name}.") for name in facts.sources) or not facts.sources
        )
        if site.rate <= EXTREME or site.role == "path" or not (running or site.rate == 1):
            continue
        if isinstance(site.owner, Rated) and site.owner.is_learned:
            continue
        yield Finding(
            site.name,
            "extreme-rate",
            site.rate,
            f"p = {site.rate:g}",
            "It lets nothing through." if site.rate == 1 else f"It keeps one unit in {1 / (1 - site.rate):.3g}.",
            "Lower it; 0.5 is the most that dropout of hidden units is commonly given.",
        )


def noise_on_output(facts: Facts) -> Iterator[Finding]:
    """Dropout of the model's own answers."""
    if facts.trace is None:
        return
    for index in dict.fromkeys(facts.trace.outputs):
        node, where = facts.trace.nodes[index], facts.trace.source(index, facts.sources)
        rate = node.rate if node.module is None else getattr(node.module, "p", None)
        if where is None or not isinstance(rate, int | float) or "drop" not in node.name.lower():
            continue
        yield Finding(
            where,
            "dropout-on-output",
            float(rate),
            f"p = {float(rate):g}",
            "It drops what the model answers, and no layer comes after it that could make up for that.",
            "Move it in front of the last layer.",
        )


def underfitting(facts: Facts) -> Iterator[Finding]:
    """Noise in a model that has not learned its training data, and is as good on new ones."""
    if facts.training is None or facts.validation is None or not facts.sources:
        return
    clean, noisy = facts.training
    gap = facts.validation.mean - clean.mean
    gap_error = math.hypot(clean.error, facts.validation.error)
    cost = noisy.mean - clean.mean
    far = clean.mean - 2 * clean.error > UNDERFIT
    if far and gap < 2 * gap_error and cost > max(gap, 0.0) + 2 * standard_error(noisy.values - clean.values):
        yield Finding(
            type(facts.model).__name__,
            "dropout-in-a-model-that-underfits",
            cost,
            f"{clean.measure} {clean.mean:.3g} on training data, {facts.validation.mean:.3g} on validation data, "
            f"{noisy.mean:.3g} with the noise on",
            "It does no better on its training data than on new ones, so there is nothing for noise to hold back.",
            "Lower the rates, or train longer or with a larger model first: vd.set_rates_(model, ...).",
        )


RULES: tuple[Rule, ...] = (
    noise_in_evaluation, variance_shift, unproven_shift, stale_statistics, dropout_on_maps, learned_rates_at_an_end,
    extreme_rates, noise_on_output, underfitting,
)  # fmt: skip
