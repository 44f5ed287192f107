"""Cells that take long: stopped in the middle they go on from there, with the numbers of one that never stopped."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from sweep_cells import Stopped, long
from vardrop.cli import app
from vardrop.reproduce import results, run, unfinished
from vardrop.reproduce.experiments import EXPERIMENTS, _sparse
from vardrop.reproduce.sweep import Plan, sweep

MADE_BY = {"commit": "a", "threads": 1}


def rows(outcomes: Any) -> list[Any]:
    return [(outcome.cell.key, outcome.result.rows) for outcome in outcomes]


@pytest.mark.parametrize("plan", [Plan(), Plan(jobs=2, threads=torch.get_num_threads())], ids=["here", "processes"])
def test_a_stopped_cell_goes_on_where_it_was(tmp_path: Path, plan: Plan) -> None:
    experiment, root = long(tmp_path), tmp_path / "results"
    cells = experiment.at("cpu")
    whole = rows(sweep({"long": experiment}, cells, tmp_path / "whole", plan))
    (tmp_path / "0").touch()
    state = unfinished.place(cells[0], root)
    with pytest.raises(Stopped):
        run.compute(experiment, cells[0], state)
    kept = torch.load(state, weights_only=True)
    assert [row["i"] for row in kept["state"]["rows"]] == [0, 1]
    assert kept["seconds"] > 0
    kept["seconds"] = 1000.0  # of the run that was stopped
    torch.save(kept, state)
    outcomes = list(sweep({"long": experiment}, cells, root, plan))
    assert sorted(rows(outcomes)) == sorted(whole)
    assert not list(root.rglob("*unfinished*")), "what is finished needs no state"
    took = {result.seed: result.seconds for result in results.read_all(root)}
    assert took[0] > 1000 > took[1]


def test_the_command_says_that_a_cell_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment, root = long(tmp_path), tmp_path / "results"
    monkeypatch.setitem(EXPERIMENTS, "long", experiment)
    cells = experiment.at("cpu")
    results.write(run.compute(experiment, cells[1]), cells[1].path(root))
    (tmp_path / "0").touch()
    with pytest.raises(Stopped):
        run.compute(experiment, cells[0], unfinished.place(cells[0], root))
    said = CliRunner().invoke(app, ["reproduce", "run", "long", "--results", str(root), "--jobs", "1"])
    assert said.exit_code == 0, said.output
    assert "1 cells are finished already" in said.output
    assert "1 of the others have begun before, and go on if by the same code" in said.output
    assert len(results.read_all(root)) == 2


@pytest.mark.parametrize(
    ("made_by", "words"),
    [({"commit": "b"}, "commit"), ({"threads": 2}, "threads"), ({"commit": "b", "threads": 2}, "commit, threads")],
)
def test_what_something_else_has_computed_is_not_gone_on_with(tmp_path: Path, made_by: Any, words: str) -> None:
    with unfinished.kept_at(tmp_path / "state", MADE_BY):
        unfinished.keep({"a": 1})
        assert unfinished.found() == {"a": 1}
    told = f"must go on as it began, got .*state of another {words}; it begins anew, .* stop it now and go back"
    with unfinished.kept_at(tmp_path / "state", {**MADE_BY, **made_by}):
        with pytest.warns(UserWarning, match=told):
            assert unfinished.found() is None
        assert unfinished.before() == 0


@pytest.mark.parametrize("content", [b"", b"no state", b"PK\x03\x04 half of one"])
def test_a_damaged_state_is_told_and_the_cell_begins_anew(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "state").write_bytes(content)
    with (
        unfinished.kept_at(tmp_path / "state", MADE_BY),
        pytest.warns(UserWarning, match="an unfinished cell must be readable, got .*it begins anew"),
    ):
        assert unfinished.found() is None


def test_a_state_that_would_run_code_is_not_read(tmp_path: Path) -> None:
    ran = tmp_path / "ran"

    class Code:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save({"made_by": MADE_BY, "state": Code(), "random": torch.get_rng_state(), "seconds": 1.0}, tmp_path / "s")
    with unfinished.kept_at(tmp_path / "s", MADE_BY), pytest.warns(UserWarning, match="must be readable, got"):
        assert unfinished.found() is None
    assert not ran.exists()


def test_a_state_that_cannot_be_kept_is_told_and_the_cell_runs_on(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    told = pytest.warns(UserWarning, match="must be kept in .*state, which cannot be written .*; it runs on")
    with unfinished.kept_at(tmp_path / "file" / "state", MADE_BY), told:
        unfinished.keep({"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_outside_of_a_sweep_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        unfinished.keep({"a": 1})
        assert unfinished.found() is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "which"), [("sparse-lenet-300-100", 0), ("sparse-lenet-5", 0), ("sparse-lenet-5", 1)])
@pytest.mark.parametrize("when", ["shrink", "epochs"])
def test_a_network_that_gets_sparse_goes_on_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, which: int, when: str
) -> None:
    experiment = EXPERIMENTS[name]
    cell = experiment.at("smoke")[which]

    def without_time(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{key: value for key, value in row.items() if key != "seconds"} for row in found]

    whole = without_time(experiment.run_cell(cell.config))
    keep = unfinished.keep

    def stop(state: dict[str, Any]) -> None:
        keep(state)
        if state["epoch"] == cell.config[when]:
            raise Stopped

    monkeypatch.setattr(unfinished, "keep", stop)
    with pytest.raises(Stopped):
        run.compute(experiment, cell, tmp_path / "state")
    monkeypatch.setattr(unfinished, "keep", keep)
    torch.rand(3)  # other random numbers meanwhile
    fits = []
    fit = _sparse.fit
    monkeypatch.setattr(_sparse, "fit", lambda *args: (fits.append(args), fit(*args)))
    resumed = run.compute(experiment, cell, tmp_path / "state")
    assert without_time(resumed.rows) == whole
    tuned = [row for row in whole if row["stage"] in {"fine-tuned", "distilled"}]
    assert len(fits) == len(tuned), "the dense network is not trained again"
