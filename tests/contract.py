"""One list of everything that can be random, and the truths that hold for all of it.

A layer whose output is linear in its weight has a Gaussian output under Gaussian weights, so its mean and its whole
covariance follow from the Jacobian of the *plain* layer by linear algebra alone. Nothing of the library is used for a
truth: not its estimators, not its table of operations, not its geometry.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from statistics import NormalDist

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

import vardrop as vd
from vardrop.weights.posteriors import Posterior

ESTIMATORS = ("local", "per_example", "per_minibatch", "flipout")
SAMPLES = 3000


# ---------------------------------------------------------------------------------------------------- statistics


def assert_close_to(
    mean: Tensor, square: Tensor, truth: Tensor, count: int, what: str, false_alarm: float = 1e-6
) -> None:
    """All sample means are the truth within their standard errors (Bonferroni), from first and second sample moments.

    An entry that does not vary has to be the truth, up to rounding.
    """
    mean, square, truth = (x.flatten() for x in (mean, square, truth.expand(mean.shape)))
    assert mean.isfinite().all(), f"{what}: not finite"
    standard_error = ((square - mean * mean).clamp_min(0) / (count - 1)).sqrt()
    size = square.sqrt() + truth.abs()
    varies = standard_error > 1e-7 * size
    error = (mean - truth).abs()
    z = torch.where(varies, error / standard_error, torch.where(error <= 1e-6 * size, 0.0, torch.inf))
    bound = NormalDist().inv_cdf(1 - false_alarm / (2 * max(1, z.numel())))
    worst = z.max().item() if z.numel() else 0.0
    assert worst <= bound, f"{what}: {worst:.1f} standard errors off at entry {int(z.argmax())}, allowed {bound:.1f}"


def assert_mean(samples: Tensor, truth: Tensor, what: str, false_alarm: float = 1e-6) -> None:
    """The samples along axis 0 have the expectation ``truth``, all entries at once."""
    assert_close_to(samples.mean(0), samples.square().mean(0), truth, len(samples), what, false_alarm)


def assert_moments(samples: Tensor, mean: Tensor, covariance: Tensor, what: str) -> None:
    """The samples ``[S, D]`` have this mean and covariance: every entry, and the mean square of all of them together.

    The last is the sharpest: it sees an error of a few per cent in all variances that no single entry shows.
    """
    assert_mean(samples, mean, f"{what}, mean")
    count, centred = len(samples), samples - mean
    squares = centred.square()
    assert_close_to(centred.T @ centred / count, squares.T @ squares / count, covariance, count, f"{what}, covariance")
    variance = covariance.diagonal()
    varying = variance > 1e-12 * variance.max()
    if varying.any():
        ratio = (squares[:, varying] / variance[varying]).mean(1)
        assert_mean(ratio, torch.ones((), dtype=ratio.dtype), f"{what}, mean variance ratio")


# -------------------------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """A kind of layer: how to make the plain one and its input of ``n`` examples.

    ``input_axis`` and ``output_axis`` are those of its weight, written out again here as torch documents them.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], tuple[Tensor, ...]]
    input_axis: int = 1
    output_axis: int = 0
    call: Callable[..., Tensor] | None = None
    rows: int = 1  # what its operation sees for every example: Conv1D of transformers flattens tokens into rows

    def __repr__(self) -> str:
        return self.name

    def plain(self) -> nn.Module:
        return self.make().double()

    def run(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        return module(*inputs) if self.call is None else self.call(module, *inputs)


def _x(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randn(n, *shape, dtype=torch.float64),)


def _indices(*shape: int) -> Callable[[int], tuple[Tensor, ...]]:
    return lambda n: (torch.randint(0, 5, (n, *shape)),)


def _conv1d_of_transformers() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    layer = Conv1D(3, 4)
    nn.init.normal_(layer.weight)
    return layer


def _embedding(**arguments: object) -> nn.Module:
    layer = nn.Embedding(5, 3, **arguments)  # type: ignore[arg-type]
    nn.init.normal_(layer.weight)  # the padding row too: from_pretrained allows that
    return layer


# Layers whose output is linear in `weight`: for these the truths below are exact.
LINEAR = [
    Layer("linear", lambda: nn.Linear(4, 3), _x(4)),
    Layer("linear-no-bias", lambda: nn.Linear(4, 3, bias=False), _x(4)),
    Layer("linear-tokens", lambda: nn.Linear(4, 3), _x(3, 4)),
    Layer("conv1d", lambda: nn.Conv1d(2, 3, 3), _x(2, 5)),
    Layer("conv1d-circular", lambda: nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), _x(2, 4)),
    Layer("conv1d-same", lambda: nn.Conv1d(2, 3, 2, padding="same", dilation=2), _x(2, 4)),
    Layer("conv2d", lambda: nn.Conv2d(2, 3, 2), _x(2, 3, 3)),
    Layer("conv2d-grouped", lambda: nn.Conv2d(4, 6, 2, groups=2), _x(4, 3, 3)),
    Layer("conv2d-depthwise", lambda: nn.Conv2d(3, 3, 2, groups=3, bias=False), _x(3, 3, 3)),
    Layer("conv2d-strided-dilated", lambda: nn.Conv2d(2, 2, 2, stride=2, dilation=2, padding=1), _x(2, 5, 4)),
    Layer("conv2d-reflect", lambda: nn.Conv2d(2, 2, 2, padding=1, padding_mode="reflect", stride=2), _x(2, 3, 3)),
    Layer("conv2d-replicate", lambda: nn.Conv2d(2, 2, 2, padding=1, padding_mode="replicate", stride=2), _x(2, 3, 3)),
    Layer("conv3d", lambda: nn.Conv3d(2, 2, 2, groups=2, stride=2), _x(2, 2, 4, 2)),
    Layer("conv-transpose1d", lambda: nn.ConvTranspose1d(3, 2, 2, stride=2, output_padding=1), _x(3, 2), 0, 1),
    Layer("conv-transpose2d-grouped", lambda: nn.ConvTranspose2d(4, 4, 2, groups=2, padding=1), _x(4, 3, 3), 0, 1),
    Layer("conv-transpose2d-dilated", lambda: nn.ConvTranspose2d(2, 2, 2, dilation=2), _x(2, 1, 2), 0, 1),
    Layer("conv-transpose3d", lambda: nn.ConvTranspose3d(2, 2, 2, stride=2), _x(2, 1, 1, 2), 0, 1),
    Layer("embedding", _embedding, _indices(3), 0, 1),
    Layer("embedding-flat", _embedding, _indices(), 0, 1),
    Layer(
        "embedding-padding", lambda: _embedding(padding_idx=1), lambda n: (torch.arange(3 * n).view(n, 3) % 3,), 0, 1
    ),
    Layer("bilinear", lambda: nn.Bilinear(3, 2, 2), lambda n: (*_x(3)(n), *_x(2)(n))),
    Layer("bilinear-tokens", lambda: nn.Bilinear(2, 3, 2), lambda n: (*_x(2, 2)(n), *_x(2, 3)(n))),
    Layer("conv1d-of-transformers", _conv1d_of_transformers, _x(2, 4), 0, 1, rows=2),
]

