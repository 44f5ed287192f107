"""Calibration: against torchmetrics and scikit-learn, by closed forms, and on data that are calibrated by design."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import brier_score_loss, log_loss
from torch import Tensor

import architectures  # noqa: F401  (makes torchvision importable, and so torchmetrics)
from vardrop.uncertainty import calibration

BINNINGS = ("width", "mass")


def drawn(n: int, classes: int = 4, scale: float = 2.0, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Probabilities, and labels that follow them: calibrated by design."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.softmax(scale * torch.randn(n, classes, generator=generator, dtype=torch.float64), -1)
    return p, torch.multinomial(p, 1, generator=generator).squeeze(1)


def torchmetrics_ece(p: Tensor, y: Tensor, bins: int, norm: str) -> float:
    torchmetrics = pytest.importorskip("torchmetrics.functional.classification")
    return torchmetrics.multiclass_calibration_error(p, y, p.shape[1], n_bins=bins, norm=norm).item()


@pytest.mark.parametrize("bins", [1, 2, 10, 15])
def test_ece_and_mce_are_those_of_torchmetrics(bins: int) -> None:
    p, y = drawn(3000)  # torchmetrics adds up in float32
    assert calibration.ece(p, y, bins) == pytest.approx(torchmetrics_ece(p, y, bins, "l1"), abs=2e-6)
    assert calibration.mce(p, y, bins) == pytest.approx(torchmetrics_ece(p, y, bins, "max"), abs=2e-6)


def test_scores_are_those_of_scikit_learn() -> None:
    p, y = drawn(500)
    assert calibration.nll(p, y) == pytest.approx(log_loss(y, p.numpy()), rel=1e-9)
    classes = [brier_score_loss(y == c, p[:, c].numpy()) for c in range(p.shape[1])]
    assert calibration.brier(p, y) == pytest.approx(sum(classes), rel=1e-9)


@pytest.mark.parametrize("binning", BINNINGS)
def test_calibrated_data_have_the_error_that_their_scatter_gives(binning: str) -> None:
    n, bins = 40_000, 10
    p, y = drawn(n)
    found = calibration.reliability(p, y, bins, binning)
    # the gap of a bin is the mean of n_b independent errors of variance p (1 - p): nearly Gaussian about 0
    confidence = p.amax(-1)
    where = torch.bucketize(confidence, found.edges[1:-1].contiguous())
    variance = torch.zeros(bins, dtype=p.dtype).index_add_(0, where, confidence * (1 - confidence)) / found.count**2
    std = variance.sqrt().nan_to_num()
    assert (found.gap.abs() <= 4.5 * std).all()
    share = found.count / n
    expected = (share * std).sum() * (2 / math.pi) ** 0.5
    spread = (share.square() * variance.nan_to_num()).sum().sqrt() * (1 - 2 / math.pi) ** 0.5
    assert found.ece == pytest.approx(expected.item(), abs=4 * spread.item())


def test_overconfidence_is_seen_as_large_as_it_is() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    p = torch.tensor([[0.9, 0.05, 0.05]]).expand(n, 3)
    y = (torch.rand(n, generator=generator) > 0.7).long()  # right in 70% of the cases
    for binning in BINNINGS:
        assert calibration.ece(p, y, binning=binning) == pytest.approx(0.2, abs=4 * (0.21 / n) ** 0.5)
        assert calibration.mce(p, y, binning=binning) == pytest.approx(calibration.ece(p, y, binning=binning), abs=1e-9)
    # 0.9 - 0.7, 0.05 - 0.3 and 0.05 - 0
    found = calibration.classwise_ece(p, y)
    assert found == pytest.approx((0.2 + 0.25 + 0.05) / 3, abs=4 * (0.21 / n) ** 0.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 10), st.integers(0, 1)), min_size=1, max_size=30),
    st.integers(1, 6), st.sampled_from(BINNINGS), st.randoms(use_true_random=False),
)  # fmt: skip
def test_neither_ties_nor_order_matter_and_the_parts_add_up(
    cases: list[tuple[int, int]], bins: int, binning: str, random: object
) -> None:
    shuffled = list(cases)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    found = []
    for some in (cases, shuffled):
        tenths, labels = (torch.tensor(column) for column in zip(*some, strict=True))
        p = torch.stack([tenths / 10, 1 - tenths / 10], -1).double()
        found.append(calibration.reliability(p, labels, bins, binning))
        parts = calibration.brier_parts(p, labels, bins, binning)
        added = parts.reliability - parts.resolution + parts.uncertainty + parts.within
        assert added == pytest.approx(parts.score, abs=1e-12)
        assert parts.score == pytest.approx(calibration.brier(p, labels), abs=1e-12)
        assert calibration.ece(p, labels, bins, binning) <= calibration.mce(p, labels, bins, binning) + 1e-12
    assert found[0].count.tolist() == found[1].count.tolist()
    assert found[0].ece == pytest.approx(found[1].ece, abs=1e-12)
    assert found[0].count.sum() == len(cases)


def test_a_bin_has_its_upper_edge() -> None:
    p = torch.tensor([[0.5, 0.5], [0.75, 0.25], [1.0, 0.0], [0.76, 0.24]], dtype=torch.float64)
    found = calibration.reliability(p, torch.zeros(4, dtype=torch.long), bins=4)
    assert found.count.tolist() == [0, 1, 1, 2]  # 0.5 in (0.25, 0.5], 1 with 0.76 in (0.75, 1]


def test_bins_of_equal_mass_have_equal_mass() -> None:
    p, y = drawn(1000)
    found = calibration.reliability(p, y, 7, "mass")
    assert set(found.count.tolist()) <= {142, 143}
    few = calibration.reliability(p[:3], y[:3], 7, "mass")
    assert few.count.sum() == 3
    assert few.count.max() == 1


def test_forecasts_in_one_place_leave_nothing_within() -> None:
    p = torch.tensor([[0.2, 0.8], [0.2, 0.8], [0.7, 0.3]], dtype=torch.float64)
    parts = calibration.brier_parts(p, torch.tensor([1, 0, 0]))
    assert parts.within == pytest.approx(0, abs=1e-15)
    assert parts.uncertainty == pytest.approx(2 * 2 / 9)
    # two of forecast 0.8 and frequency 1/2, one of 0.3 and 0; both classes alike
    assert parts.reliability == pytest.approx(2 * (2 / 3 * 0.09 + 1 / 3 * 0.09))
    assert parts.resolution == pytest.approx(2 * (2 / 3 * (1 / 2 - 1 / 3) ** 2 + 1 / 3 * (1 / 3) ** 2))


def test_an_impossible_label_costs_everything() -> None:
    assert calibration.nll(torch.tensor([[1.0, 0.0]]), torch.tensor([1])) == math.inf


def test_half_precision_is_taken_as_probabilities() -> None:
    p, y = drawn(200)
    assert calibration.ece(p.bfloat16(), y, 5) == pytest.approx(calibration.ece(p, y, 5), abs=0.05)


def test_the_plot_shows_the_bins() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    p, y = drawn(300)
    found = calibration.reliability(p, y, 5)
    bars = found.plot().patches
    assert [bar.get_height() for bar in bars] == pytest.approx(found.accuracy.nan_to_num().tolist())
    pyplot.close("all")


def test_bad_input() -> None:
    p, y = drawn(5)
    with pytest.raises(ValueError, match=r"probabilities \[N, C\] are needed, one row a case, got \(5,\)"):
        calibration.ece(p[:, 0], y)
    with pytest.raises(ValueError, match=r"probabilities must be at least 0 and sum to 1 over the last axis, got"):
        calibration.nll(p.log(), y)
    with pytest.raises(ValueError, match=r"probabilities must be at least 0 and sum to 1"):
        calibration.nll(torch.full((5, 4), math.nan), y)
    with pytest.raises(ValueError, match=r"labels must be 5 integers, one a case, got \(5,\) of torch.float32"):
        calibration.brier(p, y.float())
    with pytest.raises(ValueError, match=r"labels must be class indices from 0 to 3, got -1 to 3"):
        calibration.brier(p, torch.tensor([-1, 0, 1, 2, 3]))
    for wrong in ({"bins": 0}, {"binning": "equal"}):
        with pytest.raises(ValueError, match="at least 1 bin of equal 'width' or 'mass' is needed, got bins="):
            calibration.ece(p, y, **wrong)
