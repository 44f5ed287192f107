"""`vardrop diagnose` and its page: models of one's own and runs, on data that every installation has."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import planted
import vardrop as vd
from commands import Result, refused
from vardrop.diagnosis.record import record
from vardrop.report import diagnosis_figures as figures
from vardrop.report.diagnosis import headline, small, write_diagnosis
from vardrop.training import Config, train

Run = Callable[..., Result]

FACTORY = """
import torch
from torch import nn

def faulty():
    torch.manual_seed(0)
    layers = nn.Linear(64, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 10)
    net = nn.Sequential(nn.Flatten(), *layers)
    return net

class Made:
    net = nn.Linear(2, 2)

def nothing():
    return 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder with a module of models, where the command is run."""
    (tmp_path / "my_nets.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    sys.modules.pop("my_nets", None)


def test_a_factory_is_diagnosed_and_cured(here: Path, vardrop_: Run) -> None:
    status, out, err = vardrop_("diagnose", "my_nets:faulty", "--data", "digits", "--fix", "lower_rate", "--out", "d")
    assert (status, err) == (0, "")
    assert "2: variance-shift (k² = " in out
    assert "kept: " in out or "as it was: " in out
    result = json.loads((here / "d" / "diagnosis.json").read_text())
    assert [finding["where"] for finding in result["findings"]] == ["2"]
    (attempt,) = result["fix"]["attempts"]
    assert attempt["strategy"] == "lower_rate"
    assert attempt["shift"] < 0.1 < result["worst"]
    page = (here / "d" / "diagnosis.html").read_text()
    assert "variance shift" in page
    assert "lower rate" in page
    assert "vardrop diagnose my_nets:faulty --data digits --fix lower_rate" in page
    assert "//" not in re.sub(r"<script>.*?</script>", "", page, flags=re.S)
    if result["fix"]["chosen"]:
        assert (here / "d" / "cured.pt").is_file()


def test_a_run_is_diagnosed_with_its_own_data(tmp_path: Path, vardrop_: Run) -> None:
    train(Config(model="mlp:1x16", method="binary", epochs=1), tmp_path / "run", progress=False)
    status, out, err = vardrop_("diagnose", tmp_path / "run")
    assert (status, err) == (0, "")
    assert out.startswith("no findings on 1294 examples") or "finding" in out
    refused(vardrop_("diagnose", tmp_path / "run", "--data", "mnist"), "must be diagnosed with its own data, digits")


def test_arrays_and_weights_from_files(here: Path, vardrop_: Run) -> None:
    rng = np.random.default_rng(0)
    np.savez(here / "rows.npz", x=rng.normal(size=(300, 64)).astype(np.float32), y=rng.integers(0, 10, 300))
    torch.save({key: 2 * x for key, x in _faulty().state_dict().items()}, here / "w.pt")
    asked = ("diagnose", "my_nets:faulty", "--data", "rows.npz", "--weights", "w.pt", "--batch-size", 64)
    status, out, err = vardrop_(*asked)
    assert (status, err) == (0, "")
    assert "on 240 examples" in out  # a fifth is set aside
    refused(vardrop_(*asked[:-4], "--weights", "none.pt"), "--weights must be a file that is there, got none.pt")
    torch.save({"other": torch.ones(1)}, here / "other.pt")
    refused(
        vardrop_(*asked[:-4], "--weights", "other.pt"), "other.pt must be a state dict of the model, got RuntimeError"
    )
    np.savez(here / "z.npz", z=np.ones(3))
    refused(vardrop_("diagnose", "my_nets:faulty", "--data", "z.npz"), "z.npz must have arrays x and y, got z")
    np.savez(here / "odd.npz", x=np.ones((3, 64)), y=np.ones(2))
    refused(vardrop_("diagnose", "my_nets:faulty", "--data", "odd.npz"), "as many as each other, got 3 and 2")
    refused(
        vardrop_("diagnose", "my_nets:faulty", "--data", "no.npz"), "--data must be a file that is there, got no.npz"
    )


def _faulty() -> nn.Module:
    space: dict[str, object] = {}
    exec(FACTORY, space)
    made: nn.Module = space["faulty"]()  # type: ignore[operator]
    return made


def test_what_is_no_model(here: Path, vardrop_: Run) -> None:
    refused(
        vardrop_("diagnose", "my_nets:none", "--data", "digits"), "must be package.module:factory or the folder of a"
    )
    refused(vardrop_("diagnose", "my_nets:nothing", "--data", "digits"), "must make a torch.nn.Module, got int")
    refused(vardrop_("diagnose", "my_nets:faulty"), "--data must be given for my_nets:faulty, got nothing")
    refused(vardrop_("diagnose", "my_nets:Made.net", "--data", "digits"), "the model must take a batch of the loader")
    refused(
        vardrop_("diagnose", "my_nets:faulty", "--data", "digits", "--batch-size", 1), "--batch-size must be 2 or more"
    )
    refused(vardrop_("diagnose", "my_nets:faulty", "--data", "digits", "--fix", "pray"), "strategy must be one of auto")


# -------------------------------------------------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def result() -> dict[str, object]:
    torch.manual_seed(0)
    case = planted.directly_before()
    diagnosis = vd.diagnose(case.model, case.batches)
    fix = vd.fix_variance_shift_(case.model, case.batches)
    return record(diagnosis, fix, model="net <one>", data="rows", command="vardrop diagnose net")


def test_the_page_has_all_that_was_found(result: dict[str, object], tmp_path: Path) -> None:
    page = write_diagnosis(result, tmp_path / "page.html").read_text()
    visible = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert "net &lt;one&gt;" in visible
    assert "net <one>" not in visible
    for words in ("1: variance shift", "Every BatchNorm", "recalibrated", "uniform noise", "What could not be judged"):
        assert words in visible


def test_a_page_without_anything(tmp_path: Path) -> None:
    found = record(vd.diagnose(nn.Linear(2, 2), torch.ones(4, 2)), model="linear", data="ones", command="x")
    page = write_diagnosis(found, tmp_path / "page.html").read_text()
    assert "Nothing wrong was found, in 0 BatchNorm layers and 4 examples." in page
    assert "There is none that could be measured." in page


def test_the_headline_is_the_worst(result: dict[str, object]) -> None:
    assert headline(result).startswith("The worst is variance shift at 1: k² = ")
    twice = {**result, "findings": result["findings"] * 2}  # type: ignore[operator]
    assert headline(twice).endswith(", and 1 other finding.")


def test_bars_begin_at_one_and_have_their_errors(result: dict[str, object]) -> None:
    rows = result["batchnorms"]
    figure = figures.shifts(rows)  # type: ignore[arg-type]
    bars = figure.data[0]  # type: ignore[union-attr]
    row = rows[0]  # type: ignore[index]
    assert bars.base == 1
    assert bars.x[0] == pytest.approx(row["k"] - 1)
    assert bars.error_x.array[0] == pytest.approx(2 * row["k_error"])
    assert figure.data[1].x[0] == pytest.approx(math.sqrt(row["theory"]))  # type: ignore[union-attr]
    cures = figures.after(rows, result["fix"]["attempts"])  # type: ignore[arg-type,index]
    assert [trace.name for trace in cures.data][:2] == ["as it was", "recalibrated"]  # type: ignore[union-attr]
    assert figures.shifts([]) is None
    assert figures.after([], []) is None


def test_rounding_errors_are_no_numbers_to_read() -> None:
    assert [small(value) for value in (6.9e-9, 0.0728, None)] == ["0", "0.0728", "–"]


def test_the_record_is_json(result: dict[str, object]) -> None:
    assert json.loads(json.dumps(result, allow_nan=False)) == result
