"""Detection scores against scikit-learn and against counting every pair, with ties."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, roc_auc_score, roc_curve
from torch import Tensor

from vardrop.uncertainty import detection

SCORES = st.lists(st.integers(-3, 3), min_size=1, max_size=25).map(lambda s: torch.tensor(s, dtype=torch.float32))


def labelled(inside: Tensor, outside: Tensor) -> tuple[Tensor, Tensor]:
    return torch.cat([torch.zeros(len(inside)), torch.ones(len(outside))]), torch.cat([inside, outside])


@settings(max_examples=100, deadline=None)
@given(SCORES, SCORES)
def test_auroc_counts_pairs(inside: Tensor, outside: Tensor) -> None:
    pairs = [1.0 if o > i else 0.5 if o == i else 0.0 for i, o in itertools.product(inside, outside)]
    assert detection.auroc(inside, outside) == pytest.approx(sum(pairs) / len(pairs), abs=1e-12)
    assert detection.auroc(inside, outside) == pytest.approx(roc_auc_score(*labelled(inside, outside)), abs=1e-12)
    assert detection.auroc(inside, outside) + detection.auroc(outside, inside) == pytest.approx(1.0)
    assert detection.auroc(inside, outside) == detection.auroc(-outside, -inside)


@settings(max_examples=100, deadline=None)
@given(SCORES, SCORES)
def test_aupr_is_scikit_learn_s(inside: Tensor, outside: Tensor) -> None:
    truth, score = labelled(inside, outside)
    assert detection.aupr(inside, outside) == pytest.approx(average_precision_score(truth, score), abs=1e-12)
    found = detection.aupr(inside, outside, positive="in")
    assert found == pytest.approx(average_precision_score(1 - truth, -score), abs=1e-12)


@settings(max_examples=100, deadline=None)
@given(SCORES, SCORES, st.sampled_from([0.1, 0.5, 0.6, 0.95, 1.0]))
def test_fpr_is_the_least_of_all_thresholds(inside: Tensor, outside: Tensor, tpr: float) -> None:
    truth, score = labelled(inside, outside)
    rates = [(inside >= t).double().mean() for t in score.unique() if (outside >= t).double().mean() >= tpr - 1e-12]
    assert detection.fpr_at(inside, outside, tpr) == pytest.approx(min(rates).item(), abs=1e-12)
    false, true, _ = roc_curve(truth, score, drop_intermediate=False)
    assert detection.fpr_at(inside, outside, tpr) == pytest.approx(false[true >= tpr - 1e-12].min(), abs=1e-12)
    turned = detection.fpr_at(inside, outside, tpr, positive="in")
    assert turned == pytest.approx(detection.fpr_at(-outside, -inside, tpr), abs=1e-12)


def test_two_gaussians_have_their_closed_forms() -> None:
    generator = torch.Generator().manual_seed(0)
    n, apart = 100_000, 1.5
    inside = torch.randn(n, generator=generator)
    outside = torch.randn(n, generator=generator) + apart
    truth = torch.special.ndtr(torch.tensor(apart / 2**0.5)).item()
    error = (2 * truth * (1 - truth) / n) ** 0.5  # an upper bound of the standard error
    assert detection.auroc(inside, outside) == pytest.approx(truth, abs=4 * error)
    threshold = apart + torch.special.ndtri(torch.tensor(0.05)).item()
    rate = 1 - torch.special.ndtr(torch.tensor(threshold)).item()
    # the density at the threshold moves the rate by f_in / f_out times the error of the found share
    ratio = math.exp(-(threshold**2) / 2 + (threshold - apart) ** 2 / 2)
    error = ((rate * (1 - rate) + ratio**2 * 0.05 * 0.95) / n) ** 0.5
    assert detection.fpr_at(inside, outside) == pytest.approx(rate, abs=4 * error)


def test_what_says_nothing_scores_by_chance() -> None:
    assert detection.scores(torch.zeros(30), torch.zeros(10)) == (0.5, 1.0, 0.25, 0.75)


def prediction(p: Tensor, kind: str = "logits") -> SimpleNamespace:
    entropy = torch.special.entr(p).sum(-1)
    return SimpleNamespace(
        kind=kind, class_dim=1, probabilities=p, predictive_entropy=entropy, expected_entropy=entropy,
        mutual_information=0 * entropy, variation_ratio=1 - p.amax(-1), variance=entropy, std=entropy.sqrt(),
    )  # fmt: skip


def test_predictions_are_compared_by_every_measure() -> None:
    generator = torch.Generator().manual_seed(0)
    sure, unsure = (torch.softmax(s * torch.randn(50, 3, generator=generator), -1) for s in (3, 1))
    found = detection.compare(prediction(sure), prediction(unsure))
    entropies = [torch.special.entr(p).sum(-1) for p in (sure, unsure)]
    assert found["predictive_entropy"] == detection.scores(*entropies)
    assert found["mutual_information"].auroc == 0.5
    assert found["confidence"].auroc == roc_auc_score(*labelled(1 - sure.amax(-1), 1 - unsure.amax(-1)))
    assert set(detection.compare(prediction(sure, "values"), prediction(unsure, "values"))) == {"variance", "std"}


def test_bad_input() -> None:
    s = torch.rand(4)
    with pytest.raises(ValueError, match=r"one score for every case inside and outside is needed, .* got \(4, 1\)"):
        detection.auroc(s[:, None], s)
    with pytest.raises(ValueError, match=r"one score for every case inside and outside is needed"):
        detection.aupr(s, s[:0])
    with pytest.raises(ValueError, match="every score must be a number, got nan in 1 of the 4 outside"):
        detection.scores(s, torch.tensor([0, 1, math.nan, 2]))
    with pytest.raises(ValueError, match="tpr must be above 0 and at most 1, got 95"):
        detection.fpr_at(s, s, 95)
    with pytest.raises(ValueError, match="positive must be 'out' or 'in', got 'inside'"):
        detection.aupr(s, s, positive="inside")
    p = torch.full((4, 2), 0.5)
    with pytest.raises(ValueError, match="two predictions of the same kind are compared, got 'logits' and 'values'"):
        detection.compare(prediction(p), prediction(p, "values"))
