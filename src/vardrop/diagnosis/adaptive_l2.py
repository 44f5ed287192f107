"""Dropout as an L2 penalty of every feature's own strength, on the last linear layer of any model."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from vardrop.diagnosis.passes import Passes, hooked
from vardrop.diagnosis.tracing import Trace, tracing
from vardrop.layers.base import Drop
from vardrop.prediction.stochastic import stochastic
from vardrop.roles import rate_attribute

Kind = Literal["auto", "multinomial", "logistic", "linear", "poisson"]
_BY = "effective_l2"
_PASSED = {"Flatten", "Identity", "flatten", "reshape", "view", "ReLU", "relu", "relu_", "LeakyReLU", "contiguous"}


def effective_l2(
    model: nn.Module,
    loader: Any,
    *,
    p: float | None = None,
    family: Kind = "auto",
    max_batches: int = 16,
) -> Tensor:
    r"""The L2 penalty that dropout is to the last linear layer, for every weight (Wager, Wang, Liang 2013).

    To second order, dropout of rate p in front of a layer with weights β is the penalty, as a mean over examples,

    .. math:: R(\beta) \approx \tfrac12 \sum_{c, j} \lambda_{cj} \beta_{cj}^2, \quad
              \lambda_{cj} = \frac{p}{1 - p} \cdot \frac1N \sum_i A''_{ic}\, x_{ij}^2

    :math:`\lambda` is p / (1 − p) times the diagonal of the Fisher information of one example. The scale is that of a
    loss which is a mean over examples, and of a ``weight_decay``; for a loss that is a sum, multiply by N. Features
    that are rare, or whose examples the model is sure of, are penalised little: that is the automatic choice of
    features. For several classes the Fisher information has entries between classes as well, which a diagonal leaves
    out.

    Args:
        model: any module that has a ``nn.Linear``; the last one that runs is looked at, and its inputs are taken with
            the noise off.
        loader: batches as in :func:`vardrop.diagnose`; labels are not looked at.
        p: the rate of dropping; None for that of the dropout in front of the layer.
        family: what the outputs are: ``"multinomial"`` (softmax), ``"logistic"`` (of each output by itself),
            ``"linear"`` (regression with variance 1), ``"poisson"``. ``"auto"`` is multinomial for several outputs and
            logistic for one.
        max_batches: how many are used.

    Returns:
        :math:`\lambda`, ``[outputs, features]``.

    Raises:
        ValueError: if no linear layer runs, no dropout is in front of it and p is not given, p is no rate below 1, or
            the family is unknown.

    Example:
        >>> import torch, vardrop as vd
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 1))
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 2.0]])
        >>> vd.effective_l2(net, x, family="linear")  # p / (1 - p) · mean of the squares
        tensor([[1., 2.]])
    """
    if family not in get_args(Kind):
        raise ValueError(f"vardrop.{_BY}: family must be one of {', '.join(get_args(Kind))}, got {family!r}")
    if p is not None and not 0 <= p < 1:
        raise ValueError(f"vardrop.{_BY}: p must be a rate in [0, 1), got {p!r}")
    passes = Passes(model, loader, max_batches, None, _BY)
    with passes.borrowed():
        passes.checked()
        with stochastic(model) as noise, tracing(model) as trace:
            passes.run(0)
        layer = _last_linear(trace)
        if layer is None:
            raise ValueError(f"vardrop.{_BY}: some nn.Linear must run in the model, got {type(model).__name__}, none")
        rate = p if p is not None else _rate_before(trace, layer, {s.name: s.kind for s in noise.sources})
        if rate is None or not 0 <= rate < 1:
            raise ValueError(
                f"vardrop.{_BY}: a dropout with a rate below 1 must be in front of the last linear layer, got "
                f"{'none' if rate is None else rate}; say which rate to take: p=0.5"
            )
        total, count = torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64), 0
        for index in range(len(passes.batches)):
            kept: list[Tensor] = []
            with hooked({layer: lambda module, x, kept=kept: kept.append(x.detach())}):  # type: ignore[misc]
                passes.run(index)
            for x in kept:
                rows = x.reshape(-1, layer.in_features)
                outputs = torch.nn.functional.linear(rows, layer.weight, layer.bias)
                curvature = _curvature(outputs.cpu().double(), family)
                total += curvature.T @ rows.cpu().double().square()
                count += len(rows)
    return (rate / (1 - rate) * total / max(count, 1)).to(layer.weight)


def _curvature(eta: Tensor, family: Kind) -> Tensor:
    """A'' of every output, ``[rows, outputs]``."""
    if family == "linear":
        return torch.ones_like(eta)
    if family == "poisson":
        return eta.exp()
    several = family == "multinomial" or (family == "auto" and eta.shape[1] > 1)
    probabilities = eta.softmax(-1) if several else eta.sigmoid()
    return probabilities * (1 - probabilities)


def _last_linear(trace: Trace) -> nn.Linear | None:
    """The linear layer that ran last."""
    found = [node.module for node in trace.nodes if isinstance(node.module, nn.Linear)]
    return found[-1] if found else None


def _rate_before(trace: Trace, layer: nn.Linear, sources: dict[str, str]) -> float | None:
    """The rate of the dropout in front of a layer, with nothing in between that would mix features."""
    node = trace.nodes[trace.calls[layer][-1]]
    while len(node.parents) == 1:
        node = trace.nodes[node.parents[0]]
        if node.rate:
            return node.rate
        if isinstance(node.module, _DropoutNd | Drop):
            attribute = rate_attribute(node.module)
            return None if attribute is None else float(getattr(node.module, attribute))
        if node.name not in _PASSED:
            return None
    return None