# Layers that are not: several weights, or nonlinear in them.
OTHERS = [
    Layer(
        "attention", lambda: nn.MultiheadAttention(4, 2, batch_first=True), _x(3, 4), call=lambda m, x: m(x, x, x)[0]
    ),
    Layer(
        "attention-separate",
        lambda: nn.MultiheadAttention(4, 2, batch_first=True, kdim=3, vdim=2),
        lambda n: (*_x(3, 4)(n), *_x(3, 3)(n), *_x(3, 2)(n)),
        call=lambda m, q, k, v: m(q, k, v)[0],
    ),
    Layer("rnn", lambda: nn.RNN(3, 4, batch_first=True), _x(2, 3), call=lambda m, x: m(x)[0]),
    Layer("lstm", lambda: nn.LSTM(3, 4, 2, batch_first=True, bidirectional=True), _x(2, 3), call=lambda m, x: m(x)[0]),
    Layer("gru", lambda: nn.GRU(3, 4, batch_first=True), _x(2, 3), call=lambda m, x: m(x)[0]),
    Layer(
        "lstm-cell", lambda: nn.LSTMCell(3, 4), lambda n: (*_x(3)(n), *_x(4)(n)), call=lambda m, x, h: m(x, (h, h))[0]
    ),
    Layer("gru-cell", lambda: nn.GRUCell(3, 4), lambda n: (*_x(3)(n), *_x(4)(n))),
    Layer("rnn-cell", lambda: nn.RNNCell(3, 4), lambda n: (*_x(3)(n), *_x(4)(n))),
]
LAYERS = LINEAR + OTHERS
RECURRENT = ("rnn", "lstm", "gru")  # one fused operation, which dynamo and vmap do not look into


# ---------------------------------------------------------------------------------------------------- posteriors

