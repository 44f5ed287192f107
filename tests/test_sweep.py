"""Sweeps: many cells at once give what one by one gives, and lose nothing when something goes wrong."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dask
import distributed
import pytest
import torch
from joblib.externals.loky import get_reusable_executor
from typer.testing import CliRunner

from sweep_cells import count
from vardrop.reproduce import engines, results
from vardrop.reproduce.cli import app
from vardrop.reproduce.experiment import Cell, Experiment
from vardrop.reproduce.experiments import EXPERIMENTS, droppath, speed
from vardrop.reproduce.failures import Failure, listed
from vardrop.reproduce.progress import Tally
from vardrop.reproduce.results import Result
from vardrop.reproduce.sweep import Outcome, Plan, attempt, claimed, plan, sweep
from vardrop.reproduce.time_left import Left, duration, time_left


@pytest.fixture(scope="module", autouse=True)
def processes() -> Iterator[None]:
    """Loky's processes, which are kept from sweep to sweep, are ended after the last."""
    yield
    get_reusable_executor().shutdown(wait=True, kill_workers=True)


def run(experiment: Experiment, root: Path, plan: Plan, cells: list[Cell] | None = None) -> list[Outcome]:
    return list(sweep({experiment.name: experiment}, cells or experiment.at("smoke"), root, plan))


def rows(root: Path) -> dict[int, list]:
    return {result.config["i"]: result.rows for result in results.read_all(root)}


# --- what comes out ------------------------------------------------------------------------------------------------


def test_numbers_are_the_same_whatever_the_jobs(tmp_path):
    experiment = count(log=str(tmp_path / "log"))
    one, two = tmp_path / "one", tmp_path / "two"
    run(experiment, one, Plan())
    outcomes = run(experiment, two, Plan(jobs=2, threads=1))
    assert rows(one) == rows(two)
    assert {result.threads for result in results.read_all(two)} == {1}
    assert sorted(outcome.cell.config["i"] for outcome in outcomes) == [0, 1, 2, 3]
    here, there = (
        {int(line.split()[1]) for line in part}
        for part in (((tmp_path / "log").read_text().splitlines())[:4], (tmp_path / "log").read_text().splitlines()[4:])
    )
    assert here == {os.getpid()}
    assert os.getpid() not in there


def test_threads_of_one_process_take_turns(tmp_path):
    """Cells seed torch's own generators: side by side in one process they would mix their numbers."""
    experiment = count(sleep=0.02)
    run(experiment, tmp_path / "one", Plan())
    run(experiment, tmp_path / "threads", Plan(jobs=4, threads=1, backend="threading"))
    assert rows(tmp_path / "one") == rows(tmp_path / "threads")


def test_threads_are_set_for_the_cell_alone(tmp_path):
    before = torch.get_num_threads()
    outcome = attempt(count(), count().at("smoke")[0], threads=before + 1)
    assert outcome.result.threads == before + 1
    assert torch.get_num_threads() == before


def test_cells_that_measure_time_run_by_themselves_and_first(tmp_path):
    experiment = count(cells=5, alone=lambda config: config["i"] % 2 == 1, log=str(tmp_path / "log"))
    run(experiment, tmp_path / "results", Plan(jobs=2, threads=1))
    lines = [[int(word) for word in line.split()] for line in (tmp_path / "log").read_text().splitlines()]
    assert [i for i, _, _ in lines[:2]] == [1, 3]
    assert {pid for _, pid, _ in lines[:2]} == {os.getpid()}
    assert os.getpid() not in {pid for _, pid, _ in lines[2:]}


def test_the_experiments_that_measure_time_say_so():
    assert all(speed.EXPERIMENT.runs_alone(cell.config) for cell in speed.EXPERIMENT.at("cpu"))
    measuring = [droppath.EXPERIMENT.runs_alone(cell.config) for cell in droppath.EXPERIMENT.at("cpu")]
    assert (measuring.count(True), measuring[-1]) == (1, True)


def test_an_engine_without_a_stream_gets_few_cells_at_a_time(tmp_path, monkeypatch):
    @contextmanager
    def at_the_end(backend, jobs):
        with real(backend, jobs):
            yield False

    real = engines.engine
    monkeypatch.setattr("vardrop.reproduce.sweep.engine", at_the_end)
    outcomes = sweep({"count": count()}, count().at("smoke"), tmp_path, Plan(jobs=2, threads=1, backend="threading"))
    next(outcomes)
    next(outcomes)
    assert sorted(rows(tmp_path)) == [0, 1]
    next(outcomes)
    outcomes.close()
    assert sorted(rows(tmp_path)) == [0, 1, 2]


