"""Noise for the time of a step, and time to a bound: what is measured, and who wins."""

from __future__ import annotations

import math

import pytest
import torch

import vardrop as vd
from vardrop.reproduce.experiments import convergence
from vardrop.reproduce.results import Result
from vardrop.weights.modules import noisy_weights

CONFIGS = [cell.config for cell in convergence.EXPERIMENT.at("smoke")]


def result(config, rows) -> Result:
    return Result("convergence", "cpu", config, 0, {}, None, "here", 1, 1.0, rows)


def planted() -> list[Result]:
    """Steps of a second with variances and times that are known, and runs that need known numbers of steps."""
    seconds = {"local": 2.0, "per_example": 100.0, "per_minibatch": 1.0, "flipout": 3.0}
    variance = {"local": 1.0, "per_example": 1.5, "per_minibatch": 6.0, "flipout": 2.0}
    steps = [
        {"table": "steps", "M": 32, "estimator": name, "seconds": seconds[name], "seconds_to_local": seconds[name] / 2,
         "variance_theta": variance[name], "variance_log_alpha": 2 * variance[name]}
        for name in convergence.ESTIMATORS
    ]  # fmt: skip
    needed = {
        ("local", 0.01): (10, 20), ("local", 0.1): (5, None), ("per_minibatch", 0.01): (50, 70),
        ("per_minibatch", 0.1): (20, 22), ("per_example", 0.01): (14, 14), ("flipout", 0.01): (None, None),
    }  # fmt: skip
    runs = [
        {"table": "runs", "estimator": name, "M": 32, "lr": lr, "seed": seed, "steps": count}
        for (name, lr), both in needed.items()
        for seed, count in enumerate(both)
    ]
    return [result({}, steps), result({}, runs)]


def test_noise_for_the_time_is_a_product():
    rows = {r["estimator"]: r for r in convergence.summarise(planted()) if r["table"] == "noise for the time"}
    assert rows["per_minibatch"]["variance_times_seconds_theta_to_local"] == pytest.approx(3)
    assert rows["flipout"]["variance_times_seconds_log_alpha_to_local"] == pytest.approx(3)
    assert rows["local"]["variance_times_seconds_theta_to_local"] == 1


def test_every_estimator_has_its_best_rate_at_which_every_seed_arrived():
    rows = {r["estimator"]: r for r in convergence.summarise(planted()) if r["table"] == "time to the mark"}
    assert (rows["local"]["lr"], rows["local"]["steps"], rows["local"]["seconds"]) == (0.01, 15, 30)
    assert (rows["per_minibatch"]["lr"], rows["per_minibatch"]["steps"]) == (0.1, 21)
    assert rows["per_minibatch"]["first"]
    assert not rows["local"]["first"]
    assert rows["flipout"]["seconds"] is None
    assert rows["per_example"]["seconds_to_local"] == pytest.approx(1400 / 30)


def test_the_figure_marks_the_winners():
    drawn = convergence.figure(planted(), [])
    stars = [line.get_ydata()[0] for axes in drawn.axes for line in axes.lines if line.get_marker() == "*"]
    assert stars == [2.0, 4.0, 21.0]


def test_the_bound_is_that_of_the_objective():
    torch.manual_seed(0)
    problem = convergence.Problem(CONFIGS[0])
    for _, _, log_alpha, _, _ in noisy_weights(problem.network):
        with torch.no_grad():
            log_alpha.fill_(-30.0)  # hardly any noise
    x, y = problem.validation
    with torch.no_grad():
        nll = torch.nn.functional.cross_entropy(problem.network(x), y).item()
    expected = problem.elbo(torch.tensor(nll)).item()
    assert problem.bound() == pytest.approx(expected, rel=1e-4)
    assert len(problem.x) + len(x) == 1438


def test_training_stops_at_the_first_look_past_the_mark():
    config = next(c for c in CONFIGS if c["part"] == "training" and c["estimator"] == "local")
    (never,) = convergence.run_cell({**config, "mark": -1.0})
    assert never["steps"] is None
    assert math.isfinite(never["last_bound"])
    (at_once,) = convergence.run_cell({**config, "mark": 100.0})
    assert at_once["steps"] == config["steps"] // config["looks"]


def test_variances_are_totals_over_the_entries():
    torch.manual_seed(0)
    problem = convergence.Problem(CONFIGS[0])
    batches = [problem.batch(8, torch.Generator().manual_seed(i)) for i in range(6)]
    torch.manual_seed(1)
    found = vd.gradient_variance(problem.network, convergence._nll, batches, ["local"])["local"]
    total = convergence._total(problem.network, found, "weight")
    torch.manual_seed(1)
    each = []
    weights = [p for name, p in problem.network.named_parameters() if name.endswith(".weight")]
    for batch in batches:
        gradients = torch.autograd.grad(convergence._nll(problem.network, batch), weights)
        each.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
    assert total == pytest.approx(torch.stack(each).var(0).sum().item(), rel=1e-5)


def test_steps_that_are_timed_change_nothing():
    torch.manual_seed(0)
    problem = convergence.Problem(CONFIGS[0])
    before = [p.detach().clone() for p in problem.network.parameters()]
    seconds = convergence._seconds(problem, problem.batch(8, torch.Generator().manual_seed(0)), 2)
    assert {len(pairs) for pairs in seconds.values()} == {2}
    for parameter, value in zip(problem.network.parameters(), before, strict=True):
        assert torch.equal(parameter, value)


def test_only_the_timing_has_the_machine_to_itself():
    assert [convergence.EXPERIMENT.runs_alone(config) for config in CONFIGS] == [True] + [False] * (len(CONFIGS) - 1)
