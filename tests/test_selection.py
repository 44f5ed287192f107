"""Selection against brute force over all thresholds and all orders of ties, and its guarantee against its promise."""

from __future__ import annotations

import itertools
import math
import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta
from torch import Tensor, nn

import vardrop as vd
from vardrop.uncertainty import risk

# few distinct values, so that most examples have ties
CASES = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 4)), min_size=1, max_size=6)
MANY = st.lists(st.tuples(st.integers(0, 9), st.booleans()), min_size=1, max_size=40)


def tensors(cases: list[tuple[int, float]]) -> tuple[Tensor, Tensor]:
    u, loss = zip(*cases, strict=True)
    return torch.tensor(u, dtype=torch.float64), torch.tensor(loss, dtype=torch.float64)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_the_curve_is_the_mean_over_all_orders_of_ties(cases: list[tuple[int, float]]) -> None:
    u, loss = tensors(cases)
    curves = []
    for order in itertools.permutations(range(len(u))):
        at = list(order)
        if (u[at].diff() >= 0).all():
            curves.append(loss[at].cumsum(0) / torch.arange(1, len(u) + 1))
    found = risk.risk_coverage(u, loss)
    torch.testing.assert_close(found.risk, torch.stack(curves).mean(0), rtol=1e-12, atol=1e-12)
    assert risk.aurc(u, loss) == pytest.approx(torch.stack(curves).mean().item(), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(CASES, st.randoms(use_true_random=False))
def test_the_order_of_the_cases_does_not_decide(cases: list[tuple[int, float]], random: object) -> None:
    shuffled = list(cases)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (vd.select(*tensors(some), target_error=1.0) for some in (cases, shuffled))
    assert one.aurc == pytest.approx(other.aurc, abs=1e-12)
    assert (one.threshold, one.coverage) == (other.threshold, other.coverage)


@settings(max_examples=60, deadline=None)
@given(CASES)
def test_no_order_beats_the_oracle(cases: list[tuple[int, float]]) -> None:
    u, loss = tensors(cases)
    best = min(
        (loss[list(order)].cumsum(0) / torch.arange(1, len(u) + 1)).mean().item()
        for order in itertools.permutations(range(len(u)))
    )
    assert risk.optimal_aurc(loss) == pytest.approx(best, abs=1e-12)
    assert risk.excess_aurc(u, loss) >= -1e-12
    assert risk.excess_aurc(loss, loss) == 0


@settings(max_examples=100, deadline=None)
@given(MANY, st.floats(0, 1))
def test_the_target_s_threshold_is_the_best_of_all(cases: list[tuple[int, bool]], target: float) -> None:
    u, loss = tensors(cases)
    possible = [t for t in u.unique().tolist() if loss[u <= t].mean().item() <= target * (1 + 1e-12)]
    found = vd.select(u, loss, target_error=target)
    assert found.threshold == max(possible, default=-math.inf)
    assert found.coverage == (u <= found.threshold).double().mean().item()
    assert not len(found.kept) or found.risk <= target * (1 + 1e-12)


@settings(max_examples=100, deadline=None)
@given(MANY, st.floats(0, 1))
def test_the_share_s_threshold_hands_over_the_most_of_all(cases: list[tuple[int, bool]], share: float) -> None:
    u, loss = tensors(cases)
    possible = [t for t in [-math.inf, *u.unique().tolist()] if (u > t).sum().item() <= share * len(u) + 1e-9]
    found = vd.select(u, loss, share=share)
    assert found.threshold == min(possible)
    assert len(found.to_person) <= share * len(u) + 1e-9


def test_a_random_uncertainty_has_the_area_of_the_error_rate() -> None:
    generator = torch.Generator().manual_seed(0)
    loss = (torch.rand(20_000, generator=generator) < 0.3).double()
    # the curve wanders about the mean with a variance of about 2 Var(l) / N
    error = (2 * 0.21 / 20_000) ** 0.5
    assert risk.aurc(torch.rand(20_000, generator=generator), loss) == pytest.approx(0.3, abs=4 * error)
    assert risk.aurc(torch.zeros(20_000), loss) == pytest.approx(loss.mean().item(), rel=1e-12)


def test_the_oracle_of_an_error_rate_has_its_closed_form() -> None:
    rate = 0.2  # integral of 1 - (1 - r) / c over c from 1 - r to 1
    loss = (torch.arange(50_000) < 50_000 * rate).double()
    assert risk.optimal_aurc(loss) == pytest.approx(rate + (1 - rate) * math.log(1 - rate), abs=1e-4)


@pytest.mark.parametrize(("errors", "cases"), [(0, 1), (0, 50), (3, 10), (7, 7), (120, 5000), (4990, 5000)])
@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.9999])
def test_the_bound_is_that_of_clopper_and_pearson(errors: int, cases: int, confidence: float) -> None:
    truth = 1.0 if errors == cases else beta.ppf(confidence, errors + 1, cases - errors)
    assert risk.upper_bound(errors, cases, confidence) == pytest.approx(truth, rel=1e-9)


