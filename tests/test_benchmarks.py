"""The harness of the benchmarks: that it measures what it says. Nothing here depends on the machine's speed."""

from __future__ import annotations

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import vardrop as vd
from benchmarks import __main__ as command
from benchmarks import compact, divergence, memory, networks, peers, prediction, table, training_step, work
from benchmarks.timing import Pair, Row, interleaved, summarise
from benchmarks.variants import OURS, REFERENCE, Variant
from vardrop import products

ROOT = Path(__file__).resolve().parent.parent
TINY = networks.Workload(lambda: networks.mlp(8, 8), 4, (8,))


class Machine:
    """A clock that only work moves on, and a machine that is slower in every round."""

    def __init__(self) -> None:
        self.now = 0.0
        self.slowness = 1.0
        self.log: list[str] = []
        self.collecting: list[bool] = []

    def work(self, name: str, seconds: float, slower: float = 1.0):
        def run() -> None:
            self.now += seconds * self.slowness
            self.slowness *= slower
            self.log.append(name)
            self.collecting.append(gc.isenabled())

        return run


def test_ratios_stand_beside_their_reference_however_the_machine_drifts() -> None:
    machine = Machine()
    variants = {"twice": machine.work("twice", 2.0), "half": machine.work("half", 0.5, slower=3.0)}
    pairs = interleaved(variants, machine.work("plain", 1.0), rounds=4, warmup=0, clock=lambda: machine.now)
    assert machine.log == ["plain", "twice", "plain", "half"] * 4
    assert pairs["twice"] == [Pair(2.0 * 3**k, 1.0 * 3**k) for k in range(4)]
    row = summarise("b", "twice", pairs["twice"])
    assert (row.ratio, row.quartiles) == (2.0, (2.0, 2.0))
    assert summarise("b", "half", pairs["half"]).ratio == 0.5


def test_warm_up_is_not_timed() -> None:
    machine = Machine()
    pairs = interleaved(
        {"a": machine.work("a", 1.0)}, machine.work("plain", 1.0), 2, warmup=3, clock=lambda: machine.now
    )
    assert len(pairs["a"]) == 2
    assert machine.log == ["plain"] * 3 + ["a"] * 3 + ["plain", "a"] * 2


@pytest.mark.parametrize("on", [True, False])
def test_garbage_is_not_collected_in_the_timed_part_and_the_switch_is_put_back(on: bool) -> None:
    machine = Machine()
    was_on = gc.isenabled()
    try:
        (gc.enable if on else gc.disable)()
        interleaved({"a": machine.work("a", 1.0)}, machine.work("plain", 1.0), 2, warmup=0, clock=lambda: machine.now)
        assert gc.isenabled() is on
    finally:
        (gc.enable if was_on else gc.disable)()
    assert machine.collecting == [False] * 4


def test_the_figure_is_the_median_of_ratios_with_its_quartiles() -> None:
    ratios = [1.0, 2.0, 3.0, 4.0, 100.0]
    row = summarise("b", "v", [Pair(ratio * k, k) for k, ratio in enumerate(ratios, 1)], goal=3.0)
    assert (row.ratio, row.quartiles, row.rounds) == (3.0, (2.0, 4.0), 5)
    assert row.amount == 9.0  # median of 1, 4, 9, 16, 500
    assert row.met is True


def test_one_round_is_its_own_range() -> None:
    row = summarise("b", "v", [Pair(3.0, 2.0)])
    assert (row.ratio, row.quartiles, row.met) == (1.5, (1.5, 1.5), None)


@pytest.mark.parametrize(
    ("ratio", "goal", "met"), [(2.0, 2.0, True), (2.01, 2.0, False), (1.0, None, None), (None, 2.0, None)]
)
def test_a_goal_is_an_upper_bound(ratio: float | None, goal: float | None, met: bool | None) -> None:
    assert Row("b", "v", ratio, goal=goal).met is met