POSTERIORS: dict[str, Posterior] = {
    "vd-a-layer": vd.VariationalDropout(type="A", sharing="layer"),
    "vd-a-neuron": vd.VariationalDropout(type="A", sharing="neuron"),
    "vd-b-layer": vd.VariationalDropout(type="B", sharing="layer"),
    "vd-b-input": vd.VariationalDropout(type="B", sharing="neuron", unit="input"),
    "vd-b-output": vd.VariationalDropout(type="B", sharing="neuron", unit="output"),
    "vd-b-weight": vd.VariationalDropout(type="B", sharing="weight"),
    "gaussian-a": vd.GaussianDropout(type="A", rate=0.3),
    "gaussian-b": vd.GaussianDropout(type="B", rate=0.3),
    "mean-field": vd.GaussianPosterior(std=0.3),
    "sparse": vd.SparseVariationalDropout(log_variance=-2.0),
    "sparse-layer": vd.SparseVariationalDropout(log_variance=-2.0, sharing="layer"),
    "sparse-input": vd.SparseVariationalDropout(log_variance=-2.0, sharing="neuron", unit="input"),
    "sparse-output": vd.SparseVariationalDropout(log_variance=-2.0, sharing="neuron", unit="output"),
}


def converted(layer: Layer, posterior: str) -> nn.Module:
    """A converted layer in float64, with a different rate or variance wherever it may be different."""
    module = layer.plain()
    report = vd.convert_(module, POSTERIORS[posterior])
    with torch.no_grad():
        for noise in report.new_parameters:
            noise.uniform_(-2.5, -0.1)
    return module


