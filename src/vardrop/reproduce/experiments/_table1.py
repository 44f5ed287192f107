"""What the experiments `table1` and `table1-correlated` share: the cell, and the ways to read the paper's sentence.

"After training, we calculate the gradients for the weights of the top and bottom level of our network on the full
training set, and compare against the gradient estimates per batch of M=1000 training examples." That leaves open which
gradient is meant, what the weights are after temporal averaging, and whether the gradient on the full training set is
the expected one, one without noise, or one with noise of its own. A cell trains one network and measures what all of
these can be computed from. Two more questions have an answer on paper. The divergence has the same gradient on every
minibatch, so it changes nothing. Minibatches without replacement have (N - M) / (N - 1) of the data's share of the
variance, at most 1.7 % less.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

import vardrop as vd
from vardrop.data import Data, load
from vardrop.methods import RATES, prepare
from vardrop.models import build
from vardrop.reproduce.experiment import Config, Row
from vardrop.reproduce.experiments import _gradient_variance as measure
from vardrop.reproduce.results import Result
from vardrop.weights.modules import noisy_weights

ORDER = ("none", "local", "per_example", "per_minibatch")  # from the smallest published variance to the largest
LAYERS = ("top", "bottom")
REFERENCES = ("expected", "without noise", "with its own noise")
GRADIENTS = {"theta": "θ", "log alpha": "log α"}
Column = tuple[str, int]  # layer and epochs


def run_cell(config: Config) -> list[Row]:
    """Train one network; at every mark, the variances of both ends under every estimator, for N times the mean loss."""
    data = load(config["data"])
    device = config["device"]
    train = data.train_x.to(device), data.train_y.to(device)
    test = data.test_x.to(device), data.test_y.to(device)
    scale = len(train[0]) ** 2
    devices = [0] if device == "cuda" else []
    rows: list[Row] = []
    with torch.random.fork_rng(devices):
        torch.manual_seed(config["seed"])
        network, kl_scale, _ = prepare(config["method"], config["model"], data.shape, data.outputs, config["sharing"])
        network.to(device)
        stops = measure.train(
            network, kl_scale, train, config["marks"], config["batch"], config["average"], config["seed"]
        )
        for epochs, weights, trained in stops:
            error = measure.test_error(trained, test)
            with torch.random.fork_rng(devices):  # what is measured must not change what is trained after it
                measured = variances(unbounded(trained, config, data), train, config)
            rows += [
                {"table": "variances", "layer": layer, "gradient": gradient, "epochs": epochs, "weights": weights,
                 **{name: scale * value for name, value in found.items()}, "M": config["M"],
                 "minibatches": len(train[0]) // config["M"], "test_error": error,
                 **{name: config[name] for name in ("model", "sharing", "batch", "seed")}}
                for (layer, gradient), found in measured.items()
            ]  # fmt: skip
    return rows


def variances(model: nn.Module, train: measure.Pair, config: Config) -> dict[measure.Key, dict[str, float]]:
    """The variance under every estimator, and how far the noisy gradients' mean is from the gradient without noise."""
    size, repeats = config["M"], config["repeats"]
    generator = torch.Generator().manual_seed(config["seed"])
    none = measure.moments(model, train, "none", size, 1, generator)
    local = measure.moments(model, train, "local", size, repeats, generator)
    found = {}
    for key, (variance, mean) in local.items():
        noise = variance / (repeats * (len(train[0]) // size))  # of the mean itself
        shift = (mean - none[key][1]).square().mean().item() - noise
        found[key] = {
            "none": none[key][0], "local": variance, "squared_mean": mean.square().mean().item() - noise,
            "squared_shift": max(shift, 0.0),
        }  # fmt: skip
    if config["method"] == "vd-b":
        products = measure.products(model, train, config["together"], repeats, generator)
        for key, (same, other) in products.items():
            squared_mean = found[key]["squared_mean"]
            per_example = (same - squared_mean) / size
            covariance = (1 - 1 / size) * (other - squared_mean)
            found[key] |= {"per_example": per_example, "per_minibatch": per_example + covariance}
    else:  # type A: the local trick is a sample for every data point
        one = measure.moments(model, train, "per_minibatch", size, repeats, generator)
        for key, (variance, _) in one.items():
            found[key] |= {"per_example": found[key]["local"], "per_minibatch": variance}
    return found


def unbounded(trained: nn.Module, config: Config, data: Data) -> nn.Module:
    """A copy whose α may go beyond its bound of 1, where projection would cut gradients: those of log α, one by one."""
    model = build(config["model"], data.shape, data.outputs, RATES)
    vd.convert_(
        model, vd.VariationalDropout(config["method"][-1].upper(), sharing=config["sharing"], max_alpha=math.inf)
    )
    model.load_state_dict(trained.state_dict())
    with torch.no_grad():
        for _, _, log_alpha, _, _ in noisy_weights(model):
            log_alpha.clamp_(max=0)
    return model.to(config["device"])


def reading(row: Row, reference: str) -> dict[str, float]:
    """Estimator -> mean squared distance of a minibatch gradient from a gradient on the full training set.

    Without noise, that gradient is another one than the noisy gradients' mean, by ``squared_shift``. With noise of its
    own it varies too: a weight sample of its own per example leaves next to nothing after N examples, one weight sample
    for all N leaves the covariance of eq. 5.
    """
    found = {name: row[name] for name in ORDER}
    if reference == "without noise":
        return {name: value + (row["squared_shift"] if name != "none" else 0.0) for name, value in found.items()}
    if reference == "with its own noise":
        size, count = row["M"], row["minibatches"]
        covariance = (found["per_minibatch"] - found["per_example"]) * size / (size - 1)
        full = {"local": (found["local"] - found["none"]) / count,
                "per_example": (found["per_example"] - found["none"]) / count,
                "per_minibatch": max(covariance, 0.0) + (found["per_example"] - found["none"]) / count}  # fmt: skip
        return {name: value + full.get(name, 0.0) for name, value in found.items()}
    return found


def columns(
    results: Iterable[Result], kind: tuple[Any, ...], weights: str, gradient: str, reference: str
) -> dict[Column, list[dict[str, float]]]:
    """(Layer, epochs) -> a reading for every seed of a kind of network."""
    found: dict[Column, list[dict[str, float]]] = {}
    for result in results:
        if network_of(result.config) == kind:
            for row in result.rows:
                if (row["weights"], row["gradient"]) == (weights, gradient):
                    found.setdefault((row["layer"], row["epochs"]), []).append(reading(row, reference))
    return found


def network_of(config: Config) -> tuple[Any, ...]:
    """What the configurations of networks that differ in their seed have in common."""
    return tuple(config[key] for key in ("model", "batch"))


def mean(found: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Geometric mean over seeds: what is compared are ratios."""
    return {
        name: statistics.geometric_mean(some[name] for some in found) if min(some[name] for some in found) > 0 else 0.0
        for name in ORDER
    }


def factors(ours: Mapping[str, float], published: Mapping[str, float]) -> dict[tuple[str, str], float]:
    """For every two estimators: our ratio over the published ratio, or the other way round, at least 1.

    Without noise a rate has no gradient, and its variance of 0 no ratio.
    """
    found = {}
    for low, high in itertools.combinations([name for name in ORDER if ours[name] > 0], 2):
        off = math.log(ours[high] / ours[low]) - math.log(published[high] / published[low])
        found[low, high] = math.exp(abs(off))
    return found


def in_order(ours: Mapping[str, float]) -> int:
    """How many of the six pairs of estimators are in the published order."""
    return sum(ours[low] < ours[high] for low, high in itertools.combinations(ORDER, 2))
