"""What the variance of a minibatch gradient is made of: the decomposition of section 2.2, measured on any model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from vardrop.given import check_module
from vardrop.gradient import gradients, in_training
from vardrop.optional import needed
from vardrop.weights.estimators import NAMES, estimator

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


class VarianceTerm(NamedTuple):
    """The variance of the gradient of one parameter at one minibatch size, and its two parts.

    ``variance = variance_part + covariance_part``, each with a standard error: ``Var[g_i] / M`` and
    ``(M - 1) / M · Cov[g_i, g_j]``.
    """

    estimator: str
    replacement: bool
    size: int
    parameter: str
    variance: float
    variance_error: float
    variance_part: float
    covariance: float
    covariance_error: float

    @property
    def covariance_part(self) -> float:
        """What does not fall with M."""
        return self.variance - self.variance_part


@dataclass(frozen=True)
class VarianceTerms:
    """A table of :class:`VarianceTerm`, a row for every estimator, way of drawing, minibatch size and parameter.

    Args:
        rows: the table; :func:`variance_terms` makes it.

    Example:
        >>> import vardrop as vd
        >>> from vardrop.variance import VarianceTerm
        >>> row = VarianceTerm("local", True, 10, "weight", 0.2, 0.01, 0.19, 0.011, 0.013)
        >>> round(row.covariance_part, 3)
        0.01
        >>> print(vd.VarianceTerms((row,)))
        estimator      drawn         M  parameter                  variance      Var/M        Cov ±
        local          with         10  weight                          0.2       0.19      0.011 0.01
    """

    rows: tuple[VarianceTerm, ...]

    def __str__(self) -> str:
        head = f"{'estimator':14} {'drawn':8} {'M':>6}  {'parameter':24} {'variance':>10} {'Var/M':>10} {'Cov':>10} ±"
        lines = [
            f"{row.estimator:14} {'with' if row.replacement else 'without':8} {row.size:6}  {row.parameter:24} "
            f"{row.variance:10.3g} {row.variance_part:10.3g} {row.covariance:10.3g} {row.covariance_error:.1g}"
            for row in self.rows
        ]
        return "\n".join([head, *lines])

    def to_pandas(self) -> pd.DataFrame:
        """The rows as a data frame; needs pandas."""
        pandas = needed("pandas", "VarianceTerms.to_pandas")
        return pandas.DataFrame([{**row._asdict(), "covariance_part": row.covariance_part} for row in self.rows])

    def plot(self, replacement: bool = True) -> Figure:
        """Variance against M on two logarithmic axes, a panel for every parameter; needs matplotlib.

        Args:
            replacement: which way of drawing minibatches.
        """
        rows = [row for row in self.rows if row.replacement == replacement]
        parameters = list(dict.fromkeys(row.parameter for row in rows))
        names = list(dict.fromkeys(row.estimator for row in rows))
        figure = needed("matplotlib.figure", "VarianceTerms.plot").Figure
        drawn: Figure = figure(figsize=(1 + 3 * len(parameters), 3.2), layout="constrained")
        for axes, parameter in zip(drawn.subplots(1, len(parameters), squeeze=False)[0], parameters, strict=True):
            for color, name in enumerate(names):
                chosen = [row for row in rows if (row.parameter, row.estimator) == (parameter, name)]
                sizes = [row.size for row in chosen]
                errors = [2 * row.variance_error for row in chosen]
                axes.errorbar(sizes, [row.variance for row in chosen], errors, fmt="o-", color=f"C{color}", label=name)
                axes.plot(sizes, [row.variance_part for row in chosen], ":", color=f"C{color}")
            axes.set(xscale="log", yscale="log", title=parameter, xlabel="M (dotted: Var / M)")
        drawn.axes[0].set_ylabel("variance of the gradient")
        drawn.axes[0].legend(fontsize="small")
        return drawn


def variance_terms(
    model: nn.Module,
    loss_fn: Callable[[nn.Module, Any], Tensor],
    data: Sequence[Tensor],
    sizes: Sequence[int] = (10, 100, 1000),
    estimators: Sequence[str] = ("local", "per_example", "per_minibatch", "none"),
    replacement: Sequence[bool] = (True,),
    pairs: int = 20,
    singles: int = 200,
    parameters: Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> VarianceTerms:
    r"""Split the variance of the stochastic gradient into what falls with M and what does not (paper, eq. 4-5).

    .. math:: \mathrm{Var}[g] = \tfrac1M \mathrm{Var}[g_i] + \tfrac{M-1}{M} \mathrm{Cov}[g_i, g_j]

    for the gradient g of a mean over M examples, averaged over the entries of a parameter. Var[g] is measured from
    pairs of independent gradients, which give a standard error with it, Var[g_i] from minibatches of one, and Cov
    follows. With noise of their own for every example (``local``, ``per_example``) Cov is 0 for minibatches drawn with
    replacement and -Var_data / (N - 1) for those drawn without (appendix F); one weight for all (``per_minibatch``)
    makes it positive.

    The model runs in training mode and comes back as it was: mode and buffers.

    Args:
        model: a converted module.
        loss_fn: ``loss_fn(model, batch)`` -> the mean over the batch, a scalar. Scale it by N for the paper's figures.
        data: tensors ``[N, ...]`` that belong together; a batch is a tuple of their rows.
        sizes: minibatch sizes M, from 2 on.
        estimators: names that :class:`vardrop.estimator` knows.
        replacement: whether minibatches are drawn with replacement; both to compare.
        pairs: pairs of gradients for each M.
        singles: pairs of gradients of one example.
        parameters: names of the parameters to look at; None for all that need a gradient.
        generator: source of the noise and of the minibatches, on the CPU or the model's device; None for torch's.

    Returns:
        The table; it prints, and has ``to_pandas()`` and ``plot()``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for an unknown estimator or parameter, a size below 2 or, without replacement, above N, fewer than
            two pairs, tensors of different lengths, or a loss that is not a finite scalar.

    Example:
        >>> import torch, vardrop as vd
        >>> g = torch.Generator().manual_seed(0)
        >>> layer = torch.nn.Linear(5, 1)
        >>> _ = vd.convert_(layer, vd.VariationalDropout(type="B", sharing="layer", rate=0.5))
        >>> x = torch.randn(100, 5, generator=g)
        >>> mean_square = lambda net, batch: net(batch[0]).square().mean()
        >>> found = vd.variance_terms(layer, mean_square, [x], sizes=[50], parameters=["weight"], generator=g)
        >>> covariance = {row.estimator: row.covariance for row in found.rows}
        >>> covariance["per_minibatch"] > 10 * abs(covariance["local"])
        True
    """
    check_module(model, "variance_terms")
    count = _checked(data, sizes, estimators, replacement, pairs, singles)
    named = _named(model, parameters)

    def gradient(size: int, with_replacement: bool) -> list[Tensor]:
        rows = _rows(count, size, with_replacement, generator)
        batch = tuple(tensor[rows.to(tensor.device)] for tensor in data)
        grads = gradients(loss_fn(model, batch), list(named.values()), "variance_terms")
        return [torch.zeros_like(p) if g is None else g for g, p in zip(grads, named.values(), strict=True)]

    found: list[VarianceTerm] = []
    with in_training(model):
        for name in estimators:
            noise = generator if generator is not None and generator.device == _device(model) else None
            with estimator(name, generator=noise):
                single = _variances(lambda: gradient(1, True), singles)
                for drawn in replacement:
                    for size in sizes:
                        both = _variances(lambda m=size, r=drawn: gradient(m, r), pairs)  # type: ignore[misc]
                        found += [
                            _term(name, drawn, size, parameter, one, many)
                            for parameter, one, many in zip(named, single, both, strict=True)
                        ]
    return VarianceTerms(tuple(found))


def _term(
    name: str, drawn: bool, size: int, parameter: str, one: tuple[float, float], many: tuple[float, float]
) -> VarianceTerm:
    """Cov = (M Var[g] - Var[g_i]) / (M - 1), and its standard error."""
    covariance = (size * many[0] - one[0]) / (size - 1)
    error = math.hypot(size * many[1], one[1]) / (size - 1)
    return VarianceTerm(name, drawn, size, parameter, *many, one[0] / size, covariance, error)


def _variances(gradient: Callable[[], list[Tensor]], pairs: int) -> list[tuple[float, float]]:
    """Half the mean squared difference of two independent gradients, and its standard error, for every parameter."""
    halves = [
        [0.5 * (a - b).double().square().mean().item() for a, b in zip(gradient(), gradient(), strict=True)]
        for _ in range(pairs)
    ]
    table = torch.tensor(halves, dtype=torch.float64)  # [pairs, parameters]
    means, errors = table.mean(0), table.std(0) / math.sqrt(pairs)
    return list(zip(means.tolist(), errors.tolist(), strict=True))


def _rows(count: int, size: int, replacement: bool, generator: torch.Generator | None) -> Tensor:
    device = generator.device if generator is not None else "cpu"
    if replacement:
        return torch.randint(count, (size,), generator=generator, device=device)
    return torch.randperm(count, generator=generator, device=device)[:size]


def _device(model: nn.Module) -> torch.device:
    return next(model.parameters()).device


def _named(model: nn.Module, parameters: Sequence[str] | None) -> dict[str, nn.Parameter]:
    every = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    unknown = [name for name in parameters or () if name not in every]
    if unknown:
        raise ValueError(
            f"vardrop.variance_terms: parameters must be among {', '.join(every)}, got {', '.join(unknown)}"
        )
    return every if parameters is None else {name: every[name] for name in parameters}


def _checked(
    data: Sequence[Tensor],
    sizes: Sequence[int],
    estimators: Sequence[str],
    replacement: Sequence[bool],
    pairs: int,
    singles: int,
) -> int:
    """The number of examples, if all is as it should be."""
    lengths = {len(tensor) for tensor in data}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(
            "vardrop.variance_terms: data must be tensors with the same number of rows, at least one, got "
            f"{sorted(lengths) or 'none'}"
        )
    (count,) = lengths
    for name in estimators:
        if name not in NAMES:
            raise ValueError(f"vardrop.variance_terms: estimator must be one of {', '.join(NAMES)}, got {name!r}")
    if min(sizes, default=0) < 2:
        raise ValueError(f"vardrop.variance_terms: sizes must be minibatches of 2 or more, got {list(sizes)}")
    if not all(replacement) and max(sizes) > count:
        raise ValueError(
            f"vardrop.variance_terms: without replacement sizes must be at most the {count} examples there are, got "
            f"{max(sizes)}"
        )
    if min(pairs, singles) < 2:
        raise ValueError(
            f"vardrop.variance_terms: a standard error needs two pairs or more, got pairs={pairs}, singles={singles}"
        )
    return count
