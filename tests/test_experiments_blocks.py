"""The experiments on DropBlock and stochastic depth: fair networks, honest choices, right differences."""

from __future__ import annotations

import statistics

import pytest
import torch

import vardrop as vd
from vardrop.reproduce.claims import Claim
from vardrop.reproduce.experiment import Experiment
from vardrop.reproduce.experiments import _cifar, _cifar_summary, dropblock, droppath
from vardrop.reproduce.results import Result

SMOKE = {**_cifar.BASE["smoke"], "block": 3, "rate": 0.2, "seed": 0}
BOTH = (dropblock.EXPERIMENT, droppath.EXPERIMENT)
every_experiment = pytest.mark.parametrize("experiment", BOTH, ids=lambda e: e.name)


def planted(experiment: Experiment, errors) -> list[Result]:
    """Results at scale cpu whose errors are a function of method, rate and seed."""
    made = []
    for cell in experiment.at("cpu"):
        names = {key: cell.config.get(key) for key in ("method", "rate", "seed")}
        validation, test = errors(**names) if names["method"] else (0.0, 0.0)
        network = {"table": "networks", **names, "train_error": 1.0, "validation_error": validation, "test_error": test}
        curve = {"table": "curves", **names, "epoch": 4, "train_loss": 1.0, "validation_error": validation}
        rows = [network, curve] if names["method"] else []
        made.append(Result(experiment.name, "cpu", cell.config, 0, {}, None, "here", 1, 1.0, rows))
    return made


@every_experiment
def test_networks_of_a_seed_start_from_the_same_weights(experiment):
    build = {"dropblock": dropblock.build, "droppath": droppath.build}[experiment.name]
    starts = []
    for config in {cell.config["method"]: cell.config for cell in experiment.at("smoke")[:-1]}.values():
        torch.manual_seed(3)
        starts.append([p.detach().clone() for p in build(1, config).parameters()])
    assert len(starts) >= 3
    for start in starts[1:]:
        assert all(torch.equal(a, b) for a, b in zip(starts[0], start, strict=True))


@pytest.mark.parametrize(
    ("method", "layer"),
    [
        (dropblock.NONE, None),
        (dropblock.DROPOUT, vd.layers.Dropout),
        (dropblock.FIXED, vd.layers.DropBlock2d),
        (dropblock.SCHEDULED, vd.layers.DropBlock2d),
    ],
)
def test_noise_stands_behind_every_relu_of_the_last_two_groups(method, layer):
    config = {**SMOKE, "depth": 2, "method": method}
    modules = [m for m in dropblock.build(1, config).modules() if isinstance(m, torch.nn.ReLU | vd.rates.Rated)]
    kinds = [type(m) for m in modules]
    relu = torch.nn.ReLU
    first, blocks = [relu] * (1 + 2 * 2), [relu, layer] * 2 * 2 * 2
    assert kinds == first + [kind for kind in blocks if kind is not None]


def test_a_scheduled_rate_reaches_its_end_with_the_last_step_and_is_half_of_it_on_average():
    config = {**SMOKE, "method": dropblock.SCHEDULED}
    model = dropblock.build(1, config)
    scheduler = _cifar.scheduled(model)
    layer = next(m for m in model.modules() if isinstance(m, vd.layers.DropBlock2d))
    seen = [layer.p]
    for _ in range(_cifar.steps(config)):
        scheduler.step()
        seen.append(layer.p)
    assert seen[0] == 0
    assert seen[-1] == pytest.approx(0.2)
    assert statistics.mean(seen) == pytest.approx(0.1)
    assert _cifar.scheduled(dropblock.build(1, {**config, "method": dropblock.FIXED})) is None


def test_both_rules_of_stochastic_depth_drop_equally_many_blocks():
    config = {**SMOKE, "depth": 3, "rate": 0.5}
    deeper, alike = (droppath.drop_rates({**config, "method": m}) for m in (droppath.DEEPER, droppath.UNIFORM))
    assert deeper == pytest.approx([block / 9 * 0.5 for block in range(1, 10)])
    assert sum(alike) == pytest.approx(sum(deeper))
    assert len(set(alike)) == 1
    assert droppath.drop_rates({**config, "method": droppath.NONE}) is None


def test_skipping_and_dropping_afterwards_are_one_network_in_evaluation():
    models = []
    for method in (droppath.DEEPER, droppath.COMPUTED, droppath.NONE):
        torch.manual_seed(0)
        models.append(droppath.build(1, {**SMOKE, "method": method}).eval())
    x = torch.randn(2, 1, 8, 8)
    skipped, computed, plain = (model(x) for model in models)
    assert torch.allclose(skipped, plain, atol=1e-6)
    assert torch.allclose(computed, plain, atol=1e-6)


