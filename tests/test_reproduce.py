"""The reproduction harness: cells run once, results are whole or absent, claims are judged by what they say."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from vardrop.data import places
from vardrop.reproduce import check, claims, report, results, run
from vardrop.reproduce.cli import app
from vardrop.reproduce.experiment import SCALES, Cell, Experiment
from vardrop.reproduce.experiments import EXPERIMENTS, chosen, kl, speed
from vardrop.reproduce.results import Result

REPOSITORY = Path(__file__).parents[1]


def call(*arguments: object):
    if arguments[0] == "run":  # in this process: cells can be counted, and their warnings are errors
        arguments = (*arguments, "--jobs", 1)
    return CliRunner().invoke(app, [str(a) for a in arguments], catch_exceptions=False)


@pytest.fixture(scope="module")
def smoke(tmp_path_factory) -> Path:
    """Every experiment at scale smoke, through the command line, where no other data can be found."""
    root, empty = tmp_path_factory.mktemp("smoke") / "results", tmp_path_factory.mktemp("empty")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(empty)
        patch.setenv("VARDROP_DATA", str(empty))
        patch.setattr(places.pooch, "os_cache", lambda name: empty / name)
        done = call("run", "all", "--scale", "smoke", "--results", root)
    assert done.exit_code == 0, done.output
    return root


class Counter:
    """An experiment of three cells that counts how often each is run."""

    def __init__(self) -> None:
        self.ran: list[int] = []

    def experiment(self, **changes) -> Experiment:
        made = Experiment(
            name="count",
            summary="Squares.",
            cells=lambda scale: [{"i": i, "seed": i} for i in range(3)],
            run_cell=self.run_cell,
            summarise=lambda found: [{"i": "all", "square": sum(r["square"] for result in found for r in result.rows)}],
        )
        return dataclasses.replace(made, **changes)

    def run_cell(self, config):
        self.ran.append(config["i"])
        return [{"i": config["i"], "square": config["i"] ** 2}]


@pytest.fixture
def counter(monkeypatch) -> Counter:
    made = Counter()
    monkeypatch.setitem(EXPERIMENTS, "count", made.experiment())
    return made


def claim(**changes) -> claims.Claim:
    made = claims.Claim(
        id="sum", paper="P", where="Table 1", row="all", quantity="sum", relation="about", tolerance={"absolute": 0.5},
        experiment="count", select={"i": "all"}, metric="square", published=5.0,
    )  # fmt: skip
    return dataclasses.replace(made, **changes)


def planted(experiment: Experiment, root: Path, rows_of_cell, scale: str = "cpu") -> list[Result]:
    """Results as if the cells had been run at a scale."""
    made = []
    for cell in experiment.at(scale):
        rows = rows_of_cell(cell.config)
        made.append(Result(experiment.name, scale, cell.config, 0, {"python": "3"}, None, "here", 1, 1.0, rows))
        results.write(made[-1], cell.path(root))
    return made


# --- running -------------------------------------------------------------------------------------------------------


def test_a_finished_cell_is_not_run_again(counter, tmp_path):
    assert call("run", "count", "--scale", "smoke", "--results", tmp_path).exit_code == 0
    assert counter.ran == [0, 1, 2]
    EXPERIMENTS["count"].at("smoke")[1].path(tmp_path).unlink()
    second = call("run", "count", "--scale", "smoke", "--results", tmp_path)
    assert counter.ran == [0, 1, 2, 1]
    assert "2 cells are finished already" in second.output
    assert call("run", "count", "--scale", "smoke", "--results", tmp_path, "--again").exit_code == 0
    assert counter.ran == [0, 1, 2, 1, 0, 1, 2]


def test_a_result_says_where_it_comes_from(counter, tmp_path):
    cell = EXPERIMENTS["count"].at("cpu")[2]
    results.write(run.compute(EXPERIMENTS["count"], cell), cell.path(tmp_path))
    content = json.loads(cell.path(tmp_path).read_text())
    assert content["config"] == {"i": 2, "seed": 2}
    assert content["seed"] == 2
    assert content["rows"] == [{"i": 2, "square": 4}]
    assert content["versions"]["torch"] == torch.__version__
    assert content["device"]
    assert content["seconds"] >= 0
    assert content["commit"] == run.commit()


def test_commit_of_a_package_outside_a_checkout_is_unknown(tmp_path):
    assert run.commit(tmp_path) is None
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "package").mkdir()
    (tmp_path / "package" / "__init__.py").touch()
    assert run.commit(tmp_path / "package") is None, "another project's checkout around us"


def test_the_key_depends_on_content_alone():
    key = Cell("a", "cpu", {"x": 1, "y": 2}).key
    assert key == Cell("a", "cpu", {"y": 2, "x": 1}).key
    others = [
        Cell("b", "cpu", {"x": 1, "y": 2}),
        Cell("a", "gpu", {"x": 1, "y": 2}),
        Cell("a", "cpu", {"x": 1, "y": 3}),
    ]
    assert key not in {other.key for other in others}


CHILD = """
import os, sys, time
from pathlib import Path
from vardrop.reproduce.experiment import Experiment
from vardrop.reproduce.sweep import sweep

