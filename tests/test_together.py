"""Networks trained together are the networks that are trained by themselves."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

import pytest
import torch
from torch import nn

from vardrop.methods import prepare
from vardrop.models import build
from vardrop.reproduce.experiments import _training
from vardrop.reproduce.experiments._together import fit_together
from vardrop.training.evaluation import evaluate

EPOCHS = 3


def prepared(method: str, model: str, some: _training.Parts, seed: int) -> tuple[nn.Module, float]:
    torch.manual_seed(seed)
    network, kl_scale, _ = prepare(method, model, some.data.shape, some.data.outputs)
    return network, kl_scale


def plan(epochs: int = EPOCHS, average: float = 0.9, lr: float = 5e-3) -> _training.Plan:
    return _training.Plan(epochs, 64, lr, average)


def parts(seeds: Sequence[int], data: str = "digits") -> list[_training.Parts]:
    return [_training.parts(data, 0.2, seed, "cpu") for seed in seeds]


def together(method: str, model: str, seeds: Sequence[int], how: _training.Plan, data: str = "digits") -> list[tuple]:
    some = parts(seeds, data)
    networks = [prepared(method, model, part, seed) for seed, part in zip(seeds, some, strict=True)]
    return fit_together([network for network, _ in networks], networks[0][1], some, how, seeds)


def alone(method: str, model: str, seed: int, how: _training.Plan, data: str = "digits") -> tuple:
    (some,) = parts([seed], data)
    return _training.fit(*prepared(method, model, some, seed), some, how, seed)


@pytest.mark.parametrize("model", ["mlp:2x16", "conv:0.1"])
def test_without_noise_every_network_is_the_one_that_is_trained_alone(model: str) -> None:
    seeds = [3, 0, 7]
    for (task, best, _), seed in zip(together("none", model, seeds, plan()), seeds, strict=True):
        other, wanted, _ = alone("none", model, seed, plan())
        for measure in ("error", "nll"):
            assert best[measure].epoch == wanted[measure].epoch
            assert best[measure].scores.nll == pytest.approx(wanted[measure].scores.nll, rel=1e-3)
            _training.take(task, best[measure])
            _training.take(other, wanted[measure])
            for (name, value), (same_name, expected) in zip(
                task.named_parameters(), other.named_parameters(), strict=True
            ):
                assert name == same_name
                torch.testing.assert_close(value, expected, rtol=1e-2, atol=1e-3)


def test_in_regression_every_network_learns_its_own_precision(tmp_path) -> None:
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([x, 5 * x[:, :1] + x[:, 1:2].square()], 1)
    path = tmp_path / "table.csv"
    path.write_text("a,b,c,y\n" + "\n".join(",".join(f"{value:.4f}" for value in row) for row in rows.tolist()))
    for seed, (task, best, _) in enumerate(together("none", "mlp:1x8", [0, 1], plan(), str(path))):
        other, wanted, _ = alone("none", "mlp:1x8", seed, plan(), str(path))
        assert best["nll"].scores == pytest.approx(wanted["nll"].scores, rel=1e-3)
        torch.testing.assert_close(task.likelihood.log_precision, other.likelihood.log_precision, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["binary", "vd-a2", "vd-b"])
def test_with_noise_the_statistics_are_those_of_networks_trained_alone(method: str) -> None:
    """Means over seeds of nll and rates, within four standard errors of their difference."""
    how = plan(6)
    ours = together(method, "mlp:1x32", range(8), how)
    theirs = [alone(method, "mlp:1x32", seed, how) for seed in range(5)]

    def numbers(trained: list[tuple]) -> list[list[float]]:
        rows = []
        for task, best, _ in trained:
            _training.take(task, best["nll"])
            rates = [rate for rate, _ in _training.learned_rates(task.network)] if "vd" in method else []
            rows.append([best["nll"].scores.nll, *rates])
        return [list(column) for column in zip(*rows, strict=True)]

    for one, other in zip(numbers(ours), numbers(theirs), strict=True):
        error = math.hypot(statistics.stdev(one) / len(one) ** 0.5, statistics.stdev(other) / len(other) ** 0.5)
        assert abs(statistics.mean(one) - statistics.mean(other)) < 4 * error
    assert len({best["nll"].scores.nll for _, best, _ in ours}) == 8


@pytest.mark.parametrize(("method", "differ"), [("none", False), ("binary", True), ("vd-a", True), ("vd-b", True)])
def test_noise_differs_between_networks_that_are_equal_otherwise(method: str, differ: bool) -> None:
    some = parts([0])[0]
    networks = [prepared(method, "mlp:1x8", some, 0) for _ in range(2)]
    one, other = fit_together([net for net, _ in networks], networks[0][1], [some, some], plan(1, 0.0, 1e-2), [0, 0])
    scores = [evaluate(task, task, *some.test).nll for task, _, _ in (one, other)]
    assert (abs(scores[0] - scores[1]) > 1e-3) is differ


def test_the_best_epoch_is_each_networks_own() -> None:
    """A rate of learning that is far too high goes up and down: the epochs differ, and the scores are the best's."""
    trained = together("none", "mlp:1x32", range(6), plan(8, 0.0, 0.1))
    assert len({best["error"].epoch for _, best, _ in trained}) > 1
    for (task, best, _), some in zip(trained, parts(range(6)), strict=True):
        _training.take(task, best["error"])
        assert evaluate(task, task, *some.validation).mistake == pytest.approx(best["error"].scores.mistake)


def test_models_have_no_batch_norm() -> None:
    """Its statistics are no average over steps: none of the models by name has one, and no other is taken."""
    for spec in ("mlp:2x8", "conv:0.1", "lenet-5"):
        assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in build(spec, (1, 16, 16), 3).modules())


def test_one_that_diverges_is_no_result() -> None:
    some = parts([0, 1])
    broken = some[1]._replace(train=(some[1].train[0] * math.inf, some[1].train[1]))
    networks = [prepared("none", "mlp:1x4", part, seed)[0] for seed, part in enumerate(some)]
    with pytest.raises(FloatingPointError, match="the loss of a network must stay finite, got none that was after 2"):
        fit_together(networks, 0.0, [some[0], broken], plan(2), [0, 1])