ROWS = [
    Row("step", "plain", 1.0, (0.99, 1.01), 0.0931, rounds=5),
    Row("step", "noisy", 2.5, (2.4, 2.6), 1.5, rounds=5, goal=2.3),
    Row("step", "peer", note="cannot be used here: ImportError: no such thing"),
    Row("memory", "noisy", 0.5, (0.5, 0.5), 3 * 2**20, unit="bytes", rounds=1, goal=2.0),
]


def test_cells() -> None:
    assert table.cells(ROWS) == [
        ("step", "plain", "1.00", "0.99-1.01", "93.1 ms", "5", "", ""),
        ("", "noisy", "2.50", "2.40-2.60", "1.50 s", "5", "<= 2.3", "NO"),
        ("", "peer (cannot be used here: ImportError: no such thing)", "", "", "", "", "", ""),
        ("memory", "noisy", "0.50", "0.50-0.50", "3 MiB", "1", "<= 2", "yes"),
    ]


def test_the_plain_table_is_aligned() -> None:
    lines = table.plain(ROWS).splitlines()
    assert len(lines) == 2 + len(ROWS)
    assert lines[0].split() == list(table.HEADER)
    figures = {0: "ratio", 2: "1.00", 3: "2.50", 5: "0.50"}
    ends = [lines[number].index(figure) + len(figure) for number, figure in figures.items()]
    assert len(set(ends)) == 1


@pytest.mark.parametrize("rich", [True, False])
def test_every_row_is_shown_with_and_without_rich(
    rich: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if rich:
        pytest.importorskip("rich")
    else:
        monkeypatch.setitem(sys.modules, "rich.console", None)  # makes the import fail
    table.show(ROWS, "a title")
    shown = capsys.readouterr().out
    for words in ("a title", "plain", "2.40-2.60", "NO", "no such thing", "3 MiB"):
        assert words in shown


def test_the_file_says_what_was_measured_and_where(tmp_path: Path) -> None:
    table.write(ROWS, tmp_path / "figures.json")
    found = json.loads((tmp_path / "figures.json").read_text())
    assert found["torch"] == torch.__version__
    assert found["threads"] == torch.get_num_threads()
    assert found["device"]
    assert found["date"][:2] == "20"
    assert found["libraries"]["vardrop"]
    assert [row["met"] for row in found["rows"]] == [None, False, None, True]
    assert found["rows"][1]["quartiles"] == [2.4, 2.6]


def test_dropout_is_put_before_every_layer() -> None:
    dropout = next(v for v in OURS if v.name.startswith("nn.Dropout"))
    net = dropout.prepare(networks.mlp(8, 8))
    assert [layer.p for layer in net.modules() if isinstance(layer, nn.Dropout)] == [0.2, 0.5, 0.5, 0.5]


@pytest.mark.parametrize("variant", [*OURS, REFERENCE], ids=lambda v: v.name)
def test_every_variant_reaches_every_parameter_of_both_networks(variant: Variant) -> None:
    for workload in (TINY, networks.Workload(networks.cnn, 2, (3, 32, 32))):
        made: list[nn.Module] = []

        def prepare(net: nn.Sequential, made: list[nn.Module] = made) -> nn.Module:
            made.append(variant.prepare(net))
            return made[-1]

        Variant(variant.name, prepare, variant.estimator, variant.divergence).step(workload)()
        assert all(p.grad is not None for p in made[0].parameters())


def test_the_table_has_the_reference_against_itself_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(training_step.WORKLOADS, "mlp-128", TINY)
    rows = training_step.measure("mlp-128", OURS[:2], rounds=2, warmup=1)
    assert [row.variant for row in rows] == [REFERENCE.name, OURS[0].name, OURS[1].name]
    assert [row.goal for row in rows] == [None, None, 2.6]
    assert all(row.rounds == 2 and row.ratio is not None and row.ratio > 0 for row in rows)


def test_per_example_is_scaled_to_the_whole_minibatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        training_step, "interleaved", lambda variants, *_, **__: {name: [Pair(2.0, 1.0)] for name in variants}
    )
    (row,) = training_step.per_example(50, rounds=1)
    assert (row.ratio, row.amount) == (40.0, 40.0)
    assert "50 examples of 1000" in row.note