def stuck(file):
    print("writing", flush=True)
    time.sleep(600)

count = Experiment("count", "Squares.", lambda scale: [{"i": i, "seed": i} for i in range(3)],
                   lambda config: [{"i": config["i"], "square": config["i"] ** 2}])
for outcome in sweep({"count": count}, count.at("smoke"), Path(sys.argv[1])):
    os.fsync = stuck  # the second cell is killed with its text written but not yet in place
"""


def test_killed_while_writing_leaves_no_half_result_and_resumes(counter, tmp_path):
    with subprocess.Popen([sys.executable, "-c", CHILD, str(tmp_path)], stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout.readline() == "writing\n"
        child.send_signal(signal.SIGKILL)
    cells = EXPERIMENTS["count"].at("smoke")
    assert [cell.path(tmp_path).exists() for cell in cells] == [True, False, False]
    assert [result.config for result in results.read_all(tmp_path)] == [{"i": 0, "seed": 0}]
    assert call("run", "count", "--scale", "smoke", "--results", tmp_path).exit_code == 0
    assert counter.ran == [1, 2]


def test_a_file_where_the_results_should_go(counter, tmp_path):
    (tmp_path / "results").write_text("mine")
    failed = call("run", "count", "--scale", "smoke", "--results", tmp_path / "results")
    assert failed.exit_code == 2
    assert "which cannot be written (Not a directory)" in failed.output
    assert (tmp_path / "results").read_text() == "mine"


def test_a_full_disk_is_one_error_and_loses_nothing(counter, tmp_path, monkeypatch):
    cell = EXPERIMENTS["count"].at("smoke")[0]
    results.write(run.compute(EXPERIMENTS["count"], cell), cell.path(tmp_path))
    before = cell.path(tmp_path).read_text()

    def full(file):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    failed = call("run", "count", "--scale", "smoke", "--results", tmp_path, "--again")
    assert failed.exit_code == 2
    assert "cannot be written (No space left on device)" in failed.output
    assert (
        "free some space or choose another place with --results, and run again: finished cells are kept"
        in failed.output
    )
    assert "Traceback" not in failed.output
    assert cell.path(tmp_path).read_text() == before

    assert [path.name for path in cell.path(tmp_path).parent.iterdir()] == [cell.path(tmp_path).name]


def test_unknown_names_are_refused(tmp_path):
    unknown = call("run", "tabel1", "--results", tmp_path)
    assert unknown.exit_code == 2
    assert f"experiment must be all or one of {', '.join(EXPERIMENTS)}, got 'tabel1'" in unknown.output
    scale = call("run", "kl", "--scale", "huge", "--results", tmp_path)
    assert scale.exit_code == 2
    assert "scale must be one of smoke, cpu, gpu, got 'huge'" in scale.output
    with pytest.raises(ValueError, match="experiment must be all or one of"):
        chosen("nothing")


def test_scale_gpu_needs_a_gpu(monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused = call("run", "kl", "--scale", "gpu", "--results", tmp_path)
    assert refused.exit_code == 2
    assert "scale gpu must have a CUDA device" in refused.output


def test_equal_cells_are_refused():
    twice = Counter().experiment(cells=lambda scale: [{"i": 1}, {"i": 1}])
    with pytest.raises(ValueError, match=r"cells of an experiment must differ, got two of 'count'"):
        twice.at("cpu")


def test_a_failing_cell_is_named_and_the_others_are_finished(counter, tmp_path, monkeypatch):
    def fails(config):
        if config["i"] == 1:
            raise ValueError("vardrop.data: it must be there, got nothing; get it")
        return counter.run_cell(config)

    monkeypatch.setitem(EXPERIMENTS, "count", counter.experiment(run_cell=fails))
    failed = call("run", "count", "--scale", "cpu", "--results", tmp_path)
    assert failed.exit_code == 2
    assert "vardrop.data: it must be there" in failed.output
    assert "in experiment 'count' at scale cpu, configuration {'i': 1, 'seed': 1}" in failed.output
    assert "1 of 3 cells failed, the others are finished" in failed.output
    assert sorted(result.config["i"] for result in results.read_all(tmp_path)) == [0, 2]


def test_a_missing_package_is_one_error(counter, tmp_path, monkeypatch):
    def without_scipy(config):
        raise ModuleNotFoundError("No module named 'scipy'", name="scipy")

    monkeypatch.setitem(EXPERIMENTS, "count", counter.experiment(run_cell=without_scipy))
    refused = call("run", "count", "--scale", "cpu", "--results", tmp_path)
    assert refused.exit_code == 2
    assert "this needs scipy, which is not installed; pip install 'vardrop[reproduce]'" in refused.output


def test_a_bug_keeps_its_traceback(counter, tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "count", counter.experiment(run_cell=lambda config: [{"x": int("one")}]))
    failed = call("run", "count", "--scale", "cpu", "--results", tmp_path)
    assert failed.exit_code == 1
    assert failed.output.count("Traceback") == 1, "one error of three cells is told once"
    assert "ValueError: invalid literal for int() with base 10: 'one'" in failed.output
    assert failed.output.count("in experiment 'count' at scale cpu, configuration") == 3


def test_list_counts_finished_cells(counter, tmp_path):
    call("run", "count", "--scale", "smoke", "--results", tmp_path)
    listed = call("list", "--results", tmp_path).output
    assert all(name in listed for name in EXPERIMENTS)
    assert next(line for line in listed.splitlines() if "count" in line).count("3/3") == 1


# --- results on disk -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"experiment": "count", "rows": [', "a result must be JSON, got .*json"),
        ("", "a result must be JSON"),
        ("[1, 2]", "a result must have .* got list in"),
        ('{"rows": []}', "a result must have .* got rows in .*delete it and run the experiment again"),
    ],
)
def test_damaged_results_are_named(counter, tmp_path, content, words):
    path = EXPERIMENTS["count"].at("smoke")[0].path(tmp_path)
    path.parent.mkdir(parents=True)
    path.write_text(content)
    with pytest.raises(ValueError, match=words):
        results.read_all(tmp_path)
    for command in (["run", "count", "--scale", "smoke"], ["report", "--out", tmp_path / "page.md"], ["check"]):
        refused = call(*command, "--results", tmp_path)
        assert refused.exit_code == 2
        assert path.name in refused.output.replace("\n", "")
    assert counter.ran == []


def test_results_must_be_a_directory(tmp_path):
    missing = call("check", "--results", tmp_path / "resutls")
    assert missing.exit_code == 2
    assert "results must be a directory" in missing.output


def test_rows_are_plain_and_come_back_as_they_were(tmp_path):
    result = Result("a", "cpu", {}, None, {}, None, "d", 1, 0.5, [{"x": 0.1, "y": None, "é": "ü", "z": True}, {}])
    results.write(result, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json") == result
    odd = dataclasses.replace(result, rows=[{"x": math.nan, "y": -math.inf}])
    results.write(odd, tmp_path / "r.json")
    assert results.read(tmp_path / "r.json").rows == [{"x": "nan", "y": "-inf"}]
    results.write(dataclasses.replace(result, rows=[]), tmp_path / "r.json")
    assert results.read(tmp_path / "r.json").rows == []
    with pytest.raises(TypeError, match="a row must hold text, numbers, bools or None, got Tensor in 'x'"):
        results.write(dataclasses.replace(result, rows=[{"x": torch.ones(())}]), tmp_path / "r.json")


# --- claims --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("relation", "tolerance", "holds", "within", "outside"),
    [
        ("at most", {"factor": 2}, [9, 10], [11, 20], [20.1]),
        ("at least", {"factor": 2}, [10, 90], [5, 9.9], [4.9]),
        ("about", {"factor": 2}, [5, 10, 20], [], [4.9, 20.1]),
        ("at most", {"absolute": 1}, [-5, 10], [10.5, 11], [11.1]),
        ("at least", {"absolute": 1}, [10, 99], [9, 9.5], [8.9]),
        ("about", {"absolute": 1}, [9, 11], [], [8.9, 11.1, -10]),
    ],
)
def test_verdicts(relation, tolerance, holds, within, outside):
    judged = claim(relation=relation, tolerance=tolerance, published=10.0)
    for status, numbers in ((claims.HOLDS, holds), (claims.WITHIN, within), (claims.OUTSIDE, outside)):
        for number in numbers:
            assert claims.compare(judged, "cpu", [{"i": "all", "square": number}]).status == status, number


def test_a_negative_target_has_its_tolerance_on_both_sides():
    judged = claim(published=-10.0, tolerance={"factor": 2})
    assert [judged.agrees(x) for x in (-21, -20, -5, -4)] == [False, True, True, False]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"select": {"kind": "odd"}}, "must select one row, selects 2"),
        ({"select": {"i": 7}}, "must select one row, selects 0"),
        ({"metric": "cube"}, "must find a number in 'cube', finds None"),
        ({"metric": "kind"}, "must find a number in 'kind', finds 'odd'"),
        ({"metric": "flag"}, "must find a number in 'flag', finds True"),
    ],
)
def test_a_claim_selects_exactly_one_number_or_says_so(changes, reason):
    rows = [{"i": 1, "kind": "odd", "flag": True}, {"i": 3, "kind": "odd", "flag": True}]
    verdict = claims.compare(claim(**{"select": {"i": 1}, "metric": "square", **changes}), "cpu", rows)
    assert verdict.status == claims.UNCLEAR
    assert reason in verdict.reason
    assert check.failures([verdict]) == [verdict]


def test_a_claim_is_answered_by_the_largest_complete_scale(counter, tmp_path):
    experiments = dict(EXPERIMENTS)
    verdict = claims.judge(claim(), [], experiments)
    assert (verdict.status, verdict.reason) == ("not run", "")
    smoke = planted(experiments["count"], tmp_path, counter.run_cell, "smoke")
    verdict = claims.judge(claim(), smoke, experiments)
    assert (verdict.status, verdict.reason) == ("not run", "smoke only")
    cpu = planted(experiments["count"], tmp_path, counter.run_cell, "cpu")
    verdict = claims.judge(claim(), cpu[:2], experiments)
    assert (verdict.status, verdict.reason) == ("not run", "2 of 3 cells at scale cpu")
    verdict = claims.judge(claim(), smoke + cpu, experiments)
    assert (verdict.status, verdict.ours, verdict.scale) == ("holds", 5, "cpu")
    gpu = planted(experiments["count"], tmp_path, lambda config: [{"square": 100}], "gpu")
    assert claims.judge(claim(), cpu + gpu[:1], experiments).scale == "cpu"
    assert claims.judge(claim(), cpu + gpu, experiments).ours == 300
    assert claims.judge(claim(scale="cpu"), cpu + gpu, experiments).ours == 5


GOOD = """
[[claim]]
id = "one"
paper = "P"
where = "Table 1"
row = "r"
quantity = "q"
relation = "at most"
published = 1
tolerance = { factor = 2 }
experiment = "kl"
select = { form = "exact" }
metric = "value_error"
"""


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('id = "one"', 'id = "one', "claims must be TOML"),
        ('row = "r"', "", "claim 'one': must have .* got none of .'row'"),
        ('row = "r"', 'rwo = "r"', "its keys must be among .* got .'rwo'"),
        ("published = 1", "", "must have published or expected, not both, got"),
        ("published = 1", "published = 1\nexpected = 2", "must have published or expected, not both, got"),
        ('"at most"', '"below"', "relation must be one of at most, at least, about, got 'below'"),
        ("factor = 2", "factor = 0.5", "tolerance must be"),
        ("factor = 2", "absolute = -1", "tolerance must be"),
        ("factor = 2", "", "tolerance must be"),
        ("factor = 2", "relative = 2", "tolerance must be"),
        ("factor = 2", "factor = 2, absolute = 1", "tolerance must be"),
        ('"kl"', '"ki"', "experiment must be one of kl, speed.* got 'ki'"),
        ('row = "r"', 'row = "r"\nscale = "smoke"', "scale must be cpu or gpu, got 'smoke'"),
        ('[[claim]]\nid = "one"', GOOD + '[[claim]]\nid = "one"', "ids of claims must differ, got 'one' twice"),
    ],
)
def test_wrong_claims_are_refused(old, new, words):
    assert [c.id for c in claims.load(EXPERIMENTS, GOOD)] == ["one"]
    with pytest.raises(ValueError, match=words):
        claims.load(EXPERIMENTS, GOOD.replace(old, new))


def test_all_experiments_run_at_scale_smoke_from_what_scikit_learn_brings(smoke):
    found = results.read_all(smoke)
    for experiment in EXPERIMENTS.values():
        complete, missing = results.finished(found, experiment, "smoke")
        assert not missing, experiment.name
        assert experiment.rows(complete)


def test_every_claim_finds_one_number_in_a_smoke_run(smoke):
    found = results.read_all(smoke)
    for each in claims.load(EXPERIMENTS):
        experiment = EXPERIMENTS[each.experiment]
        complete, missing = results.finished(found, experiment, "smoke")
        assert not missing
        verdict = claims.compare(each, "smoke", experiment.rows(complete))
        assert verdict.status != claims.UNCLEAR, (each.id, verdict.reason)


# --- check ---------------------------------------------------------------------------------------------------------


def plant_everything(smoke: Path, root: Path, naive: float, exact: float | None = None) -> None:
    """The rows of kl and speed at smoke as if they came from scale cpu; the measured speeds replaced by given ones."""
    rows = {(r.experiment, r.config.get("dtype")): r.rows for r in results.read_all(smoke)}

    def of_kl(config):
        changed = [dict(row) for row in rows["kl", config["dtype"]]]
        for row in changed:
            if exact is not None and row.get("form") == "exact":
                row["value_relative_error"] = exact
        return changed

    def of_speed(config):
        ratios = iter([1.0, naive, 150.0, 120.0, 100.0])
        changed = [row | {"ratio_to_local": next(ratios), "fastest_per_example": False} for row in rows["speed", None]]
        changed[-1]["fastest_per_example"] = True
        return changed

    planted(EXPERIMENTS["kl"], root, of_kl)
    planted(EXPERIMENTS["speed"], root, of_speed)


def test_check_passes_when_every_claim_holds(smoke, tmp_path):
    plant_everything(smoke, tmp_path, naive=210.0)
    passed = call("check", "speed", "--strict", "--results", tmp_path)
    assert passed.exit_code == 0, passed.output
    assert call("check", "kl", "--strict", "--results", tmp_path).exit_code == 0
    assert "kl-" not in passed.output
    assert "holds: speed-naive (ours 210 at scale cpu, target ≥ 200, ÷ 1.34)" in passed.output


def test_check_fails_and_names_a_planted_wrong_result(smoke, tmp_path):
    plant_everything(smoke, tmp_path, naive=120.0, exact=1e-3)
    failed = call("check", "--results", tmp_path)
    assert failed.exit_code == 1
    assert "outside: speed-naive (ours 120" in failed.output
    total = len(claims.load(EXPERIMENTS))
    assert f"3 of {total} claims fail: speed-naive, kl-exact-value, kl-exact-float32" in failed.output


def test_claims_without_a_result_fail_only_if_strict(smoke):
    lenient = call("check", "--results", smoke)
    assert lenient.exit_code == 0, lenient.output
    assert lenient.output.count("not run: smoke only") == len(claims.load(EXPERIMENTS))
    assert call("check", "--strict", "--results", smoke).exit_code == 1


def test_results_that_nobody_asks_for_are_left_out_and_listed(counter, tmp_path):
    planted(counter.experiment(cells=lambda scale: [{"i": 7}]), tmp_path, counter.run_cell)
    found = results.read_all(tmp_path)
    assert results.left_over(found, dict(EXPERIMENTS)) == found
    assert "left out: no experiment asks for" in call("check", "--results", tmp_path).output
    assert "{'i': 7}" in report.text(found, [], dict(EXPERIMENTS))


# --- report --------------------------------------------------------------------------------------------------------


def test_the_report_reads_json_and_runs_nothing(smoke, tmp_path, monkeypatch):
    def refuse(config):
        raise AssertionError("the report must not run experiments")

    for name, experiment in EXPERIMENTS.items():
        monkeypatch.setitem(EXPERIMENTS, name, dataclasses.replace(experiment, run_cell=refuse))
    root = tmp_path / "results"
    plant_everything(smoke, root, naive=180.0)
    page = tmp_path / "docs" / "page.md"
    assert call("report", "--results", root, "--out", page).exit_code == 0
    text = page.read_text()
    assert "| speed-naive | Kingma, Salimans, Welling 2015, section 5, Speed |" in text
    assert "| ≥ 200, ÷ 1.34 | 180 | cpu | within tolerance |" in text
    assert "kl-exact-value" in text
    for name in ("kl-cpu.svg", "speed-cpu.svg"):
        assert f"(figures/{name})" in text
        assert (page.parent / "figures" / name).read_text().startswith("<?xml")
    assert "smoke" not in text.partition("## kl")[2]
    before = {path.name: path.read_bytes() for path in page.parent.rglob("*.*")}
    call("report", "--results", root, "--out", page)
    assert before == {path.name: path.read_bytes() for path in page.parent.rglob("*.*")}, "differs from run to run"


def test_the_report_says_what_is_missing(counter, tmp_path):
    found = planted(EXPERIMENTS["count"], tmp_path, counter.run_cell, "smoke")[:1]
    text = report.text(found, [claim()], dict(EXPERIMENTS))
    assert "1 of 3 cells" in text
    assert "A smoke run shows that the experiment runs" in text
    assert "not run: smoke only" in text
    assert text.count("Not run yet.") == len(EXPERIMENTS) - 1


def test_a_report_that_cannot_be_written_is_one_error(smoke, tmp_path):
    (tmp_path / "file").touch()
    refused = call("report", "--results", smoke, "--out", tmp_path / "file" / "page.md")
    assert refused.exit_code == 2
    assert "the report must go to" in refused.output


def test_the_committed_page_is_what_the_committed_results_say():
    text = report.text(results.read_all(REPOSITORY / "results"), claims.load(EXPERIMENTS), EXPERIMENTS)
    assert (REPOSITORY / "docs" / "reproduction.md").read_text() == text, "run `vardrop reproduce report`"


# --- the experiments -----------------------------------------------------------------------------------------------


def test_kl_truth_agrees_with_known_values():
    value, slope = kl.truth([-10.0, -1.0, 0.0, 3.0])  # the divergence and its slope to ten digits, from mpmath's 2F2
    assert value == pytest.approx([5.635158721, 0.9145313097, 0.4266856043, 0.02468833544], rel=1e-9)
    assert slope == pytest.approx([-0.5000227031, -0.5997037495, -0.3623892295, -0.02448449338], rel=1e-9)


def test_kl_errors_of_a_smoke_run(smoke):
    rows = [row for r in results.read_all(smoke) if r.experiment == "kl" for row in r.rows]
    errors = {(r["dtype"], r["form"], r["range"]): r for r in rows if r["table"] == "errors"}
    assert ("float64", "cubic", "|log alpha| <= 10") not in errors
    assert errors["float64", "exact", "|log alpha| <= 10"]["gradient_relative_error"] < 1e-6
    assert 0.03 < errors["float64", "cubic", "alpha <= 1"]["value_error"] < 0.04
    assert all(r["quadrature_against_series"] < 1e-12 for r in rows if r["table"] == "truth")
    curves = [r for r in rows if r["table"] == "curves"]
    assert all((r["cubic"] is None) == (r["log_alpha"] > 0) for r in curves)


def test_speed_rows_say_what_was_measured(smoke):
    (result,) = (r for r in results.read_all(smoke) if r.experiment == "speed")
    local, *others = result.rows
    assert (local["ratio_to_local"], local["measured_examples"], local["scaled"]) == (1.0, 1000, False)
    assert [row["naive"] for row in others] == [True, False, False, False]
    assert all(row["measured_examples"] == 4 and row["scaled"] for row in others)
    assert all(row["seconds_per_epoch"] == pytest.approx(60 * row["seconds_per_step"]) for row in result.rows)
    (fastest,) = (row for row in others if row["fastest_per_example"])
    assert fastest["ratio_to_local"] == min(row["ratio_to_local"] for row in others)


def test_all_forms_of_speed_compute_the_same_gradient_in_expectation():
    """With a mean weight instead of noise they must agree to rounding: slices and scaling lose no example."""
    model = speed.network("cpu")
    generator = torch.Generator().manual_seed(0)
    x, y = torch.rand(8, 784, generator=generator), torch.randint(10, (8,), generator=generator)
    gradients = []
    for form in speed.forms(8, 4):
        speed.seconds(model, x, y, form._replace(estimator="none"), 8, generator)
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("scale", SCALES)
def test_every_experiment_has_different_cells_at_every_scale(scale):
    for experiment in EXPERIMENTS.values():
        assert experiment.at(scale)
