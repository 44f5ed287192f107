"""Figure 1: a training run against naive ones, what a cell is, and what rows are boiled down to."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.methods import METHODS, prepare
from vardrop.reproduce.experiments import _figure1, _figure1_summary, _training, figure1a, figure1b
from vardrop.reproduce.results import Result
from vardrop.training import Config, loop, train
from vardrop.training.evaluation import evaluate


def digits(seed: int = 0) -> _training.Parts:
    return _training.parts("digits", 200, seed, "cpu", examples=500)


def fitted(epochs: int, method: str = "vd-a", looks: int | None = None) -> tuple:
    torch.manual_seed(0)
    network, kl_scale, _ = prepare(method, "mlp:1x12", (1, 8, 8), 10)
    return _training.fit(network, kl_scale, digits(), _training.Plan(epochs, 50, 0.02, 0.9, looks), seed=0)


# --- training ------------------------------------------------------------------------------------------------------


def test_the_epoch_is_the_one_with_the_best_validation_rows() -> None:
    alone = [fitted(epochs, looks=1)[1] for epochs in range(1, 7)]  # each looked at once, at its end
    _, best, _ = fitted(6)
    for measure, kept in best.items():
        keys = [found[measure].key for found in alone]
        assert kept.key == min(keys)
        assert kept.epoch == 1 + keys.index(min(keys))
        assert kept.scores == alone[kept.epoch - 1][measure].scores


def test_without_noise_and_average_it_is_adam() -> None:
    some = digits()
    torch.manual_seed(0)
    network, _, _ = prepare("none", "mlp:1x12", (1, 8, 8), 10)
    naive = prepare("none", "mlp:1x12", (1, 8, 8), 10)[0]
    naive.load_state_dict(network.state_dict())
    task, best, _ = _training.fit(network, 0.0, some, _training.Plan(3, 64, 0.01, 0.0, looks=1), seed=5)
    optimizer = torch.optim.Adam(naive.parameters(), lr=0.01)
    order = torch.Generator().manual_seed(5)
    for _ in range(3):
        for rows in torch.randperm(len(some.train[0]), generator=order).split(64):
            optimizer.zero_grad()
            F.cross_entropy(naive(some.train[0][rows]), some.train[1][rows]).backward()
            optimizer.step()
    _training.take(task, best["error"])
    for ours, theirs in zip(task.network.parameters(), naive.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("method", ["none", "gaussian-b", "vd-a2"])
def test_it_ends_where_the_command_line_ends(method: str, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(loop, "seed_noise", lambda seed, rank: torch.manual_seed(seed))  # the same noise
    sharing = METHODS[method].default_sharing
    config = {"data": "digits", "validation": 200, "epochs": 4, "batch": 64, "lr": 0.01, "average": 0.9,
              "device": "cpu", "method": method, "sharing": sharing, "width": 12, "seed": 3, "seeds": 1}  # fmt: skip
    (row,) = _figure1.networks(config, "mlp:3x12", "width", figure1a.LAYERS)
    options = Config(data="digits", model="mlp:3x12", method=method, epochs=4, batch_size=64, lr=0.01, average=0.9,
                     seed=3, validation=200, patience=0)  # fmt: skip
    summary = train(options, tmp_path / "run", progress=False)
    assert row["test_error"] == pytest.approx(100 * summary["test_error"], abs=0.3)  # one example
    assert row["test_nll"] == pytest.approx(summary["test_nll"], rel=1e-3)
    assert row["best_epoch"] == summary["best_epoch"]


def test_a_run_that_diverges_is_no_result() -> None:
    some = digits()
    broken = some._replace(train=(some.train[0] * math.inf, some.train[1]))
    network, _, _ = prepare("none", "mlp:1x4", (1, 8, 8), 10)
    with pytest.raises(
        FloatingPointError, match="the loss of a network must stay finite, got none that was after 2 epochs"
    ):
        _training.fit(network, 0.0, broken, _training.Plan(2, 64), 0)


def test_looks_are_spread_evenly_and_the_last_epoch_is_one() -> None:
    for epochs, looks in ((240, 60), (250, 60), (20, 60), (7, 3), (5, None)):
        plan = _training.Plan(epochs, 1, looks=looks)
        seen = [epoch for epoch in range(1, epochs + 1) if plan.is_look(epoch)]
        assert len(seen) == min(looks or epochs, epochs)
        assert seen[-1] == epochs
        assert max(b - a for a, b in zip([0, *seen], seen, strict=False)) <= -(-epochs // len(seen))


def test_rows_are_split_by_the_seed_and_test_rows_stay() -> None:
    first, again, other = digits(0), digits(0), digits(1)
    assert torch.equal(first.train[0], again.train[0])
    assert not torch.equal(first.train[0], other.train[0])
    assert torch.equal(first.test[0], other.test[0])
    assert [len(x) for x, _ in first[:3]] == [300, 200, 359]
    rows = torch.cat([first.train[0], first.validation[0]]).flatten(1)
    assert len(rows.unique(dim=0)) == 500


def test_channels_are_standardised_by_training_rows() -> None:
    some = _training.parts("digits", 200, 0, "cpu", standardise=True)
    plain = _training.parts("digits", 200, 0, "cpu")
    x = some.train[0]
    assert abs(x.mean().item()) < 1e-5
    assert x.std().item() == pytest.approx(1, abs=1e-5)
    scale, offset = plain.train[0].std(), plain.train[0].mean()
    for ours, theirs in ((some.validation, plain.validation), (some.test, plain.test)):
        torch.testing.assert_close(ours[0] * scale + offset, theirs[0])


def test_rates_are_means_of_layers() -> None:
    network = nn.Sequential(nn.Linear(8, 4), nn.ReLU(), nn.Linear(4, 2))
    vd.convert_(network, vd.VariationalDropout(type="A", rate=0.2))
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if parameter.shape == (4,) and "bias" not in name:
                parameter.copy_(torch.tensor([0.0, 0.0, 0.0, math.log(0.25)]))
    (first, bound), (second, at_bound) = _training.learned_rates(network)
    assert first == pytest.approx(0.2)
    assert bound == 0
    assert second == pytest.approx((3 * 0.5 + 0.2) / 4)
    assert at_bound == 0.75


# --- cells ---------------------------------------------------------------------------------------------------------


def test_cells_are_the_seven_methods_at_every_size() -> None:
    for experiment, size, sizes in ((figure1a, "width", [100, 340, 580]), (figure1b, "k", [0.25, 0.5, 1.0])):
        cells = experiment.cells("cpu")
        compared = [c for c in cells if _figure1.is_compared(c)]
        for at in sizes:
            here = [c for c in compared if c[size] == at]
            assert {c["method"] for c in here} == set(_figure1_summary.NAMES)
            assert len(here) == 7 * 3
    assert {c["width"] for c in figure1a.cells("gpu")} == set(figure1a.WIDTHS)
    others = [c for c in figure1a.cells("cpu") if not _figure1.is_compared(c)]
    assert {(c["method"], c["sharing"]) for c in others if "reading" not in c} == set(figure1a.ABLATION)
    assert {c["reading"] for c in others if "reading" in c} == set(_figure1.READINGS)
    for scale in ("cpu", "gpu"):
        nearest = [c["width"] for c in figure1a.cells(scale) if c.get("reading") == _figure1.ONCE_PER_RATE]
        assert len(nearest) == (9 if scale == "cpu" else 6)
        assert set(nearest) == {c["width"] for c in figure1a.cells(scale)}


def test_readings_of_the_divergence_count_what_they_say() -> None:
    def weighed(**config: str) -> float:
        torch.manual_seed(0)
        model, scale = _figure1.prepared({"method": "vd-b", "sharing": "neuron", **config}, "mlp:1x6", (4,), 3)
        return scale * vd.kl_divergence(model).item()

    def one(rate: float) -> float:  # of one random scalar
        layer = nn.Linear(1, 1)
        vd.convert_(layer, vd.VariationalDropout(type="B", rate=rate))
        return vd.kl_divergence(layer).item()

    assert weighed() == pytest.approx(6 * 4 * one(0.2) + 3 * 6 * one(0.5), rel=1e-5)
    assert weighed(reading="a third") == pytest.approx(weighed() / 3, rel=1e-5)
    assert weighed(reading="once per rate") == pytest.approx(4 * one(0.2) + 6 * one(0.5), rel=1e-5)


def test_a_cell_leaves_the_generator_and_has_a_row_for_every_seed() -> None:
    before = torch.get_rng_state()
    config = next(c for c in figure1b.cells("smoke") if c["method"] == "vd-b")
    rows = figure1b.run_cell(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert [row["seed"] for row in rows] == [0, 1]
    for row in rows:
        rates = [row[f"rate_{layer}"] for layer in figure1b.LAYERS]
        assert rates[0] == pytest.approx(0.2, abs=0.1)
        assert all(0.3 < rate <= 0.5 for rate in rates[2:])
        assert 0 <= row["test_error"] <= 100


def test_the_error_of_a_row_is_that_of_the_chosen_epoch() -> None:
    task, best, _ = fitted(4)
    some = digits()
    for measure, kept in best.items():
        _training.take(task, kept)
        assert evaluate(task, task, *some.validation) == pytest.approx(kept.scores), measure


# --- summary -------------------------------------------------------------------------------------------------------

ERRORS = {  # method -> test errors at widths 100, 340, 580
    "none": (2.0, 1.6, 1.5), "binary": (3.0, 1.8, 1.5), "gaussian-a": (3.0, 1.8, 1.4), "gaussian-b": (2.0, 1.6, 1.4),
    "vd-a": (2.0, 1.5, 1.3), "vd-a2": (1.9, 1.4, 1.2), "vd-b": (2.1, 1.6, 1.4),
    "vd-b once per rate": (1.8, 1.5, 1.4),
}  # fmt: skip
SPREAD = 0.06


def planted() -> list[Result]:
    made = []
    for cell in figure1a.EXPERIMENT.at("cpu"):
        config = cell.config
        at = figure1a.WIDTHS.index(config["width"])
        nearest = config.get("reading") == _figure1.ONCE_PER_RATE
        method = _figure1_summary.ONCE if nearest else config["method"]
        error = ERRORS[method][at] + SPREAD * (config["seed"] - 1)
        row = {"table": "networks", **{k: config[k] for k in ("method", "sharing", "width", "seed")}}
        row |= dict.fromkeys(("test_nll", "validation_error", "train_error", "best_epoch"), 1.0)
        row["test_error"] = error if nearest or _figure1.is_compared(config) else 50.0
        if config["width"] == 340:  # the first results have no such column
            row["reading"] = config.get("reading")
        elif "reading" in config:
            row["reading"] = config["reading"]
        for i, layer in enumerate(figure1a.LAYERS):
            row[f"rate_{layer}"] = 0.1 * (i + at) if config["sharing"] else None
            row[f"at_bound_{layer}"] = 0.0 if config["sharing"] else None
        made.append(Result("figure1a", "cpu", config, config["seed"], {}, None, "here", 1, 1.0, [row]))
    return made


def test_answers_are_those_of_the_planted_errors() -> None:
    rows = _figure1_summary.summarise(planted(), "width")
    answers = {row["question"]: row["value"] for row in rows if row["table"] == "answers"}
    error = SPREAD * (2 / 3) ** 0.5  # every method has the same spread
    assert answers["vd-a less gaussian-a: largest excess"] == pytest.approx(-0.1 / error)
    assert answers["vd-b less gaussian-b: largest excess"] == pytest.approx(0.1 / error)
    assert answers["vd-a or vd-b less binary: largest excess"] == pytest.approx(-0.1 / error)
    gap = "gaussian-a less vd-a: gap at the smallest size less the largest of others"
    assert answers[gap] == pytest.approx((1.0 - 0.3) / (2**0.5 * error))
    gap = "gaussian-b less vd-b: gap at the smallest size less the largest of others"
    assert answers[gap] == pytest.approx(-0.1 / (2**0.5 * error))
    assert answers["vd-b once per rate less gaussian-b: largest excess"] == pytest.approx(0.0)
    gap = "gaussian-b less vd-b once per rate: gap at the smallest size less the largest of others"
    assert answers[gap] == pytest.approx((0.2 - 0.1) / (2**0.5 * error))
    rise = "vd-a: mean hidden rate at the largest size less that at the smallest"
    assert answers[rise] == pytest.approx(0.2)
    assert answers["vd-a2 less the best other dropout: largest excess"] == pytest.approx(-0.1 / error)
    means = [row for row in rows if row["table"] == "means"]
    assert len(means) == 3 * 8 + 5
    assert all(row["sd"] == pytest.approx(SPREAD) for row in means if row["test_error"] < 50)


def test_a_size_with_one_seed_has_no_standard_error_and_is_not_judged() -> None:
    some = [result for result in planted() if result.config["width"] < 580 or result.config["seed"] == 0]
    rows = _figure1_summary.summarise(some, "width")
    answers = {row["question"]: row["value"] for row in rows if row["table"] == "answers"}
    assert answers["vd-a2 less the best other dropout: largest excess"] == pytest.approx(
        -0.1 / (SPREAD * (2 / 3) ** 0.5)
    )
    gap = "gaussian-a less vd-a: gap at the smallest size less the largest of others"
    assert answers[gap] == pytest.approx((1.0 - 0.3) / (2**0.5 * SPREAD * (2 / 3) ** 0.5))
    wide = [row for row in rows if row["table"] == "learned less fixed" and row["width"] == 580]
    assert wide
    assert {row["standard_error"] for row in wide} == {None}


def test_seeds_in_one_cell_are_seeds_too() -> None:
    apart = planted()
    together = [Result("figure1a", "cpu", {}, 0, {}, None, "here", 1, 1.0, [row for r in apart for row in r.rows])]
    assert _figure1_summary.summarise(together, "width") == _figure1_summary.summarise(apart, "width")


def test_a_few_finished_cells_can_be_read() -> None:
    few = planted()[:2]
    answers = [row["value"] for row in _figure1_summary.summarise(few, "width") if row["table"] == "answers"]
    assert set(answers) == {None}
    assert len(figure1a.figure(few, []).axes) == 2


def test_the_figure_has_the_lines_of_the_paper() -> None:
    left, right = figure1a.figure(planted(), []).axes
    *lines, ours = [text.get_text() for text in left.get_legend().get_texts()]
    assert lines == list(_figure1_summary.NAMES.values())
    assert ours.startswith("not in the paper")
    assert left.get_xlabel() == "hidden units per layer"
    line = next(c for c in left.containers if c.get_label() == "Variational dropout A2").lines[0]
    assert line.get_ydata() == pytest.approx(ERRORS["vd-a2"])
    assert right.lines[0].get_ydata() == pytest.approx([0.2, 0.3, 0.4])