def test_training_images_differ_by_seed_and_never_meet_validation():
    a, b = (_cifar.images("digits", 128, 200, seed, "cpu") for seed in (0, 1))
    assert [len(part.train[0]) for part in (a, b)] == [128, 128]
    assert torch.equal(a.validation[1], b.validation[1])
    assert not torch.equal(a.train[1], b.train[1])
    distance = torch.cdist(a.train[0].flatten(1), a.validation[0].flatten(1))
    assert distance.min() > 0, "no two of the digits are the same"
    assert a.train[0].mean().abs() < 1e-5
    assert a.train[0].std() == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize("crop", [0, 2])
def test_augmented_images_are_windows_of_the_image_or_its_mirror_image(crop):
    x = torch.rand(64, 2, 5, 6)
    y = _cifar.augmented(x, crop, torch.Generator().manual_seed(0))
    seen = []
    for image, made in zip(x, y, strict=True):
        windows = {
            (mirrored, i, j): padded[:, i : i + 5, j : j + 6]
            for mirrored, either in enumerate((image, image.flip(2)))
            for padded in [torch.nn.functional.pad(either, [crop] * 4)]
            for i in range(2 * crop + 1)
            for j in range(2 * crop + 1)
        }
        seen += [place for place, window in windows.items() if torch.equal(window, made)]
    assert len(seen) == 64
    assert {mirrored for mirrored, _, _ in seen} == {0, 1}
    assert {i for _, i, _ in seen} == {j for _, _, j in seen} == set(range(2 * crop + 1))


def test_a_cell_run_twice_gives_the_same_rows():
    config = {**SMOKE, "train": 64, "epochs": 1, "method": dropblock.SCHEDULED}
    once, twice = ([{**row, "seconds": 0} for row in dropblock.run_cell(config)] for _ in range(2))
    assert once == twice
    other = dropblock.run_cell({**config, "seed": 1})
    assert other[-1]["train_loss"] != once[-1]["train_loss"]


def test_validation_chooses_the_rate_and_test_has_no_say():
    def errors(method, rate, seed):
        return (30 + rate, 40 - rate) if method != dropblock.NONE else (35, 45 + seed)

    rows = dropblock.summarise(planted(dropblock.EXPERIMENT, errors))
    chosen = {row["method"]: row["rate"] for row in rows if row["table"] == "rates" and row["chosen"]}
    assert chosen == {"none": 0.0, "Dropout": 0.1, "DropBlock, fixed": 0.1, "DropBlock, scheduled": 0.1}
    pair = next(row for row in rows if row["table"] == "pairs" and row["minus"] == dropblock.DROPOUT)
    assert pair["difference"] == pytest.approx(46 - 39.9)


def test_differences_are_taken_seed_by_seed():
    points = {dropblock.FIXED: (50, 60, 70), dropblock.SCHEDULED: (49, 58, 70.5)}

    def errors(method, rate, seed):
        return (30, points.get(method, (60, 60, 60))[seed])

    rows = dropblock.summarise(planted(dropblock.EXPERIMENT, errors))
    same = [row for row in rows if str(row.get("rates")).startswith("same")]
    rates = {(row["rates"], row["rate"], row["its_rate"]) for row in same}
    ends = {("same in the end", 0.1, 0.1), ("same in the end", 0.2, 0.2)}
    assert rates == {*ends, ("same on average", 0.1, 0.2)}, "a ramp from 0 is at half of its end on average"
    gaps = [1, 2, -0.5]
    for row in same:
        assert (row["method"], row["minus"]) == (dropblock.FIXED, dropblock.SCHEDULED)
        assert row["difference"] == pytest.approx(statistics.mean(gaps))
        assert row["standard_error"] == pytest.approx(statistics.stdev(gaps) / 3**0.5)
        assert (row["seeds"], row["seeds_above_0"]) == (3, 2)


def test_of_one_seed_there_is_no_spread_and_only_common_seeds_make_pairs():
    results = planted(droppath.EXPERIMENT, lambda method, rate, seed: (30, 40))[:5]  # the second seed only of "none"
    rows = droppath.summarise(results)
    none = next(row for row in rows if row["table"] == "rates")
    assert (none["seeds"], none["standard_error"]) == (2, 0.0)
    pairs = [row for row in rows if row["table"] == "pairs"]
    assert [row["seeds"] for row in pairs] == [1, 1, 1]
    assert {row["standard_error"] for row in pairs} == {None}


@every_experiment
def test_figure_shows_means_seeds_and_what_a_claim_says(experiment):
    results = planted(experiment, lambda method, rate, seed: (30 + rate, 40 + seed))
    row = next(row for row in experiment.summarise(results) if row["table"] == "pairs")
    select = {key: row[key] for key in ("table", "rates", "method", "minus")}
    said = Claim("", "P", "", "", "", "at least", {"absolute": 0}, experiment.name, select, "difference", published=1.5)
    drawn = experiment.figure(results, [said])
    *_, errors, differences = drawn.axes
    assert [41.0] in [line.get_ydata().tolist() for line in errors.lines if len(line.get_ydata()) == 1]
    assert [1.5] in [list(line.get_xdata()) for line in differences.lines]
    assert _cifar_summary.standard_error([1.0]) is None