def test_the_guarantee_is_kept_where_the_plain_threshold_breaks_its_word() -> None:
    generator = torch.Generator().manual_seed(0)
    repeats, target, confidence = 200, 0.1, 0.8
    broken = {"plain": 0, "guaranteed": 0}
    for _ in range(repeats):  # P(error | u) = u / 2, u uniform: the risk of all up to t is t / 4
        u = torch.rand(300, generator=generator, dtype=torch.float64)
        wrong = torch.rand(300, generator=generator, dtype=torch.float64) < u / 2
        chosen = vd.select(u, wrong, target_error=target)
        broken["plain"] += chosen.threshold / 4 > target
        safe = chosen.at(target_error=target, confidence=confidence)
        broken["guaranteed"] += max(safe.threshold, 0) / 4 > target
        assert safe.bound is None or safe.risk <= safe.bound <= target
    allowed = 1 - confidence
    assert broken["guaranteed"] <= repeats * allowed + 3 * (repeats * allowed * (1 - allowed)) ** 0.5
    assert broken["plain"] > repeats * 0.4


def test_too_few_cases_guarantee_nothing_and_all_go_to_a_person() -> None:
    few = vd.select(torch.arange(10.0), torch.zeros(10), target_error=0.01, confidence=0.95)
    assert few.threshold == -math.inf
    assert few.bound is None
    assert few.coverage == 0
    assert math.isnan(few.risk)
    assert few.to_person.tolist() == list(range(9, -1, -1))
    many = vd.select(torch.arange(10_000.0), torch.zeros(10_000), target_error=0.01, confidence=0.95)
    assert many.coverage == 1.0
    assert many.bound is not None
    assert many.bound <= 0.01


def test_persons_get_the_most_uncertain_first_and_new_data_the_same_threshold() -> None:
    u = torch.tensor([0.3, 0.9, 0.1, 0.7, 0.5])
    chosen = vd.select(u, torch.tensor([False, True, False, True, False]), target_error=0.0)
    assert chosen.to_person.tolist() == [1, 3]
    assert chosen.kept.tolist() == [2, 0, 4]
    new = chosen.apply(torch.tensor([0.6, 0.5, math.nan, 0.2, 0.8]))
    assert new.kept.tolist() == [3, 1]
    assert set(new.to_person.tolist()) == {0, 2, 4}


def classifier(p: Tensor) -> SimpleNamespace:
    entropy = torch.special.entr(p).sum(-1)
    return SimpleNamespace(
        kind="probabilities", class_dim=1, probabilities=p, predicted=p.argmax(-1), predictive_entropy=entropy,
        expected_entropy=entropy, mutual_information=0 * entropy, variation_ratio=1 - p.amax(-1), samples=None,
    )  # fmt: skip


def test_a_prediction_is_ranked_by_its_measures() -> None:
    p = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    prediction, labels = classifier(p), torch.tensor([0, 1, 1])
    chosen = vd.select(prediction, labels, share=0.34)
    assert chosen.by == "predictive_entropy"
    assert chosen.to_person.tolist() == [1]
    assert chosen.risk == 0
    assert vd.select(prediction, prediction.predicted != labels, share=0.34).risk == 0
    torch.testing.assert_close(vd.select(prediction, labels, by="confidence").uncertainty, 1 - p.amax(-1).double())
    assert chosen.apply(prediction).to_person.tolist() == [1]


def test_numbers_have_squared_errors() -> None:
    mean, variance = torch.tensor([[1.0], [2.0], [5.0]]), torch.tensor([[0.1], [0.2], [3.0]])
    prediction = SimpleNamespace(kind="values", mean=mean, variance=variance, std=variance.sqrt())
    chosen = vd.select(prediction, torch.tensor([1.0, 2.5, 1.0]), target_error=0.2)
    assert chosen.by == "variance"
    torch.testing.assert_close(chosen.loss, torch.tensor([0.0, 0.25, 16.0], dtype=torch.float64))
    assert chosen.to_person.tolist() == [2]
    assert chosen.risk == pytest.approx(0.125)


