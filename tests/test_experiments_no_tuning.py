"""One untuned run against a grid: what is chosen by what, and what is counted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from vardrop.data import Data
from vardrop.reproduce.experiments import _training, no_tuning
from vardrop.reproduce.results import Result


def line(rows: int = 240) -> Data:
    """A quantity that is a line and noise of standard deviation 0.5, in units of its own."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, generator=generator)
    y = 40 + 5 * x[:, 0] + 0.5 * torch.randn(rows, generator=generator)
    return Data("line", "regression", x[40:], y[40:], x[:40], y[:40])


def test_cells_are_nine_sets_with_nine_rates() -> None:
    cells = no_tuning.cells("cpu")
    assert len({c["set"] for c in cells}) == 9
    equal, longer = cells[:27], cells[27:]
    assert all(len(c["grid"]) == 9 for c in equal)
    for once, more in zip(equal, longer, strict=True):
        assert more == {**once, "grid": [], "epochs": no_tuning.TIMES * once["epochs"]}
    assert max(c["seed"] for c in cells) == 2


@pytest.mark.data
def test_every_set_takes_3000_to_4000_steps(data_root, monkeypatch) -> None:
    monkeypatch.setenv("VARDROP_DATA", str(data_root))
    for config in no_tuning.cells("cpu"):
        if config["seed"] == 0 and config["grid"]:
            some = _training.parts(config["data"], config["validation"], 0, "cpu", config["examples"])
            steps = config["epochs"] * -(-len(some.train[0]) // config["batch"])
            assert 2900 <= steps <= 4000, (config["set"], steps)


def test_a_cell_has_a_row_for_every_rate_and_learned_ones_for_none() -> None:
    before = torch.get_rng_state()
    config = no_tuning.cells("smoke")[0]
    rows = no_tuning.run_cell(config)
    assert torch.equal(torch.get_rng_state(), before)
    assert [(row["method"], row["rate"]) for row in rows] == [
        ("fixed", 0.0), ("fixed", 0.3), ("vd-a2", None), ("vd-a", None), ("vd-b", None)
    ]  # fmt: skip
    for row in rows:
        assert (row["hidden_rate"] is None) == (row["method"] == "fixed")
        assert 1 <= row["best_epoch_error"] <= config["epochs"]
    (longer,) = no_tuning.run_cell({**config, "grid": []})
    assert (longer["method"], longer["test_error"]) == (no_tuning.LONGER, rows[2]["test_error"])


def test_fixed_rates_are_those_of_hidden_units_and_less_at_the_input(monkeypatch) -> None:
    rates: list[list[float]] = []

    def tested(network: nn.Module, kl_scale: float, *_: Any) -> dict[str, float]:
        if not kl_scale:
            rates.append([m.p for m in network.modules() if isinstance(m, nn.Dropout)])
        return {}

    monkeypatch.setattr(no_tuning, "_tested", tested)
    no_tuning.run_cell({**no_tuning.cells("smoke")[0], "model": "mlp:2x4", "grid": [0.0, 0.5]})
    assert rates == [[], [0.2, 0.5, 0.5]]


def test_a_line_is_learned_in_its_own_units(monkeypatch) -> None:
    monkeypatch.setattr(_training, "load", lambda name, split: line())
    config = {**no_tuning.SETS["UCI yacht"], "set": "line", "data": f"line {id(line)}", "examples": None, "seed": 0,
              "grid": [0.0], "epochs": 60, "looks": 20, "average": 0.9, "device": "cpu"}  # fmt: skip
    rows = no_tuning.run_cell(config)
    assert {row["unit"] for row in rows} == {"RMSE"}
    for row in rows[:3]:  # fixed at 0, A2 and A
        assert 0.35 < row["test_error"] < 1.5  # the noise of the data is 0.5
        assert row["test_nll"] < 2.5
        assert row["validation_error"] < 1.5


def runs(
    seed: int,
    learned: float,
    fixed: dict[float, tuple[float, float]],
    name: str = "digits",
    methods: tuple[str, ...] = ("vd-a2", "vd-a", "vd-b"),
) -> Result:
    """Rows of one seed; fixed is rate -> (validation error, test error), and nll is a tenth."""

    def row(method: str, rate: float | None, validation: float, test: float) -> dict[str, Any]:
        return {"table": "runs", "set": name, "seed": seed, "unit": "%", "method": method, "rate": rate,
                "validation_error": validation, "test_error": test, "validation_nll": validation / 10,
                "test_nll": test / 10, "hidden_rate": None if method == "fixed" else 0.3}  # fmt: skip

    rows = [row("fixed", rate, *errors) for rate, errors in fixed.items()]
    rows += [row(method, None, 1.0, learned) for method in methods]
    return Result("no-tuning", "cpu", {"set": name, "seed": seed}, seed, {}, None, "here", 1, 1.0, rows)


def test_the_rate_is_chosen_on_validation_and_never_on_test() -> None:
    grid = {0.0: (5.0, 5.0), 0.2: (3.0, 4.0), 0.5: (4.0, 1.0)}
    found = [runs(seed, 4.0 + 0.1 * seed, grid) for seed in range(3)]
    error, nll, *_ = no_tuning.summarise(found)
    assert error["best_of_the_grid"] == 4.0
    assert error["chosen_rates"] == "0.2, 0.2, 0.2"
    assert error["difference"] == pytest.approx(0.1)
    assert error["standard_error"] == pytest.approx(0.1 / 3**0.5)
    assert error["verdict"] == "worse"
    assert error["no_dropout"] == 5.0
    assert (nll["table"], nll["unit"]) == ("nll", "nats")
    assert nll["difference"] == pytest.approx(0.01)


def test_longer_runs_are_held_to_the_grid_of_the_others() -> None:
    grid = {0.0: (5.0, 5.0), 0.2: (3.0, 4.0)}
    found = [runs(seed, 9.0, grid) for seed in range(3)]
    assert [row["sets"] for row in no_tuning.summarise(found)[-2:]] == [0, 0]
    found += [runs(seed, 3.0 + 0.1 * seed, {}, methods=(no_tuning.LONGER,)) for seed in range(3)]
    rows = {row["table"]: row for row in no_tuning.summarise(found)[:4]}
    assert rows["error"]["difference"] == pytest.approx(5.0)
    assert rows["error, 3 times the steps"]["difference"] == pytest.approx(-0.9)
    assert rows["error, 3 times the steps"]["verdict"] == "better"
    assert rows["nll, 3 times the steps"]["difference"] == pytest.approx(-0.09)


def test_of_equal_rates_the_smaller_is_chosen() -> None:
    equal = runs(0, 1.0, {0.5: (3.0, 1.0), 0.1: (3.0, 2.0)})
    assert no_tuning.chosen(equal.rows, "error")["rate"] == 0.1


def test_differences_are_of_pairs_and_sets_are_counted() -> None:
    made = []
    for seed, level in enumerate((1.0, 5.0, 9.0)):  # splits differ, sides do not
        wobble = 0.1 * (seed - 1)
        made.append(runs(seed, level - 1 + wobble, {0.0: (2.0, level), 0.2: (1.0, level)}, "digits"))
        made.append(runs(seed, level + wobble, {0.0: (2.0, level), 0.2: (1.0, level)}, "MNIST"))
        made.append(runs(seed, level + 1 + wobble, {0.0: (2.0, level), 0.2: (1.0, level)}, "UCI yacht"))
    rows = no_tuning.summarise(made)
    verdicts = {row["set"]: row["verdict"] for row in rows if row["table"] == "error"}
    assert verdicts == {"digits": "better", "MNIST": "within one standard error", "UCI yacht": "worse"}
    for count in rows[-4:-2]:
        assert [count[k] for k in ("sets", "better", "within_one_standard_error", "worse", "no_worse")] == [
            3, 1, 1, 1, 2
        ]  # fmt: skip
    assert no_tuning.summarise(made[:1])[0]["verdict"] == "one seed"


def test_the_figure_has_a_panel_for_every_set_with_both_sides() -> None:
    grid = {0.0: (5.0, 5.0), 0.2: (3.0, 4.0)}
    found = [runs(seed, 3.0 + seed, grid, name) for name in no_tuning.SETS for seed in range(3)]
    axes = no_tuning.figure(found, []).axes
    assert [ax.get_title().split(", %")[0] for ax in axes] == list(no_tuning.SETS)
    found += [runs(0, 2.0, {}, name, (no_tuning.LONGER,)) for name in no_tuning.SETS]
    for ax in no_tuning.figure(found, []).axes:
        assert list(ax.lines[-1].get_ydata()) == [2.0, 2.0]
    for ax in axes:
        curve, circles, learned = (ax.lines[0], ax.lines[-2], ax.lines[-1])
        assert list(curve.get_ydata()) == [5.0, 4.0]
        assert list(circles.get_xdata()) == [0.2] * 3
        assert list(learned.get_ydata()) == [4.0, 4.0]
