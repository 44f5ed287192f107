"""Temperature scaling and intervals: the truth is known, or found by brute force."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from vardrop.uncertainty import TemperatureScaling, calibration, intervals
from vardrop.uncertainty import temperature as temperature_file


def drawn(n: int, passes: int = 1, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Logits ``[T, N, C]`` whose mean probabilities the labels follow."""
    generator = torch.Generator().manual_seed(seed)
    z = 1.5 * torch.randn(1, n, 5, generator=generator, dtype=torch.float64)
    z = z + torch.randn(passes, n, 5, generator=generator, dtype=torch.float64)
    return z, torch.multinomial(z.softmax(-1).mean(0), 1, generator=generator).squeeze(1)


@pytest.mark.parametrize("passes", [1, 6])
@pytest.mark.parametrize("t", [0.2, 1.0, 3.0])
def test_a_temperature_that_was_put_in_is_found(passes: int, t: float) -> None:
    z, y = drawn(8000, passes)
    logits = z * t if passes > 1 else z[0] * t
    found = TemperatureScaling().fit(logits, y).temperature.item()
    # the variance of the estimate is 1 / (N I), I the bend of the nll by log T at the truth
    at = temperature_file._slope(z, y, 1.0)
    assert math.log(found / t) == pytest.approx(0, abs=4 / (8000 * at.bend) ** 0.5)


@pytest.mark.parametrize("passes", [1, 4])
def test_no_other_temperature_is_better(passes: int) -> None:
    z, y = drawn(300, passes, seed=1)
    scaling = TemperatureScaling().fit(2.7 * z, y)

    def nll(t: float) -> float:
        return calibration.nll(TemperatureScaling(t).double().probabilities(2.7 * z), y)

    best = nll(scaling.temperature.item())
    for t in torch.logspace(-2, 2, 400).tolist():
        assert nll(t) >= best - 1e-9


def test_derivatives_are_those_of_autograd() -> None:
    z, y = drawn(50, 3)
    beta = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    loss = F.nll_loss((beta * z).softmax(-1).mean(0).log(), y)
    (slope,) = torch.autograd.grad(loss, beta, create_graph=True)
    (bend,) = torch.autograd.grad(slope, beta)
    assert temperature_file._value(z, y, 0.7) == pytest.approx(loss.item(), rel=1e-12)
    assert temperature_file._slope(z, y, 0.7) == pytest.approx((slope.item(), bend.item()), rel=1e-10)


def test_scaling_calibrates_and_keeps_accuracy() -> None:
    z, y = drawn(4000)
    val, test = slice(0, 2000), slice(2000, 4000)
    z = 4 * z[0]
    scaling = TemperatureScaling().fit(z[val], y[val])
    before, after = z[test].softmax(-1), scaling.probabilities(z[test])
    assert calibration.ece(after, y[test]) < 0.25 * calibration.ece(before, y[test])
    assert torch.equal(before.argmax(-1), after.argmax(-1))


def test_it_is_saved_with_a_model() -> None:
    scaling = TemperatureScaling(2.5)
    other = TemperatureScaling()
    other.load_state_dict(scaling.state_dict())
    assert other.temperature.item() == 2.5
    assert repr(other) == "TemperatureScaling(temperature=2.5)"


def test_intervals_of_a_calibrated_regression_hold_what_they_promise() -> None:
    generator = torch.Generator().manual_seed(0)
    n = 20_000
    mean, std = torch.randn(n, generator=generator), 0.5 + torch.rand(n, generator=generator)
    y = mean + std * torch.randn(n, generator=generator)
    found = intervals.interval_calibration(intervals.gaussian_pit(mean, std, y))
    assert ((found.coverage - found.levels).abs() <= 4 * found.standard_error).all()
    narrow = intervals.interval_calibration(intervals.gaussian_pit(mean, std / 2, y), levels=(0.9,))
    truth = 2 * torch.special.ndtr(torch.special.ndtri(torch.tensor(0.95)) / 2).item() - 1
    assert narrow.coverage.item() == pytest.approx(truth, abs=4 * (truth * (1 - truth) / n) ** 0.5)
    assert narrow.error == pytest.approx(0.9 - narrow.coverage.item())


def test_a_mixture_of_passes_is_calibrated_where_a_normal_of_its_moments_is_not() -> None:
    generator = torch.Generator().manual_seed(0)
    n, noise = 20_000, 0.2
    samples = torch.tensor([[-1.0], [1.0]]).expand(2, n)
    signs = 2.0 * torch.randint(2, (n,), generator=generator) - 1
    y = signs + noise * torch.randn(n, generator=generator)
    mixed = intervals.interval_calibration(intervals.mixture_pit(samples, noise, y))
    assert ((mixed.coverage - mixed.levels).abs() <= 4 * mixed.standard_error).all()
    moments = intervals.gaussian_pit(samples.mean(0), (samples.var(0, correction=0) + noise**2).sqrt(), y)
    assert intervals.interval_calibration(moments).error > 0.1


def test_the_plot_of_intervals() -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    found = intervals.interval_calibration(torch.rand(100))
    assert found.plot().get_lines()[0].get_ydata().tolist() == found.coverage.tolist()
    pyplot.close("all")


def test_bad_input() -> None:
    z, y = drawn(6)
    with pytest.raises(ValueError, match="temperature must be above 0 and finite, got 0"):
        TemperatureScaling(0)
    with pytest.raises(ValueError, match=r"all finite, are needed, got the shape \(5,\) with 0 not finite"):
        TemperatureScaling().fit(z[0, 0], y)
    with pytest.raises(ValueError, match=r"logits \[N, C\] or \[T, N, C\], all finite"):
        TemperatureScaling().fit(torch.tensor([[0.0, -math.inf]]), torch.tensor([0]))
    right = F.one_hot(y, 5).double()
    with pytest.raises(ValueError, match=r"a finite temperature must be the best one, got a likelihood that grows tow"):
        TemperatureScaling().fit(right, y)
    with pytest.raises(ValueError, match=r"grows towards infinity on 6 cases, 100.00% of them wrong"):
        TemperatureScaling().fit(-right, y)
    s = torch.rand(4)
    with pytest.raises(ValueError, match="a prediction and a target for every case are needed, all"):
        intervals.gaussian_pit(s, s, s[:3])
    with pytest.raises(ValueError, match="every standard deviation must be above 0, got 0; add the noise"):
        intervals.gaussian_pit(s, 0 * s, s)
    with pytest.raises(ValueError, match=r"the places of targets in their distributions, \[N\] in \[0, 1\], are"):
        intervals.interval_calibration(2 * s + 1)
    with pytest.raises(ValueError, match=r"levels must be above 0 and below 1, got \(95,\)"):
        intervals.interval_calibration(s, levels=(95,))


@pytest.mark.parametrize("scale", [5e-6, 2e-3, 1500.0, 1e6])
def test_logits_may_be_of_any_size(scale: float) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2000, 5, generator=generator, dtype=torch.float64)
    labels = torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
    one = TemperatureScaling().fit(logits, labels).temperature
    torch.testing.assert_close(
        TemperatureScaling().fit(logits * scale, labels).temperature, one * scale, rtol=1e-4, atol=0
    )