# --- how many at once ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("cells", "jobs", "cores", "expected"),
    [
        (100, None, 8, (8, 1)),
        (3, None, 8, (3, 2)),
        (1, None, 8, (1, None)),
        (100, 2, 8, (2, 4)),
        (100, 16, 8, (16, 1)),
        (100, 1, 8, (1, None)),
        (100, None, 1, (1, None)),
    ],
)
def test_cores_are_shared_out(monkeypatch, cells, jobs, cores, expected):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    made = plan([count(cells)], "smoke", jobs, cores=cores)
    assert (made.jobs, made.threads) == expected
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert plan([count(cells)], "smoke", jobs, cores=cores).threads in (1, None), "OMP_NUM_THREADS=1 is kept to"


def test_plans_go_by_devices_at_scale_gpu_and_by_what_runs_beside(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert plan([count(100)], "gpu", cores=8).jobs == 3
    assert plan([count(100, alone=True)], "cpu", cores=8) == Plan()
    with pytest.raises(ValueError, match="jobs must be 1 or more, got 0"):
        plan([count()], "cpu", jobs=0)


def test_a_place_is_taken_once_and_given_back(tmp_path):
    with claimed(tmp_path) as first, claimed(tmp_path) as second:
        assert (first, second) == (0, 1)
    with claimed(tmp_path) as again:
        assert again == 0


# --- when something goes wrong -------------------------------------------------------------------------------------


def call(*arguments: object):
    return CliRunner().invoke(app, ["run", "count", "--scale", "smoke", *map(str, arguments)], catch_exceptions=False)


def test_a_failing_cell_loses_no_other(tmp_path, monkeypatch):
    each = {0: {"fails": True}, 2: {"bug": True}, 3: {"odd": True}}
    monkeypatch.setitem(EXPERIMENTS, "count", count(6, each=each))
    done = call("--jobs", 2, "--results", tmp_path)
    assert done.exit_code == 1, "a bug among them"
    assert sorted(rows(tmp_path)) == [1, 4, 5]
    assert "error: vardrop.data: it must be there, got nothing; get it" in done.output
    assert "in experiment 'count' at scale smoke, configuration {'i': 0, 'seed': 0, 'fails': True}" in done.output
    assert "ValueError: invalid literal for int()" in done.output
    assert "a row must hold text, numbers, bools or None, got Tensor in 'x'" in done.output
    assert "3 of 6 cells failed, the others are finished" in done.output

    monkeypatch.setitem(EXPERIMENTS, "count", count(6, each={0: {"fails": True}}))
    done = call("--jobs", 2, "--results", tmp_path)
    assert (done.exit_code, sorted(rows(tmp_path))) == (2, [1, 2, 3, 4, 5])
    assert "3 cells are finished already" in done.output
    assert "Traceback" not in done.output


def test_equal_failures_are_told_once():
    cells = count(3).at("smoke")
    told = listed([(cell, Failure("vardrop.x: no", ours=True)) for cell in cells])
    assert told.count("vardrop.x: no") == 1
    assert told.count("configuration") == 3


def test_a_process_that_dies_is_one_error_and_finished_cells_are_kept(tmp_path, monkeypatch):
    each = {1: {"dies": True, "sleep": 0.0}}
    monkeypatch.setitem(EXPERIMENTS, "count", count(2, each=each))
    run(count(2, each=each), tmp_path, Plan(), count(2, each=each).at("smoke")[:1])
    died = call("--jobs", 2, "--results", tmp_path)
    assert died.exit_code == 2
    assert "every process that runs cells must live until the end, got TerminatedWorkerError from loky" in died.output
    assert sorted(rows(tmp_path)) == [0]


CHILD = """
import sys
sys.path.insert(0, {tests!r})
from sweep_cells import count
from vardrop.reproduce.cli import app
from vardrop.reproduce.experiments import EXPERIMENTS
EXPERIMENTS["count"] = count(6, each={{i: {{"sleep": 600.0}} for i in range(2, 6)}}, log={log!r})
app(["run", "count", "--scale", "smoke", "--results", {root!r}, "--jobs", {jobs!r}])
"""


def started(tmp_path: Path, jobs: int) -> tuple[subprocess.Popen, dict]:
    """A sweep of two quick cells and four that never end, once all its processes are at the latter."""
    names = {"tests": str(Path(__file__).parent), "log": str(tmp_path / "log"), "root": str(tmp_path / "results")}
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD.format(**names, jobs=str(jobs))],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # what runs in the background ignores it
    )  # fmt: skip
    log, until = tmp_path / "log", time.monotonic() + 120
    while not log.exists() or log.read_text().count("\n") < 2 + jobs or len(rows(tmp_path / "results")) < 2:
        assert child.poll() is None, child.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.05)
    return child, names


