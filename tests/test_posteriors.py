"""What posteriors and estimators refuse, and with which words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.weights.posteriors import Posterior

REFUSED: list[tuple[type, dict[str, Any], str]] = [
    (vd.VariationalDropout, {"type": "C"}, r"type must be 'A' \(correlated\) or 'B' \(independent noise\), got 'C'"),
    (vd.VariationalDropout, {"sharing": "row"}, "sharing must be one of layer, neuron, weight, got 'row'"),
    (vd.VariationalDropout, {"type": "B", "unit": "row"}, "unit must be 'input' or 'output', got 'row'"),
    (
        vd.VariationalDropout,
        {"sharing": "weight"},
        "type 'A' has one random factor for every input unit.*sharing='weight'",
    ),
    (vd.VariationalDropout, {"unit": "output"}, "type 'A' has one random factor for every input unit.*unit='output'"),
    (
        vd.VariationalDropout,
        {"alpha": 0.5, "rate": 0.5},
        r"give alpha or rate, not both \(alpha = rate / \(1 - rate\)\)",
    ),
    (vd.VariationalDropout, {"alpha": 0.0}, "alpha must be positive and finite, got 0.0"),
    (vd.VariationalDropout, {"alpha": math.nan}, "alpha must be positive and finite, got nan"),
    (vd.VariationalDropout, {"alpha": math.inf}, "alpha must be positive and finite, got inf"),
    (vd.VariationalDropout, {"rate": 0.0}, "rate must be above 0 and below 1, got 0.0"),
    (vd.VariationalDropout, {"rate": 1.0}, "rate must be above 0 and below 1, got 1.0"),
    (
        vd.VariationalDropout,
        {"rate": 0.6},
        r"alpha must start at or below max_alpha=1\.0, got alpha=1\.5; raise max_alpha",
    ),
    (vd.VariationalDropout, {"alpha": 3.0}, r"alpha must start at or below max_alpha=1\.0, got alpha=3"),
    (vd.VariationalDropout, {"max_alpha": 0.0}, r"max_alpha must be positive \(math\.inf for no bound\), got 0\.0"),
    (
        vd.VariationalDropout,
        {"prior": "cubic", "max_alpha": 2.0},
        "prior='cubic' holds for alpha <= 1 and needs max_alpha <= 1",
    ),
    (
        vd.VariationalDropout,
        {"prior": "flat"},
        "prior must be one of log_uniform, cubic, sigmoid, ard, gaussian, got 'flat'",
    ),
    (vd.VariationalDropout, {"prior": "gaussian", "prior_std": 0.0}, "prior_std must be positive, got 0.0"),
    (vd.GaussianDropout, {"rate": 1.0}, "rate must be above 0 and below 1, got 1.0"),
    (vd.GaussianDropout, {"rate": -0.1}, "rate must be above 0 and below 1, got -0.1"),
    (vd.GaussianPosterior, {"std": 0.0}, "std must be positive and finite, got 0.0"),
    (vd.GaussianPosterior, {"std": math.inf}, "std must be positive and finite, got inf"),
    (vd.GaussianPosterior, {"prior": "cubic"}, "prior must be another than 'cubic', for alpha has no bound here"),
    (vd.GaussianPosterior, {"prior_std": -1.0}, "prior_std must be positive, got -1.0"),
    (vd.SparseVariationalDropout, {"log_variance": math.nan}, "log_variance must be finite, got nan"),
    (vd.SparseVariationalDropout, {"clip": 0.0}, "clip must be above 0 and at most 40, got 0.0"),
    (vd.SparseVariationalDropout, {"clip": 41.0}, "clip must be above 0 and at most 40, got 41.0"),
    (
        vd.SparseVariationalDropout,
        {"prior": "gaussian"},
        "prior must be one of log_uniform, sigmoid, ard, got 'gaussian'",
    ),
]


@pytest.mark.parametrize(
    ("config", "options", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_options_out_of_range_are_refused(config: type, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=rf"vardrop\.{config.__name__}: .*{words}"):
        config(**options)


def test_the_base_is_no_posterior() -> None:
    with pytest.raises(TypeError, match="use one of its kinds, for example"):
        Posterior()


def test_configs_are_values() -> None:
    assert vd.VariationalDropout(rate=0.1) == vd.VariationalDropout(rate=0.1)
    assert len({vd.VariationalDropout(), vd.VariationalDropout(), vd.VariationalDropout(type="B")}) == 2
    with pytest.raises(AttributeError, match="cannot assign"):
        vd.VariationalDropout().type = "B"  # type: ignore[misc]


@pytest.mark.parametrize("name", ["lokal", "", None])
def test_estimators_have_names(name: object) -> None:
    with pytest.raises(ValueError, match="name must be one of local, per_example, per_minibatch, flipout, none, got"):
        vd.estimator(name)  # type: ignore[arg-type]


def test_chunks_have_an_example() -> None:
    with pytest.raises(ValueError, match="chunk must be at least 1 example, got 0"):
        vd.estimator("per_example", chunk=0)


def test_an_embedding_that_rewrites_its_weight_cannot_have_a_random_one() -> None:
    layer = nn.Embedding(3, 2)
    vd.convert_(layer, vd.VariationalDropout())
    with pytest.raises(ValueError, match=r"with max_norm=1\.0 rewrites its weight in place and cannot have a random"):
        F.embedding(torch.tensor([0]), layer.weight, max_norm=1.0)
    layer.max_norm = 1.0
    with pytest.raises(ValueError, match="rewrites its weight in place"):
        layer(torch.tensor([0]))


def test_the_divergence_of_a_flat_gaussian_prior() -> None:
    with pytest.raises(ValueError, match=r"prior_std must be positive, got 0\.0"):
        vd.kl.gaussian(torch.zeros(1), torch.zeros(1), prior_std=0.0)
