"""The rules on placement and rates: each looks at the facts for one kind of fault."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor, nn

from vardrop.diagnosis.paths import is_plain
from vardrop.diagnosis.report import Finding
from vardrop.diagnosis.rules import Facts, Rule
from vardrop.diagnosis.scores import standard_error
from vardrop.diagnosis.tracing import Trace
from vardrop.objective import dropout_rates
from vardrop.rates import Rated
from vardrop.roles import sites
from vardrop.weights.modules import noisy_weights

CORRELATED = 0.5  # of neighbours, from which on a dropped unit can be read off them
EXTREME = 0.8  # rates above it keep less than a fifth
UNDERFIT = 0.05  # error on training data, above which there is something left to learn
AT_END = 0.5  # share of a layer's rates at one end, above which the end is a finding
_NEAR_ZERO, _NEAR_BOUND = 1e-3, 0.99


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


PLACEMENT_RULES: tuple[Rule, ...] = (
    noise_in_evaluation, dropout_on_maps, learned_rates_at_an_end, extreme_rates, noise_on_output, underfitting,
)  # fmt: skip