def test_divergences_are_a_share_of_the_plain_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(divergence, "mlp", lambda: networks.mlp(8, 8))
    monkeypatch.setitem(divergence.WORKLOADS, "mlp-1000", TINY)
    rows = divergence.measure(divergence.DIVERGENCES, rounds=1, warmup=0)
    assert [row.goal for row in rows] == [0.15, None, None, None, None]


def test_prediction_is_measured_against_a_loop_of_the_same_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(model: nn.Module, x: torch.Tensor) -> None:
        raise ModuleNotFoundError("No module named 'absent'")

    monkeypatch.setattr(prediction, "PASSES", 5)
    monkeypatch.setattr(
        prediction, "PEERS", {"absent": absent, "itself": lambda model, x: lambda: prediction.loop(model, x)}
    )
    cases = [prediction.Case("mlp", lambda: prediction.noisy_mlp(8, 8), (3, 8), 0.5)]
    ours, peer, missing = prediction.measure(cases, rounds=1, warmup=0)
    assert (ours.variant, ours.goal, ours.note) == ("mlp", 0.5, "vmap, 5 at once")
    assert (peer.variant, peer.goal) == ("mlp: itself", None)
    assert missing.note == "cannot be used here: ModuleNotFoundError: No module named 'absent'"


@pytest.mark.parametrize("case", prediction.CASES, ids=lambda case: case.name)
def test_the_models_of_the_prediction_benchmark_are_noisy_in_the_loop_too(case: prediction.Case) -> None:
    x = torch.randn(1, *case.shape[1:])
    passes = prediction.loop(case.model(), x)
    assert len(passes) == prediction.PASSES
    assert (passes.std(0) > 0).any()


def test_peers_are_measured_or_named_with_the_reason() -> None:
    variants, missing = peers.find()
    for name in peers._LIBRARIES:
        assert any(v.name.startswith(name) for v in variants) != (name in missing)
    assert all(reason.startswith("cannot be used here: ") for reason in missing.values())


def test_a_broken_peer_is_a_row_not_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> list[Variant]:
        raise ModuleNotFoundError("No module named 'absent'")

    def broken() -> list[Variant]:
        def prepare(net: nn.Sequential) -> nn.Module:
            raise RuntimeError("operator is gone\nand more")

        return [Variant("broken", prepare)]

    monkeypatch.setattr(peers, "_LIBRARIES", {"absent": absent, "broken": broken})
    variants, missing = peers.find()
    assert variants == []
    assert missing == {
        "absent": "cannot be used here: ModuleNotFoundError: No module named 'absent'",
        "broken": "cannot be used here: RuntimeError: operator is gone",
    }


def test_memory_pairs_every_variant_with_the_reference_of_its_round(monkeypatch: pytest.MonkeyPatch) -> None:
    readings = iter([100, 250, 200, 400])
    monkeypatch.setattr(memory, "_in_a_process", lambda name: next(readings))
    plain, noisy = memory.measure(OURS[:1], rounds=2)
    assert (plain.ratio, noisy.ratio, noisy.unit, noisy.amount) == (1.0, 2.25, "bytes", 325)


def test_a_process_that_fails_says_so() -> None:
    with pytest.raises(RuntimeError, match="measures the memory of 'nothing of the kind' failed: KeyError"):
        memory._in_a_process("nothing of the kind")


