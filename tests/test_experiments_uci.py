"""Regression on the UCI sets: the scores, the choice of the precision, and training splits together."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.reproduce.experiments import _uci, _uci_noise, uci
from vardrop.reproduce.results import Result


def table(splits: int = 2, rows: int = 60, offset: float = 0.0) -> _uci.Table:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(splits, rows + 20, 3, generator=generator)
    noise = 0.1 * torch.randn(splits, rows + 20, generator=generator)
    y = offset + 5 * (x[..., 0] + 0.5 * x[..., 1] + noise)
    return _uci.Table(x[:, :rows], y[:, :rows], x[:, rows:], y[:, rows:])


def test_the_density_is_that_of_a_mixture_of_gaussians() -> None:
    said, y = torch.randn(2, 7, 5).double(), torch.randn(2, 5).double()
    log_precision = torch.tensor([0.3, -1.0]).double()
    std = (-0.5 * log_precision).exp()
    for k in range(2):
        parts = torch.distributions.Normal(said[k].T, std[k])
        mixture = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(torch.ones(5, 7)), parts)
        expected = mixture.log_prob(y[k]).mean()
        torch.testing.assert_close(_uci_noise.log_density(said, y, log_precision)[k], expected)


def test_scores_are_in_the_units_of_the_data() -> None:
    said, y, std = torch.zeros(1, 3, 4), torch.full((1, 4), 0.5), torch.tensor([10.0])
    (row,) = _uci_noise.scores(said, y, std, torch.tensor([math.log(4.0)]))
    assert row["rmse"] == pytest.approx(5.0)
    assert row["precision"] == pytest.approx(0.04)  # standard deviation 5
    assert row["ll"] == pytest.approx(torch.distributions.Normal(0.0, 5.0).log_prob(torch.tensor(5.0)).item())


def test_the_best_precision_of_a_single_pass_is_one_over_the_mean_square() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randn(3, 200, generator=generator) * torch.tensor([[0.01], [1.0], [30.0]])
    found = _uci_noise.best_precision(torch.zeros(3, 1, 200), y)
    torch.testing.assert_close(found, -y.square().mean(1).log(), atol=5e-3, rtol=0)  # the optimum is flat
    passes = 0.5 * torch.randn(3, 50, 1, generator=generator).expand(3, 50, 200)
    wide = 0.5 * torch.randn(3, 200, generator=generator) + 0.1 * torch.randn(3, 200, generator=generator)
    explained = _uci_noise.best_precision(passes, wide) + wide.square().mean(1).log()
    assert (explained > 0.3).all(), "what the passes explain is not noise of the data"


def test_the_best_noise_is_the_one_that_made_the_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(2, 4000, generator=generator)
    heavy = normal / (torch.randn(4, 2, 4000, generator=generator).square().mean(0)).sqrt()  # Student's, ν = 4
    passes = torch.zeros(2, 1, 4000)
    for rows, expected in ((normal, {50.0, 1000.0}), (heavy, {4.0})):
        log_precision, degrees = _uci_noise.best_noise(passes, 3 * rows)
        assert set(degrees.tolist()) <= expected
        torch.testing.assert_close(log_precision, torch.full((2,), -math.log(9.0)), atol=0.1, rtol=0)
        fixed = _uci_noise.log_density(passes, 3 * rows, _uci_noise.best_precision(passes, 3 * rows))
        assert (_uci_noise.log_density(passes, 3 * rows, log_precision, degrees) > fixed - 1e-3).all()


def test_a_member_meets_each_of_its_rows_once_before_any_twice() -> None:
    rows = torch.tensor([[3, 4, 5, 6], [0, 2, 4, 6]])
    batches = _uci.Batches(rows, 2, torch.Generator().manual_seed(0))
    for _ in range(5):
        epoch = torch.cat([batches.next(), batches.next()], 1)
        assert torch.equal(epoch.sort(1).values, rows)


def test_training_together_is_training_apart() -> None:
    data = _uci.Standardised.of(table()).table
    network = _uci.Network(3, 6, rate=0.0)
    vd.convert_(network, vd.VariationalDropout(type="A"))
    together = vd.Ensemble(network, members=2, seed=0)
    apart = [vd.Ensemble.from_modules([member]) for member in together.members()]
    plan = _uci.Plan(20, 60, 0.01)  # batches of all rows: in any order
    every = torch.arange(60).expand(2, 60)
    splits = torch.arange(2)
    with vd.estimator("none"):
        _uci.fit(together, data, splits, [every], plan, 0)
        for k in range(2):
            _uci.fit(apart[k], data, splits[k : k + 1], [every[k : k + 1]], plan, 0)
    for k, member in enumerate(together.members()):
        for ours, theirs in zip(member.parameters(), apart[k].members()[0].parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_a_group_with_fewer_rows_has_the_objective_of_its_own_number() -> None:
    """Its loss is its own ELBO times a factor, so that a network trained alone comes out the same."""
    data = _uci.Standardised.of(table(1)).table
    network = _uci.Network(3, 4, rate=0.0)
    vd.convert_(network, vd.VariationalDropout(type="A"))
    both = vd.Ensemble(network, members=2, seed=0)
    alone = vd.Ensemble.from_modules(both.members()[1:])
    kept, zero = torch.arange(30).expand(1, 30), torch.zeros(1, dtype=torch.long)
    with vd.estimator("none"):
        groups = [torch.arange(60).expand(1, 60), kept]
        plan = _uci.Plan(15, 30, 0.01)
        _uci.fit(both, data, torch.zeros(2, dtype=torch.long), groups, plan, 0)
        _uci.fit(alone, data, zero, [kept], plan, 0)
    for ours, theirs in zip(both.members()[1].parameters(), alone.members()[0].parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-4, rtol=1e-3)


def test_the_precision_follows_the_errors_on_rows_that_are_left_out() -> None:
    data = table(2, rows=100)
    noisy = dataclasses.replace(data, y=torch.cat([data.y[:, :80] / 5, data.y[:, 80:] / 5 + 3], 1))
    kept, left = torch.arange(80).expand(2, 80), torch.arange(80, 100).expand(2, 20)
    ensemble = vd.Ensemble(_uci.Network(3, 16, rate=0.0), members=4)
    groups = [torch.arange(100).expand(2, 100), kept]
    _uci.fit(ensemble, noisy, torch.tensor([0, 1, 0, 1]), groups, _uci.Plan(300, 20, 0.02), 0, left)
    tau = ensemble.stacked.log_precision.exp()
    assert torch.equal(tau[:2], tau[2:])
    for k, member in enumerate(ensemble.members()[2:]):
        square = (member.eval()(noisy.x[k, 80:]) - noisy.y[k, 80:]).square().mean().item()
        assert square > 6  # the twin knows nothing of the step in them
        assert tau[k].item() == pytest.approx(1 / square, rel=0.15)


@pytest.mark.parametrize("method", ["learned", "searched"])
def test_a_line_is_learned_in_its_own_units(method: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        run, extra = getattr(_uci, method), {"rates": (0.005, 0.1)} if method == "searched" else {}
        rows = run(table(rows=200, offset=40.0), _uci.Plan(300, 64, 0.02), 16, 30, 0, **extra)
    assert len(rows) == 2
    for row in rows:
        assert row["rmse"] < 1.2  # noise: 0.5
        assert row["ll"] > -1.9
        assert "ll_fixed" in row or method == "searched"
        assert 0 < row["hidden_rate"] < 0.5


def test_the_network_is_the_published_one() -> None:
    network = _uci.Network(13, 50, 0.05)
    kinds = [type(layer) for layer in network.body]
    assert kinds == [vd.layers.Dropout, nn.Linear, nn.ReLU, vd.layers.Dropout, nn.Linear]
    assert network(torch.zeros(4, 13)).shape == (4,)


def test_cells_have_the_published_splits_and_sizes() -> None:
    assert len(uci.cells("cpu")) == 18
    for config in uci.cells("gpu") + uci.cells("cpu"):
        protein = config["set"] == uci.PROTEIN
        assert (config["splits"], config["hidden"]) == ((5, 100) if protein else (20, 50))


def planted(rmse: float, ll: float) -> list[Result]:
    made = []
    for cell in uci.EXPERIMENT.at("cpu"):
        published = uci.PUBLISHED[cell.config["set"]]
        rows = [
            {"table": "splits", "rmse": published.rmse * rmse + shift, "ll": published.ll + ll} for shift in (-0.1, 0.1)
        ]
        made.append(Result("uci", "cpu", cell.config, 0, {}, None, "here", 1, 1.0, rows))
    return made


def test_the_summary_counts_sets() -> None:
    rows = uci.summarise(planted(0.9, 0.2))
    boston = next(row for row in rows if row.get("set") == "bostonHousing")
    assert boston["rmse"] == pytest.approx(0.9 * 2.904)
    assert boston["rmse_error"] == pytest.approx(0.1 / 2**0.5)
    assert boston["ll_difference"] == pytest.approx(0.2)
    count = next(row for row in rows if row["table"] == "count")
    assert [count[name] for name in ("sets", "rmse_no_worse", "rmse_better", "ll_better")] == [9, 9, 9, 9]
    worse = next(row for row in uci.summarise(planted(1.5, -0.5)) if row["table"] == "count")
    assert [worse[name] for name in ("rmse_no_worse", "rmse_better", "ll_no_worse")] == [0, 0, 0]


def test_the_figure_shows_every_set() -> None:
    left, right = uci.figure(planted(0.9, 0.2), []).axes
    assert [label.get_text() for label in left.get_yticklabels()] == list(reversed(uci.PUBLISHED))
    assert "published" in right.get_xlabel()


def test_splits_of_different_sizes_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from vardrop import data

    def load(name: str, split: int) -> data.Data:
        x, y = torch.zeros(10 + split, 2), torch.zeros(10 + split)
        return data.Data(name, "regression", x, y, x[:3], y[:3])

    monkeypatch.setattr(data, "load", load)
    with pytest.raises(ValueError, match=r"splits of uci:x must have equally many rows, got \[\(10, 3\), \(11, 3\)\]"):
        _uci.read("uci:x", 2)


@pytest.mark.data
def test_the_real_sets_have_equal_splits(data_root, monkeypatch) -> None:
    monkeypatch.setenv("VARDROP_DATA", str(data_root))
    read = _uci.read("uci:yacht", 20)
    assert [tuple(part.shape) for part in dataclasses.astuple(read)] == [(20, 277, 6), (20, 277), (20, 31, 6), (20, 31)]