@pytest.mark.parametrize("by", ["predictive_entropy", "mutual_information", "variation_ratio", "confidence"])
def test_what_mc_predict_says_of_classes(by: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(40, 4)
    labels = x.argmax(-1)
    net = nn.Sequential(nn.Linear(4, 20), nn.Dropout(0.5), nn.Linear(20, 4))
    made = vd.mc_predict(net, x, samples=16, outputs="logits")
    chosen = vd.select(made, labels, by=by, share=0.25)
    wrong = made.probabilities.argmax(-1) != labels
    doubt = 1 - made.probabilities.amax(-1) if by == "confidence" else getattr(made, by)
    assert chosen.aurc == pytest.approx(risk.aurc(doubt, wrong))
    assert chosen.apply(made).to_person.tolist() == chosen.to_person.tolist()
    assert len(chosen.to_person) == (10 if by != "variation_ratio" else len(chosen.to_person))  # which has ties


def test_what_mc_predict_says_of_values_and_of_maps() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(30, 4), torch.randn(30)
    made = vd.mc_predict(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), x, samples=16)
    chosen = vd.select(made, y, share=0.5)
    torch.testing.assert_close(chosen.loss, (made.mean.squeeze(1) - y).double().square())
    assert len(chosen.to_person) == 15
    images, labels = torch.randn(6, 3, 5, 5), torch.randint(4, (6, 5, 5))
    maps = vd.mc_predict(nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(3, 4, 1)), images, samples=8, outputs="logits")
    by_map = vd.select(maps, labels, by="confidence")
    torch.testing.assert_close(by_map.loss, (maps.predicted != labels).float().mean((1, 2)).double())
    torch.testing.assert_close(by_map.uncertainty, (1 - maps.probabilities.amax(1)).mean((1, 2)).double())


def test_to_pandas_and_plot() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    chosen = vd.select(torch.tensor([0.9, 0.1, 0.4]), torch.tensor([True, False, False]), share=0.4)
    frame = chosen.to_pandas()
    assert frame["to_person"].tolist() == [True, False, False]
    assert list(frame.columns) == ["uncertainty", "loss", "to_person"]
    curve = chosen.plot().get_lines()[0]
    assert curve.get_ydata().tolist() == chosen.curve.risk.tolist()
    pyplot.close("all")
    assert repr(chosen).startswith("Selection(threshold=0.4, coverage=0.6667, risk=0, aurc=0.1111")


def test_what_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ModuleNotFoundError, match=r"Selection.to_pandas: needs pandas, got an environment without it"):
        vd.select(torch.zeros(2), torch.zeros(2)).to_pandas()


def test_bad_input() -> None:
    u, wrong = torch.rand(3), torch.tensor([True, False, False])
    with pytest.raises(ValueError, match=r"an uncertainty and a loss for every case are needed, both \[N\], got"):
        vd.select(u, wrong[:2])
    with pytest.raises(ValueError, match="every uncertainty must be a number, got nan in 1 of 3 cases"):
        vd.select(torch.tensor([0.0, math.nan, 1.0]), wrong)
    with pytest.raises(ValueError, match="one of target_error and share decides the threshold, got both"):
        vd.select(u, wrong, target_error=0.1, share=0.1)
    with pytest.raises(ValueError, match=r"confidence is that of a target_error, above 0 and below 1, got 0.9"):
        vd.select(u, wrong, confidence=0.9)
    with pytest.raises(ValueError, match=r"confidence is that of a target_error, above 0 and below 1, got 1"):
        vd.select(u, wrong, target_error=0.1, confidence=1)
    with pytest.raises(ValueError, match="share must be between 0 and 1, got 3"):
        vd.select(u, wrong, share=3)
    with pytest.raises(ValueError, match="target_error must be at least 0, got nan"):
        vd.select(u, wrong, target_error=math.nan)
    with pytest.raises(ValueError, match="a confidence needs errors that are 0 or 1, got other losses"):
        vd.select(u, torch.rand(3), target_error=0.1, confidence=0.9)
    with pytest.raises(ValueError, match="by is a measure of a Prediction, got 'variance' with a tensor"):
        vd.select(u, wrong, by="variance")
    with pytest.raises(TypeError, match=r"beside a tensor of uncertainties errors are needed, .* got torch.int64"):
        vd.select(u, torch.tensor([0, 2, 1]))
    prediction = classifier(torch.full((3, 2), 0.5))
    with pytest.raises(
        ValueError, match=r"by must be one of predictive_entropy, .*, got 'variance' for a prediction of kind 'prob"
    ):
        vd.select(prediction, torch.tensor([0, 1, 1]), by="variance")
    with pytest.raises(ValueError, match="what was selected by a tensor applies to a tensor of the same measure"):
        vd.select(u, wrong).apply(prediction)
    with pytest.raises(TypeError, match=r"integer labels belong to a prediction of classes, float targets to one of"):
        vd.select(prediction, torch.rand(3))
    with pytest.raises(
        ValueError, match="labels must be class indices from 0 to 1, got -100 to 1; leave out unlabelled"
    ):
        vd.select(prediction, torch.tensor([0, 1, -100]))
    with pytest.raises(ValueError, match=r"the truth must have the shape of what is predicted, \(3,\), got \(2,\)"):
        vd.select(prediction, torch.tensor([0, 1]))


def test_labels_must_be_a_tensor() -> None:
    with pytest.raises(TypeError, match=r"vardrop.select: labels must be a tensor, got a list; write torch.as_tensor"):
        vd.select(torch.ones(3), [True, False, True])  # type: ignore[arg-type]