@pytest.mark.skipif(not memory._STATUS.exists(), reason="the system does not tell what a process holds now")
def test_peak_memory_is_of_the_step_and_of_nothing_before_it() -> None:
    """In a process of its own: one that has freed memory before may not need more of the system's."""
    code = """
import torch
from functools import partial
from torch import nn
from benchmarks import memory
from benchmarks.networks import Workload, mlp
from benchmarks.variants import REFERENCE, Variant

class Hungry(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net
    def forward(self, x):
        torch.ones(64 * 2**20, dtype=torch.uint8)  # 64 MiB, for a moment
        return self.net(x)

memory.WORKLOAD = Workload(partial(mlp, inputs=8, width=8), 4, (8,))
torch.ones(256 * 2**20, dtype=torch.uint8)  # a higher peak, before
print(memory.peak_bytes(REFERENCE), memory.peak_bytes(Variant("hungry", Hungry)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    small, large = (int(word) / 2**20 for word in done.stdout.split())
    assert 0 <= small < 32
    assert 58 < large < 128


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "benchmarks", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_help_names_every_benchmark_and_option(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="0"):
        command.main(["--help"])
    words = capsys.readouterr().out
    for name in (*command.PLANS, "--quick", "--only", "--variant", "--rounds", "--mkl", "--out"):
        assert name in words


def test_products_by_mkl_are_said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(products, "_WORTH", products._WORTH)  # put back afterwards
    command.main(["--mkl", "--only", "kl", "--variant", "GaussianPosterior", "--rounds", "1"])
    assert sys.maxsize == products._WORTH
    assert "products by MKL" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--only", "speed"], "invalid choice: 'speed'"),
        (["--rounds", "0"], "invalid positive whole number value: '0'"),
        (["--out", "no/such/folder/figures.json"], "--out must name a file in a folder that exists, got no/such"),
        (["--variant", "no such", "--only", "kl"], "no variant of these benchmarks has 'no such' in its name"),
    ],
)
def test_bad_arguments_are_one_line_and_status_2(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command.main(arguments)
    assert words in capsys.readouterr().err


def test_a_full_disk_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(command, "_run", lambda *_: ROWS)
    monkeypatch.setattr(table, "write", full)
    with pytest.raises(SystemExit, match="2"):
        command.main(["--out", str(tmp_path / "figures.json")])
    said = capsys.readouterr()
    assert "--out could not be written: [Errno 28] No space left on device" in said.err
    assert "2.40-2.60" in said.out  # the table came first


@pytest.mark.slow
def test_a_quick_run_finishes_with_every_benchmark(tmp_path: Path) -> None:
    done = run("--quick", "--out", str(tmp_path / "figures.json"))
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert {row["benchmark"] for row in rows} == set(command.PLANS)
    assert all(row["ratio"] or row["note"] for row in rows)


# -------------------------------------------------------------------------------------------------- work that is left


def _net(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, width), nn.ReLU(), nn.Flatten(), nn.Linear(width, 2), nn.Softmax(-1)).eval()


def test_numbers_that_are_written_are_those_of_no_product() -> None:
    x = torch.randn(5, 6)
    assert work.operations(_net(8), x).written == 5 * 8 + 5 * 2  # rectified, and softmax
    assert work.operations(nn.Sequential(nn.Linear(6, 8), nn.ReLU(inplace=True)), x).written == 5 * 8


def test_what_is_left_of_the_work_lies_between_products_and_the_rest() -> None:
    x = torch.randn(5, 6)
    assert 0 < work.operations(_net(8), x).products < 1
    assert work.left(_net(8), _net(8), x, 1.0) == pytest.approx(1)
    rest = work.operations(_net(4), x).written / work.operations(_net(8), x).written
    assert min(0.1, rest) < work.left(_net(8), _net(4), x, 0.1) < max(0.1, rest)


def test_nothing_is_dead_in_a_network_that_was_revived() -> None:
    dense = compact.mlp(torch.Generator().manual_seed(0))
    alive = compact._revived(dense, torch.Generator().manual_seed(1))
    assert any(bool((p == 0).any()) for p in dense.parameters())
    assert all(bool((p != 0).all()) for p in alive.parameters())


@pytest.mark.parametrize("name", ["LeNet-300-100", "LeNet-5", "residual network"])
def test_one_unit_of_every_layer_is_left_of_the_network_that_measures_calls(name: str) -> None:
    make, shape = compact.NETWORKS[name]
    net = make(torch.Generator().manual_seed(0), alive=0).eval()
    small = vd.compact(net, torch.randn(2, *shape))
    before, after = (
        [module.weight for module in each.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for each in (net, small)
    )
    assert len(before) == len(after)  # as many calls as before
    assert [len(weight) for weight in after] == [1] * (len(after) - 1) + [10]
