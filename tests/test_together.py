"""Networks trained together are the networks that are trained by themselves."""

from __future__ import annotations

import dataclasses
import math
import statistics

import pytest
import torch
from torch import nn

from vardrop.data import Data, load
from vardrop.models import build
from vardrop.reproduce.together import train_together
from vardrop.training import Config, train

EPOCHS, BATCH, LR = 3, 64, 5e-3


def alone(tmp_path, method: str, model: str, data: str, seed: int, epochs: int = EPOCHS, **changes) -> dict:
    """The summary of a run of `vardrop train`."""
    config = Config(
        data=data, model=model, method=method, epochs=epochs, batch_size=BATCH, lr=LR, seed=seed, patience=0, **changes
    )
    return train(config, tmp_path / f"{method}-{seed}", progress=False)


@pytest.mark.parametrize("model", ["mlp:2x16", "conv:0.1"])
def test_without_noise_every_network_is_the_one_that_is_trained_alone(tmp_path, model):
    seeds = [3, 0, 7]
    together = train_together("none", model, load("digits"), seeds, EPOCHS, BATCH, LR)
    for row, seed in zip(together, seeds, strict=True):
        single = alone(tmp_path, "none", model, "digits", seed)
        assert (row["seed"], row["best_epoch"], row["rates"]) == (seed, single["best_epoch"], {})
        assert row["test_nll"] == pytest.approx(single["test_nll"], rel=1e-3)
        assert row["test_error"] == pytest.approx(single["test_error"], abs=1.01 / 359), (
            "at most one example on the edge"
        )
    assert len({row["test_nll"] for row in together}) == 3


def test_in_regression_every_network_learns_its_own_precision(tmp_path):
    x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0))
    rows = torch.cat([x, 5 * x[:, :1] + x[:, 1:2].square()], 1)
    path = tmp_path / "table.csv"
    path.write_text("a,b,c,y\n" + "\n".join(",".join(f"{value:.4f}" for value in row) for row in rows.tolist()))
    for row in train_together("none", "mlp:1x8", load(str(path)), [0, 1], EPOCHS, BATCH, LR, average=0.9):
        single = alone(tmp_path, "none", "mlp:1x8", str(path), row["seed"], average=0.9)
        assert row["test_rmse"] == pytest.approx(single["test_rmse"], rel=1e-3)
        assert row["test_nll"] == pytest.approx(single["test_nll"], rel=1e-3)
        assert row["best_epoch"] == single["best_epoch"]


@pytest.mark.parametrize("method", ["binary", "vd-a2", "vd-b"])
def test_with_noise_the_statistics_are_those_of_networks_trained_alone(tmp_path, method):
    """Means over seeds of nll and rates, within four standard errors of their difference."""
    seeds, epochs = range(8), 6
    together = train_together(method, "mlp:1x32", load("digits"), seeds, epochs, BATCH, LR, average=0.9)
    apart = [alone(tmp_path, method, "mlp:1x32", "digits", seed, epochs, average=0.9) for seed in seeds[:5]]
    rates = [{name: rate["mean"] for name, rate in row["rates"].items()} for row in apart]
    pairs = {"nll": ([row["test_nll"] for row in together], [row["test_nll"] for row in apart])}
    pairs |= {n: ([row["rates"][n] for row in together], [row[n] for row in rates]) for n in together[0]["rates"]}
    for name, (ours, theirs) in pairs.items():
        error = math.hypot(statistics.stdev(ours) / len(ours) ** 0.5, statistics.stdev(theirs) / len(theirs) ** 0.5)
        assert abs(statistics.mean(ours) - statistics.mean(theirs)) < 4 * error, name
    assert len({row["test_nll"] for row in together}) == len(seeds)
    assert max(row["test_error"] for row in together) < 0.25


def test_noise_differs_between_networks_that_are_equal_otherwise(monkeypatch):
    """Rows, order and first weights the same for all: without noise so are the networks, with noise they are not."""
    manual_seed = torch.manual_seed
    monkeypatch.setattr(torch, "manual_seed", lambda seed: manual_seed(0))
    monkeypatch.setattr("vardrop.reproduce.together.split_validation", lambda data, size, seed: split(data, size, 0))
    monkeypatch.setattr(torch, "randperm", lambda n, generator: torch.arange(n))
    from vardrop.data import split_validation as split

    data = load("digits")
    for method, differ in (("none", False), ("binary", True), ("vd-a", True), ("vd-b", True)):
        one, other = train_together(method, "mlp:1x8", data, [0, 1], 1, BATCH, 1e-2, average=0.0)
        assert (abs(one["test_nll"] - other["test_nll"]) > 1e-3) is differ, method


def test_the_best_epoch_is_each_networks_own():
    """A rate of learning that is far too high goes up and down: the epochs differ, and the scores are the best's."""
    rows = train_together("none", "mlp:1x32", load("digits"), range(6), 8, BATCH, 0.1, average=0.0)
    assert len({row["best_epoch"] for row in rows}) > 1
    assert all(row["val_error"] < 0.5 for row in rows)


def test_a_warm_up_keeps_no_epoch_before_its_end_for_the_best():
    (row,) = train_together("sparse-vd", "mlp:1x8", load("digits"), [0], 2, 256, LR)  # warms up for 30 epochs
    assert row["best_epoch"] == 2
    assert row["val_nll"] == math.inf


def test_generators_stay_where_they_are():
    before = torch.get_rng_state()
    train_together("vd-a", "mlp:1x8", load("digits"), [0, 1], 1)
    assert torch.equal(torch.get_rng_state(), before)


def test_models_have_no_batch_norm():
    """Its statistics are no average over steps: none of the models by name has one, and no other is taken."""
    for spec in ("mlp:2x8", "conv:0.1", "lenet-5"):
        assert not any(isinstance(m, nn.modules.batchnorm._NormBase) for m in build(spec, (1, 16, 16), 3).modules())
    with pytest.raises(ValueError, match="a model must be mlp:3x400"):
        train_together("none", "resnet", load("digits"), [0], 1)


def test_what_cannot_be_trained_is_refused():
    data = load("digits")
    for seeds in ([], [1, 1]):
        with pytest.raises(ValueError, match="seeds must be one or more, and all different, got"):
            train_together("none", "mlp:1x8", data, seeds, 1)
    with pytest.raises(ValueError, match="epochs and batch_size must be 1 or more, got 0 and 128"):
        train_together("none", "mlp:1x8", data, [0], 0)
    broken: Data = dataclasses.replace(data, train_x=data.train_x * float("nan"))
    with pytest.raises(FloatingPointError, match="the loss must stay finite, got another in epoch 1 with seed 4"):
        train_together("none", "mlp:1x8", broken, [4], 1)