def is_gone(pid: int) -> bool:
    """Whether a process has ended, waited for or not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def unfinished(root: Path) -> list[Path]:
    return [path for path in root.rglob("*") if path.is_file() and path.suffix != ".json"]


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks for processes in /proc")
def test_killed_a_sweep_leaves_no_process_and_goes_on(tmp_path, monkeypatch):
    child, names = started(tmp_path, jobs=2)
    workers = {int(line.split()[1]) for line in Path(names["log"]).read_text().splitlines()}
    with child:
        child.send_signal(signal.SIGKILL)
        child.stdout.close()
    assert sorted(rows(tmp_path / "results")) == [0, 1]
    assert unfinished(tmp_path / "results") == []
    until = time.monotonic() + 60
    while not all(map(is_gone, workers)):
        assert time.monotonic() < until, "processes outlive the sweep"
        time.sleep(0.1)
    quick = count(6, log=str(tmp_path / "again"))  # the same cells but for the sleep
    monkeypatch.setitem(EXPERIMENTS, "count", quick)
    for cell, made in zip(quick.at("smoke")[:2], sorted((tmp_path / "results").rglob("*.json")), strict=True):
        kept = results.read(made)
        results.write(Result(**{**kept.__dict__, "config": cell.config}), cell.path(tmp_path / "second"))
    assert call("--jobs", 1, "--results", tmp_path / "second").exit_code == 0
    assert [line.split()[0] for line in (tmp_path / "again").read_text().splitlines()] == ["2", "3", "4", "5"]


def test_ctrl_c_stops_with_a_word_on_how_to_go_on(tmp_path):
    child, _ = started(tmp_path, jobs=2)
    with child:
        os.killpg(child.pid, signal.SIGINT)  # as a terminal does: every process of the group gets it
        output = child.stdout.read()
    assert child.returncode == 130, output
    assert "stopped: 2 of 6 cells are finished and kept; the same command goes on with the others" in output
    assert "Traceback" not in output
    assert sorted(rows(tmp_path / "results")) == [0, 1]
    assert unfinished(tmp_path / "results") == []


def test_ctrl_c_in_one_process_keeps_what_is_finished_and_tells_what_failed(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "count", count(4, each={0: {"fails": True}, 2: {"stops": True}}))
    stopped = call("--jobs", 1, "--results", tmp_path)
    assert stopped.exit_code == 130
    assert "stopped: 1 of 4 cells are finished" in stopped.output
    assert "it must be there, got nothing; get it" in stopped.output
    assert sorted(rows(tmp_path)) == [1]


# --- engines -------------------------------------------------------------------------------------------------------


def test_two_dask_workers_run_the_cells_and_go_on(tmp_path, monkeypatch):
    log = tmp_path / "log"
    experiment = count(6, each={4: {"fails": True}}, log=str(log))
    monkeypatch.setitem(EXPERIMENTS, "count", experiment)
    run(experiment, tmp_path / "one", Plan(), experiment.at("smoke")[:4])
    log.unlink()
    results.write(
        results.read(experiment.at("smoke")[0].path(tmp_path / "one")), experiment.at("smoke")[0].path(tmp_path)
    )
    with (
        distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        distributed.Client(cluster),
    ):
        first = call("--backend", "dask", "--jobs", 2, "--results", tmp_path)
        assert (first.exit_code, sorted(rows(tmp_path))) == (2, [0, 1, 2, 3, 5]), first.output
        lines = [[int(word) for word in line.split()] for line in log.read_text().splitlines()]
        assert sorted(i for i, _, _ in lines) == [1, 2, 3, 4, 5], "the finished cell is not run again"
        assert os.getpid() not in {pid for _, pid, _ in lines}
        assert {threads for _, _, threads in lines} == {1}
        one = rows(tmp_path / "one")
        assert {i: rows(tmp_path)[i] for i in one} == one, "the same numbers as in this process"
        log.unlink()
        again = call("--backend", "dask", "--jobs", 2, "--results", tmp_path)
        assert "5 cells are finished already" in again.output
        assert [line.split()[0] for line in log.read_text().splitlines()] == ["4"]


def test_engines_that_are_not_there_are_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "count", count())
    unknown = call("--backend", "loki", "--results", tmp_path)
    assert unknown.exit_code == 2
    assert "backend must be loky, dask, ray or another one that joblib knows, got 'loki'" in unknown.output
    monkeypatch.setitem(sys.modules, "ray", None)
    without = call("--backend", "ray", "--results", tmp_path)
    assert without.exit_code == 2
    assert "backend ray needs the package ray, got an environment without it; pip install ray" in without.output


def test_a_scheduler_that_does_not_answer_is_one_error(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "count", count())
    with dask.config.set({"scheduler-address": "tcp://127.0.0.1:9", "distributed.comm.timeouts.connect": "0.2s"}):
        refused = call("--backend", "dask", "--jobs", 1, "--results", tmp_path)
    assert refused.exit_code == 2
    assert "dask's scheduler must answer, got nothing from tcp://127.0.0.1:9" in refused.output


# --- the time left -------------------------------------------------------------------------------------------------


def cells(name: str, **entries) -> list[Cell]:
    """Cells with one entry each of several values, three seeds each."""
    ((key, values),) = entries.items()
    return [Cell(name, "cpu", {key: value, "seed": seed}) for value in values for seed in range(3)]


def test_a_cell_is_expected_to_take_as_long_as_those_most_like_it():
    a, b = cells("a", units=[100, 400]), cells("b", units=[100])
    finished = [(a[0], 10.0), (a[1], 20.0), (a[3], 100.0), (b[0], 1.0)]
    assert time_left([a[2], a[4], a[5], b[1]], finished) == Left(15 + 100 + 100 + 1, 0)
    other = Cell("a", "cpu", {"units": 700, "seed": 0})  # as unlike the one as the other
    assert time_left([other], finished) == Left(130 / 3, 0)


def test_jobs_share_the_sum_but_not_one_cell_and_alone_is_alone():
    a = cells("a", units=[1])
    finished = [(Cell("a", "cpu", {"units": 1, "seed": 9}), 60.0)]
    assert time_left(a, finished, jobs=2) == Left(90, 0)
    assert time_left(a, finished, jobs=8) == Left(60, 0)
    assert time_left(a[:2], finished, jobs=2, alone=a[2:]) == Left(60 + 60, 0)


def test_what_nothing_is_known_of_is_counted_and_not_guessed():
    a, b = cells("a", units=[1]), cells("b", units=[1])
    known = time_left([*a, *b], [(a[0], 10.0)])
    assert known == Left(30, 3)
    assert str(known) == "about 30 s left and 3 more cells of unknown length"
    assert str(time_left(b, [])) == "3 cells of unknown length"
    assert str(time_left([], [])) == "about 0 s left"


def test_a_tally_learns_from_earlier_runs_and_from_those_on_as_many_threads_first(tmp_path):
    experiment = count(6, alone=lambda config: config["i"] == 5)

    def result(i: int, threads: int, seconds: float) -> Result:
        return Result("count", "smoke", experiment.at("smoke")[i].config, i, {}, None, "here", threads, seconds, [])

    here = torch.get_num_threads()
    todo = experiment.at("smoke")[2:]
    every = Tally({"count": experiment}, todo, [result(0, here + 1, 8.0)], Plan(jobs=3, threads=here))
    assert every.left() == Left(8 + 8, 0)
    one = Tally({"count": experiment}, todo, [result(0, here + 1, 8.0), result(1, here, 2.0)], Plan())
    assert one.left() == Left(4 * 2, 0)
    one.add(Outcome(todo[0], result(2, here, 4.0)))
    one.add(Outcome(todo[1], failure=Failure("no", ours=True)))
    assert (one.done, one.failed, one.left()) == (2, 1, Left(2 * 3, 0))


def test_lines_of_a_log_say_how_much_is_done_and_left(tmp_path, monkeypatch):
    monkeypatch.setitem(EXPERIMENTS, "count", count(3))
    done = call("--jobs", 1, "--results", tmp_path)
    first, *_ = (line for line in done.output.splitlines() if line.startswith("1/3 count: "))
    assert first.endswith(" left")
    assert [duration(s) for s in (30, 300)] == ["30 s", "5 min"]
