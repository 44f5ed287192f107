"""Measures of uncertainty against their definitions by brute force, and the identities between them."""

from __future__ import annotations

import itertools
import math

import pytest
import scipy.integrate
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vardrop as vd
from vardrop.prediction import measures
from vardrop.prediction.measures import log_likelihood

SHAPES = st.sampled_from([((), 1), ((3,), 1), ((2, 2), 1), ((3,), -1), ((4,), 2)])  # behind N, C; where C is


def probabilities(passes: int, examples: int, classes: int, more: tuple[int, ...], dim: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    raw = 3 * torch.randn(passes, examples, *more, classes, generator=generator, dtype=torch.float64)
    return raw.softmax(-1).movedim(-1, dim + 1 if dim > 0 else dim)


def brute(samples: Tensor, dim: int) -> dict[str, Tensor]:
    """The definitions, one example and one place at a time."""
    p = samples.movedim(dim + 1 if dim > 0 else dim, -1)  # [T, ..., C]
    found = {name: torch.empty(p.shape[1:-1], dtype=p.dtype) for name in ("total", "expected", "ratio")}

    def h(row: list[float]) -> float:
        return -sum(x * math.log(x) for x in row if x > 0)

    for place in itertools.product(*map(range, p.shape[1:-1])):
        rows = p[(slice(None), *place)].tolist()
        mean = [sum(column) / len(rows) for column in zip(*rows, strict=True)]
        choices = [row.index(max(row)) for row in rows]
        found["total"][place] = h(mean)
        found["expected"][place] = sum(map(h, rows)) / len(rows)
        found["ratio"][place] = 1 - max(map(choices.count, choices)) / len(rows)
    return found


@given(st.integers(1, 6), st.integers(1, 4), st.integers(2, 5), SHAPES, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_measures_are_their_definitions(
    passes: int, examples: int, classes: int, shape: tuple[tuple[int, ...], int], seed: int
) -> None:
    more, dim = shape
    samples = probabilities(passes, examples, classes, more, dim, seed)
    truth = brute(samples, dim)
    torch.testing.assert_close(measures.predictive_entropy(samples, dim), truth["total"])
    torch.testing.assert_close(measures.expected_entropy(samples, dim), truth["expected"])
    torch.testing.assert_close(measures.variation_ratio(samples, dim).double(), truth["ratio"], atol=1e-6, rtol=0)
    information = measures.mutual_information(samples, dim)
    torch.testing.assert_close(information, truth["total"] - truth["expected"], atol=1e-12, rtol=1e-9)
    assert (information >= 0).all()
    assert (information <= math.log(min(classes, passes)) + 1e-9).all()


def test_a_probability_of_0_adds_nothing() -> None:
    samples = torch.tensor([[[1.0, 0.0, 0.0]], [[0.0, 1.0, 0.0]]])
    assert measures.expected_entropy(samples).item() == 0
    assert measures.predictive_entropy(samples).item() == pytest.approx(math.log(2))
    assert measures.mutual_information(samples).item() == pytest.approx(math.log(2))
    assert measures.variation_ratio(samples).item() == 0.5


def test_equal_passes_have_no_information_not_a_negative_one() -> None:
    samples = torch.rand(1000, 7, generator=torch.Generator().manual_seed(0)).softmax(1).expand(9, -1, -1)
    assert (measures.mutual_information(samples) >= 0).all()
    assert measures.mutual_information(samples).max() < 1e-7


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_types_are_summed_up_in_wide_ones(dtype: torch.dtype) -> None:
    samples = probabilities(200, 3, 4, (), 1, 0).to(dtype)
    exact = measures.predictive_entropy(samples.double())
    found = measures.predictive_entropy(samples)
    assert found.dtype == dtype
    assert ((found.double() - exact).abs() <= torch.finfo(dtype).eps * exact).all()


def test_logarithms_that_are_at_hand_are_used() -> None:
    logs = torch.tensor([[0.0, 12.0, -200.0], [1.0, 1.0, -torch.inf]]).log_softmax(1)  # e^-212 is 0 in float32
    exact = measures.entropy(logs.double().exp(), 1).float()
    torch.testing.assert_close(measures.entropy(logs.exp(), 1, logs), exact, rtol=1e-4, atol=1e-7)


@given(st.integers(1, 8), st.integers(1, 4), st.integers(0, 3), st.floats(0.1, 10), st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_log_likelihood_is_that_of_the_mixture(passes: int, examples: int, outputs: int, tau: float, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    shape = (examples, outputs) if outputs else (examples,)
    samples = torch.randn(passes, *shape, generator=generator, dtype=torch.float64)
    y = torch.randn(shape, generator=generator, dtype=torch.float64)
    found = measures.log_likelihood(samples, y, tau)
    normal = torch.distributions.Normal(samples, tau**-0.5)
    each = normal.log_prob(y).exp()
    each = each.prod(-1) if outputs else each
    torch.testing.assert_close(found, each.mean(0).log())


@pytest.mark.parametrize(("outputs", "degrees"), [(1, 3.0), (1, 0.7), (2, 4.0)])
def test_a_random_precision_is_integrated_out(outputs: int, degrees: float) -> None:
    """Against the Gaussian density under a Gamma prior of the precision, by quadrature."""
    samples = torch.tensor([[[0.3, -1.0]], [[0.9, 0.2]]], dtype=torch.float64)[..., :outputs]
    y, tau = torch.tensor([[1.1, 0.4]], dtype=torch.float64)[..., :outputs], 2.5

    def integrand(precision: float) -> float:
        density = measures.log_likelihood(samples, y, precision).exp().item()
        return density * scipy.stats.gamma.pdf(precision, degrees / 2, scale=2 * tau / degrees)

    expected = math.log(scipy.integrate.quad(integrand, 0, 400, points=[0.01, 1, 5, 15, 60], limit=200)[0])
    assert measures.log_likelihood(samples, y, tau, degrees).item() == pytest.approx(expected, abs=1e-6)


def test_degrees_of_every_example_and_all_but_infinite_ones() -> None:
    samples, y = torch.randn(4, 3), torch.randn(3)
    degrees = torch.tensor([1.0, 5.0, 30.0])
    found = measures.log_likelihood(samples, y, 2.0, degrees)
    for k in range(3):
        alone = measures.log_likelihood(samples[:, k : k + 1], y[k : k + 1], 2.0, degrees[k].item())
        torch.testing.assert_close(found[k : k + 1], alone)
    torch.testing.assert_close(
        measures.log_likelihood(samples, y, 2.0, 1e7), measures.log_likelihood(samples, y, 2.0), atol=1e-5, rtol=1e-5
    )


def test_log_likelihood_far_away_is_a_number() -> None:
    found = measures.log_likelihood(torch.zeros(5, 1), torch.tensor([1e4]), 100.0)
    assert found.item() == pytest.approx(-0.5 * 100 * 1e8, rel=1e-6)


def test_precision_of_every_output_and_flat_truths() -> None:
    samples, y = torch.randn(4, 3, 2), torch.randn(3, 2)
    tau = torch.tensor([1.0, 4.0])
    parts = [measures.log_likelihood(samples[:1, :, k], y[:, k], tau[k]) for k in range(2)]
    torch.testing.assert_close(measures.log_likelihood(samples[:1], y, tau), sum(parts))
    torch.testing.assert_close(
        measures.log_likelihood(samples[..., :1], y[:, 0]), measures.log_likelihood(samples[..., 0], y[:, 0])
    )


def test_log_likelihood_refuses() -> None:
    with pytest.raises(ValueError, match=r"y must have the shape of the predictions, \(3, 1\), got \(2,\)"):
        measures.log_likelihood(torch.zeros(5, 3, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="must have the shape of the predictions"):  # would broadcast to [3, 3]
        measures.log_likelihood(torch.zeros(5, 3), torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"precision must be above 0, got 0\.0; it is one over the noise's variance"):
        measures.log_likelihood(torch.zeros(5, 3), torch.zeros(3), 0.0)
    with pytest.raises(ValueError, match=r"degrees of freedom must be above 0, got -1"):
        measures.log_likelihood(torch.zeros(5, 3), torch.zeros(3), 1.0, -1)


def test_precision_and_degrees_have_a_shape_that_fits() -> None:
    torch.manual_seed(0)
    samples, y = torch.randn(7, 5, 1), torch.randn(5)
    tau, nu = torch.rand(5) + 0.5, torch.rand(5) + 1
    alone = torch.stack([log_likelihood(samples[:, i : i + 1], y[i : i + 1], tau[i], nu[i])[0] for i in range(5)])
    torch.testing.assert_close(log_likelihood(samples, y, tau, nu), alone)
    torch.testing.assert_close(log_likelihood(samples, y, tau.unsqueeze(1), nu), alone)
    with pytest.raises(ValueError, match=r"degrees of freedom must be a number or one for each of the 5 examples"):
        log_likelihood(samples, y, tau, nu.unsqueeze(1))
    with pytest.raises(ValueError, match=r"precision must be a number, one for each .* got the shape \(7,\)"):
        log_likelihood(samples, y, torch.ones(7))


def test_the_total_variance_has_the_shape_of_the_mean() -> None:
    p = vd.mc_predict(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 1)), torch.randn(7, 4), samples=7)
    for tau in (2.0, torch.full((7,), 2.0), torch.full((7, 1), 2.0), torch.full((1,), 2.0)):
        torch.testing.assert_close(p.total_variance(tau), p.variance + 0.5)
