"""Four estimators of a linear operation with a random weight, and the switch between them.

Each is a function ``(op, weight, estimator) -> y`` for weights with independent entries, and one function does all
four for correlated weights, whose noise is a factor on the input. They agree in the mean of y and of its gradient;
they differ in how noise is shared between the examples of a minibatch, and so in the variance of the gradient.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from vardrop.weights.linear_ops import Examples, LinearOp
from vardrop.weights.noise import add_noise, normal, normal_like, signs
from vardrop.weights.per_example import per_example

if TYPE_CHECKING:
    from vardrop.weights.random_kinds import CorrelatedWeight, IndependentWeight

NAMES = ("local", "per_example", "per_minibatch", "flipout", "none")


@dataclass(frozen=True)
class _Setting:
    name: str = "local"
    generator: torch.Generator | None = None
    chunk: int | None = None


class _Active(threading.local):
    """The estimator in force in this thread; a plain thread-local, which torch.compile can read and guards on."""

    def __init__(self) -> None:
        self.setting = _Setting()
        self.outer: list[_Setting] = []


_active = _Active()


class estimator:  # noqa: N801 - used as a statement: `with estimator("flipout"):`
    """Choose how operations with random weights are carried out, in this thread and until the block ends.

    ========================  =================================================================================
    ``"local"`` (default)     the local reparameterization trick: y is sampled, not the weight (eq. 6). For a
                              convolution the noise is independent per output location, which leaves out the
                              covariance that one shared kernel would cause between locations; for type A it is
                              independent per entry of the input (eq. 9).
    ``"per_example"``         a weight of its own for every example of the batch: slow, exact.
    ``"per_minibatch"``       one weight for the whole batch (the estimator of eq. 3): noisy gradients.
    ``"flipout"``             one weight perturbation with random signs for every example (Wen et al. 2018).
    ``"none"``                the mean weight, no noise: the lower limit in the paper's Table 1.
    ========================  =================================================================================

    An example is an entry of axis 0 of what the operation sees. Activation checkpointing computes again in the thread
    of the backward pass, where this block may not reach: pass it
    ``context_fn=lambda: (nullcontext(), vd.estimator(name))``, and no generator: the state of torch's default one is
    what it brings back.

    Args:
        name: one of the names above.
        generator: source of all noise inside the block; torch's default generator if None. Not with torch.compile.
        chunk: for ``"per_example"``: how many examples have their weights in memory at once; None chooses. Between
            chunks nothing is kept: the backward pass draws the same weights again.

    Raises:
        ValueError: for an unknown name or a chunk below 1.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(3, 2)
        >>> _ = vd.convert_(layer, vd.VariationalDropout(rate=0.5))
        >>> x = torch.ones(4, 3)
        >>> with vd.estimator("per_minibatch"):  # every row meets the same weight
        ...     y = layer(x)
        >>> bool((y == y[0]).all())
        True
    """

    def __init__(self, name: str, *, generator: torch.Generator | None = None, chunk: int | None = None) -> None:
        if name not in NAMES:
            raise ValueError(f"vardrop.estimator: name must be one of {', '.join(NAMES)}, got {name!r}")
        if chunk is not None and chunk < 1:
            raise ValueError(f"vardrop.estimator: chunk must be at least 1 example, got {chunk}")
        self._setting = _Setting(name, generator, chunk)

    def __enter__(self) -> None:
        _active.outer.append(_active.setting)
        _active.setting = self._setting

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        _active.setting = _active.outer.pop()


def current() -> _Setting:
    """The estimator in force in this thread."""
    return _active.setting


def independent(op: LinearOp, weight: IndependentWeight) -> Tensor:
    """y for a weight with independent entries (type B noise, and every mean-field Gaussian)."""
    setting = _active.setting
    if setting.name == "none":
        return op.mean(weight.loc)
    if setting.name == "local":
        return weight.local(op, setting.generator)
    if setting.name == "per_minibatch" or op.examples is None:
        return op.mean(weight.drawn())
    if setting.name == "per_example":
        return per_example(op, op.examples, weight.loc, weight.variance, setting.generator, setting.chunk)
    return _flipout(op, op.examples, weight.loc, weight.variance, setting.generator)


def local(op: LinearOp, loc: Tensor, variance: Tensor, generator: torch.Generator | None) -> Tensor:
    """The local reparameterization trick: y from its own Gaussian (eq. 6)."""
    mean = op.mean(loc)
    if mean.dtype != torch.float16:
        return add_noise(mean, op.variance(variance), generator)
    # float16 has no room for squares: |x| >= 256 overflows, sigma^2 < 6e-8 vanishes
    with torch.autocast(mean.device.type, enabled=False):
        inputs = op.inputs if op.indexed else tuple(x.float().square() for x in op.inputs)
        wide = op.run(inputs, variance.float(), False)
    return add_noise(mean, wide, generator)


def _example_shape(x: Tensor, example: int | None, kept: set[int]) -> list[int]:
    """The shape of x with every axis set to 1 but the examples' and those in ``kept``."""
    keep = {axis % x.ndim for axis in kept} | (set() if example is None else {example})
    return [size if axis in keep else 1 for axis, size in enumerate(x.shape)]