def unit_of(layer: Layer, plain: nn.Module, which: str) -> Tensor:
    """The number of the input or output unit that every entry of the weight belongs to, in the weight's shape."""
    shape = plain.weight.shape
    axis = layer.input_axis if which == "input" else layer.output_axis
    unit = torch.arange(shape[axis]).view([-1 if i == axis else 1 for i in range(len(shape))]).expand(shape)
    groups = getattr(plain, "groups", 1)
    if axis == 1 and groups > 1:  # the units of a group lie in one block of rows
        block = torch.arange(shape[0]).div(shape[0] // groups, rounding_mode="floor")
        unit = unit + shape[1] * block.view(-1, *[1] * (len(shape) - 1))
    return unit


@dataclass
class Truth:
    """The random weight of a layer as linear algebra: w = mean + directions @ N(0, I).

    ``directions`` is ``[scalars, *weight.shape]``: one for every random scalar. Differentiable in the parameters.
    """

    mean: Tensor
    directions: Tensor
    alpha: Tensor | None  # type A: α of every input unit


def truth_of(layer: Layer, module: nn.Module, posterior: str, parameters: dict[str, Tensor]) -> Truth:
    config, theta = POSTERIORS[posterior], parameters["weight"]
    if isinstance(config, vd.SparseVariationalDropout) and config.sharing != "weight":
        log_variance, unit = parameters["weight_log_variance"], torch.zeros(theta.shape, dtype=torch.long)
        if config.sharing == "neuron":
            unit = unit_of(layer, layer.plain(), config.unit)
        weights = torch.ones(theta.shape, dtype=torch.bool)  # but for the row of padding, which is a constant
        weights[[i for i in range(len(theta)) if i == getattr(layer.plain(), "padding_idx", None)]] = False
        groups = [unit == i for i in range(int(unit.max()) + 1)]
        groups = [group & weights if (group & weights).any() else group for group in groups]
        squares = torch.stack([theta[group].square().mean() for group in groups])
        alpha = (log_variance.exp() / squares).clamp(math.exp(-8), math.exp(8))
        std = alpha[unit].sqrt() * theta.abs()
    elif isinstance(config, vd.GaussianPosterior | vd.SparseVariationalDropout):
        std = (0.5 * parameters["weight_log_variance"]).exp()
        if isinstance(config, vd.SparseVariationalDropout):  # |log alpha| <= 8
            std = std.clamp(theta.abs() * math.exp(-4), theta.abs() * math.exp(4))
    else:
        plain = layer.plain()
        log_alpha = parameters["weight_log_alpha"] if config.learned else module.weight_log_alpha
        if log_alpha.shape == theta.shape:
            alpha = log_alpha.exp()
        elif log_alpha.numel() == 1:
            alpha = log_alpha.exp().expand(theta.shape)
        else:
            alpha = log_alpha.exp()[unit_of(layer, plain, config.unit)]
        if config.type == "A":
            unit = unit_of(layer, plain, "input")
            units = int(unit.max()) + 1
            belongs = (unit == torch.arange(units).view(-1, *[1] * theta.ndim)).to(theta.dtype)
            per_unit = log_alpha.exp().expand(units)
            return Truth(theta, belongs * (alpha.sqrt() * theta), per_unit)
        std = alpha.sqrt() * theta.abs()
    return Truth(theta, torch.diag(std.flatten()).view(-1, *theta.shape), None)


def plain_output(layer: Layer, inputs: tuple[Tensor, ...], biased: bool) -> Callable[[Tensor], Tensor]:
    """weight -> output of the plain layer, flat; without its bias if asked."""
    plain = layer.plain()
    others = {name: p for name, p in plain.named_parameters() if name != "weight"}

    def run(weight: Tensor, bias: dict[str, Tensor] | None = None) -> Tensor:
        rest = others if bias is None else bias
        if not biased:
            rest = {name: torch.zeros_like(p) for name, p in rest.items()}
        return functional_call(plain, {"weight": weight, **rest}, inputs).flatten()

    return run


def true_moments(
    layer: Layer,
    module: nn.Module,
    posterior: str,
    estimator: str,
    inputs: tuple[Tensor, ...],
    parameters: dict[str, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Mean ``[D]`` and covariance ``[D, D]`` of the flat output, as the estimator promises them."""
    parameters = parameters or {k: p.detach() for k, p in module.named_parameters()}
    truth = truth_of(layer, module, posterior, parameters)
    run = plain_output(layer, inputs, biased=False)
    bias = {"bias": parameters["bias"]} if "bias" in parameters else None
    mean = plain_output(layer, inputs, biased=True)(truth.mean, bias)
    if estimator == "local" and truth.alpha is not None:
        rows = _local_type_a(layer, truth, inputs)
    else:
        jacobian = jacrev(run)(truth.mean.detach()).flatten(1)  # [D, weights]: linear in the weight
        rows = truth.directions.flatten(1) @ jacobian.T  # [scalars, D]
    covariance = rows.T @ rows
    if estimator == "local" and truth.alpha is None:
        return mean, torch.diag(covariance.diagonal())
    if estimator in ("per_example", "flipout"):
        examples = layer.rows * len(inputs[0])
        example = torch.arange(examples).repeat_interleave(len(mean) // examples)
        covariance = covariance * (example == example.unsqueeze(1))
    return mean, covariance


def _local_type_a(layer: Layer, truth: Truth, inputs: tuple[Tensor, ...]) -> Tensor:
    """Independent noise N(1, α) on every entry of the input (or every index): ``[entries, D]``."""
    alpha = truth.alpha
    assert alpha is not None
    x, *others = inputs
    if not x.is_floating_point():
        y = plain_output(layer, inputs, biased=False)(truth.mean).view(x.numel(), -1)
        padding = getattr(layer.plain(), "padding_idx", None)
        if padding is not None:
            y = y * (x.flatten() != padding).unsqueeze(1)
        return torch.stack([torch.diag(alpha[x.flatten()].sqrt()) * column for column in y.T], -1).flatten(1)
    plain = layer.plain()
    rest = {name: torch.zeros_like(p) for name, p in plain.named_parameters() if name != "weight"}

    def run(x: Tensor) -> Tensor:
        return functional_call(plain, {"weight": truth.mean, **rest}, (x, *others)).flatten()

    padded = getattr(plain, "padding_mode", "zeros") != "zeros"  # each copy of a padded entry has noise of its own
    if padded:
        border = plain._reversed_padding_repeated_twice  # type: ignore[union-attr]
        x = nn.functional.pad(x, border, mode=plain.padding_mode)  # type: ignore[arg-type]
        plain.padding_mode, plain.padding = "zeros", (0,) * len(plain.kernel_size)  # type: ignore[assignment,arg-type]
    channel = 1 if isinstance(plain, nn.modules.conv._ConvNd) else x.ndim - 1
    scale = alpha.sqrt().view([-1 if axis == channel else 1 for axis in range(x.ndim)])
    jacobian = jacrev(run)(x).flatten(1)  # [D, entries]
    return (jacobian * (x * scale).flatten()).T


# ------------------------------------------------------------------------------------------------------- samples


def outputs(layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...], count: int = SAMPLES) -> Tensor:
    """``[count, D]``: independent stochastic forward passes, under the estimator in force."""
    with torch.no_grad():
        return vmap(lambda _: layer.run(module, inputs), randomness="different")(torch.arange(count)).flatten(1)


def gradients(
    layer: Layer, module: nn.Module, inputs: tuple[Tensor, ...], loss: Callable[[Tensor], Tensor], count: int = SAMPLES
) -> dict[str, Tensor]:
    """name -> ``[count, *shape]``: gradients of ``loss(flat output)`` in independent passes."""
    parameters = {name: p.detach() for name, p in module.named_parameters()}

    def value(parameters: dict[str, Tensor]) -> Tensor:
        return loss(functional_call(module, parameters, inputs).flatten())

    return vmap(lambda _: grad(value)(parameters), randomness="different")(torch.arange(count))