def _flipout(
    op: LinearOp, examples: Examples, loc: Tensor, variance: Tensor, generator: torch.Generator | None
) -> Tensor:
    mean = op.mean(loc)
    x, *others = op.inputs
    change = add_noise(torch.zeros_like(loc), variance, generator)
    if not op.indexed:
        x = x * signs(_example_shape(x, examples[0], set(op.x_axes.values())), x, generator)
    noise = op.run((x, *others), change, False)
    return mean + noise * signs(_example_shape(mean, examples[-1], set(op.y_axes.values())), mean, generator)


def correlated(op: LinearOp, weight: CorrelatedWeight) -> Tensor:
    """y for a weight whose slices along one axis share a factor N(1, α) (type A noise, eq. 11).

    The factor of an input unit can be put on the input itself, whatever the operation. The estimators differ only in
    which entries of x share it: none (local), the positions of one example, or the whole minibatch.
    """
    setting = _active.setting
    if setting.name == "none":
        return op.mean(weight.loc)
    if weight.axis in op.x_axes:
        if op.indexed:
            y = op.run(op.inputs, weight.loc, False) * _factor_of_indices(op, weight, setting)
            return op.plus_bias(y)
        x, *others = op.inputs
        if x.shape[op.x_axes[weight.axis]] != len(weight.std):
            return op.mean(weight.loc)  # which refuses it in its own words: a factor would broadcast with one unit
        example = None if op.examples is None else op.examples[0]
        factor = _factor(x, example, op.x_axes[weight.axis], weight, setting)
        return op.run((x * factor, *others), weight.loc, True)
    if weight.axis in op.y_axes and weight.groups == 1:
        y = op.run(op.inputs, weight.loc, False)
        example = None if op.examples is None else op.examples[-1]
        y = y * _factor(y, example, op.y_axes[weight.axis], weight, setting)
        return op.plus_bias(y)
    return op.mean(weight.drawn())


def _factor(x: Tensor, example: int | None, unit: int, weight: CorrelatedWeight, setting: _Setting) -> Tensor:
    """1 + √α ε, to be multiplied with x, whose axis ``unit`` runs over the units."""
    unit %= x.ndim
    along = [-1 if axis == unit else 1 for axis in range(x.ndim)]
    if setting.name == "per_minibatch":
        return weight.factor(setting.generator).to(x.dtype).view(along)
    std = weight.std.to(x.dtype).view(along)
    if setting.name == "local":
        return torch.addcmul(torch.ones((), dtype=x.dtype, device=x.device), std, normal_like(x, setting.generator))
    shape = _example_shape(x, example if setting.name == "per_example" else None, {unit})
    noise = normal(shape, x, setting.generator)
    if setting.name == "flipout":
        noise = noise * signs(_example_shape(x, example, {unit}), x, setting.generator)
    return 1 + std * noise


def _factor_of_indices(op: LinearOp, weight: CorrelatedWeight, setting: _Setting) -> Tensor:
    """1 + √α ε for every index in x, with one more axis of size 1 at the end."""
    index = op.inputs[0]
    std = weight.std
    if setting.name == "local":
        noise = normal(index.shape, std, setting.generator)
    elif op.examples is None or setting.name == "per_minibatch":
        return weight.factor(setting.generator)[index].unsqueeze(-1).to(weight.loc.dtype)
    else:
        count = index.shape[0]
        units = normal((count, len(std)) if setting.name == "per_example" else std.shape, std, setting.generator)
        if setting.name == "flipout":
            units = units * signs((count, len(std)), std, setting.generator)
        noise = units.gather(1, index.unsqueeze(-1).flatten(1)).view(index.shape)
    return (1 + std[index] * noise).unsqueeze(-1).to(weight.loc.dtype)
