from __future__ import annotations

import errno
import json
import os
import subprocess
import sys

import pytest
import torch

import vardrop
from commands import refused
from vardrop import cli
from vardrop.data import listing
from vardrop.methods import METHODS
from vardrop.training import Config
from vardrop.training import files as files_module
from vardrop.training.config import ACCELERATORS, PRECISIONS, STRATEGIES
from vardrop.weights.estimators import NAMES as ESTIMATORS

FAST = ["--model", "mlp:1x8", "--epochs", "2", "--average", "0.9", "--no-progress"]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose by more, on a busy machine a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_train_writes_the_folder_and_says_what_came_out(vardrop_, tmp_path):
    status, out, err = vardrop_("train", "--out", tmp_path / "run", *FAST, "--sharing", "layer", "--seed", 4)
    assert (status, err) == (0, "")
    names = {path.name for path in (tmp_path / "run").iterdir()}
    assert names == {
        "config.json", "metrics.jsonl", "summary.json", "model.safetensors", "checkpoint.safetensors",
        "examples.safetensors", "report.html",
    }  # fmt: skip
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["config"] == vars(Config(model="mlp:1x8", epochs=2, average=0.9, sharing="layer", seed=4))
    assert f"{100 * summary['test_error']:.2f} %" in out
    assert str(tmp_path / "run" / "report.html") in out


def test_resume_takes_the_options_that_are_left_out_from_the_run(vardrop_, tmp_path):
    assert vardrop_("train", "--out", tmp_path, *FAST, "--lr", 0.01, "--method", "vd-b")[0] == 0
    status, _, err = vardrop_("train", "--out", tmp_path, "--resume", "--epochs", 3, "--no-progress")
    assert (status, err) == (0, "")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["epochs_run"] == 3
    assert (summary["config"]["lr"], summary["config"]["method"]) == (0.01, "vd-b")
    status, _, err = vardrop_("train", "--out", tmp_path, "--resume", "--lr", 0.1)
    assert status == 2
    assert "holds a run with other options (lr 0.01 there and 0.1 here)" in err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--data", "mnits"], "mnist"),
        (["--data", "nothing.csv"], r"nothing\.csv"),
        (["--model", "mpl:3"], r"a model must be .*got 'mpl:3'"),
        (["--method", "vdd"], "method must be one of none, .* got 'vdd'"),
        (["--method", "none", "--sharing", "layer"], "methods that learn shared rates"),
        (["--epochs", "0"], "epochs must be at least 1, got 0"),
        (["--epochs", "many"], "Invalid value for '--epochs'"),
        (["--lr", "-1"], "lr must be positive and finite, got -1"),
        (["--average", "1"], "average must be at least 0 and below 1"),
        (["--validation", "5000"], "size must leave at least one of the 1438 training rows"),
        (["--estimator", "worst"], "estimator must be one of local"),
        (["--strategy", "dp"], "strategy must be one of auto, ddp, fsdp2"),
        (["--split", "-1"], "split must be 0 or more, got -1"),
        (["--epoch", "3"], "No such option: --epoch"),
    ],
)
def test_what_a_user_can_put_right_is_one_line(vardrop_, tmp_path, arguments, words):
    refused(vardrop_("train", "--out", tmp_path / "run", *arguments), words)
    assert not (tmp_path / "run" / "checkpoint.safetensors").exists()


def test_a_missing_data_set_says_where_it_looked_and_how_to_get_it(vardrop_, tmp_path, monkeypatch):
    monkeypatch.setenv("VARDROP_DATA", str(tmp_path / "there"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    result = vardrop_("train", "--data", "mnist", "--data-dir", tmp_path / "here", "--out", tmp_path / "run")
    refused(result, rf"{tmp_path}/here.*{tmp_path}/there.*vardrop data --download mnist")


def test_a_missing_option_is_named(vardrop_):
    refused(vardrop_("train"), "Missing option '--out'")


def test_a_folder_with_a_run_is_not_overwritten(vardrop_, tmp_path):
    assert vardrop_("train", "--out", tmp_path, *FAST)[0] == 0
    before = (tmp_path / "summary.json").read_bytes()
    refused(vardrop_("train", "--out", tmp_path, *FAST), "holds a finished run; choose another, or go on with --resume")
    assert (tmp_path / "summary.json").read_bytes() == before


def test_a_corrupt_checkpoint_is_one_line(vardrop_, tmp_path):
    assert vardrop_("train", "--out", tmp_path, *FAST)[0] == 0
    (tmp_path / "checkpoint.safetensors").write_bytes(b"\x00" * 100)
    refused(vardrop_("train", "--out", tmp_path, "--resume", "--epochs", 3), "checkpoint.safetensors is damaged")


def test_a_full_disk_is_one_line_and_loses_nothing(vardrop_, tmp_path, monkeypatch):
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert vardrop_("train", "--out", tmp_path, *FAST)[0] == 0
    monkeypatch.setattr(files_module.os, "fsync", full)
    refused(vardrop_("train", "--out", tmp_path, "--resume", "--epochs", 4), r"No space left on device.*--resume")
    monkeypatch.undo()
    status, _, err = vardrop_("train", "--out", tmp_path, "--resume", "--epochs", 4, "--no-progress")
    assert (status, err) == (0, "")


def test_a_folder_that_cannot_be_made_is_one_line(vardrop_, tmp_path):
    (tmp_path / "file").write_text("")
    refused(vardrop_("train", "--out", tmp_path / "file", *FAST), "cannot write .*file")
    refused(vardrop_("train", "--out", tmp_path / "file" / "below", *FAST), "cannot write .*Not a directory")
    refused(vardrop_("report", tmp_path / "nothing"), "nothing")


def test_nan_in_the_data_is_one_line(vardrop_, tmp_path):
    rows = "\n".join(f"{i},{i % 7},{i * 2}" for i in range(50))
    (tmp_path / "bad.csv").write_text(f"a,b,y\n{rows}\nnan,1,3\n")
    refused(vardrop_("train", "--data", tmp_path / "bad.csv", "--out", tmp_path / "run"), "bad.csv")


def test_a_run_that_diverges_is_one_line(vardrop_, tmp_path):
    result = vardrop_("train", "--out", tmp_path, *FAST, "--lr", "1e38", "--method", "none", "--seed", "1")
    refused(result, "is not finite in .* of epoch 1; the checkpoint of epoch 0 is kept in .*; a lower lr often helps")
    assert (tmp_path / "checkpoint.safetensors").exists()


def test_an_error_nobody_foresaw_keeps_its_traceback(monkeypatch):
    monkeypatch.setattr(cli, "app", lambda **_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        cli.main([])


def test_a_missing_extra_says_how_to_install_it(vardrop_, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "vardrop.report", None)
    monkeypatch.setitem(sys.modules, "pooch", None)
    for name in [name for name in sys.modules if name.startswith("vardrop.data")]:
        monkeypatch.delitem(sys.modules, name)
    refused(vardrop_("data"), r"needs pooch, which is not installed; install it by pip install 'vardrop\[train\]'")


def test_stopping_by_hand_says_how_to_go_on(vardrop_, monkeypatch):
    def stop(**_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", stop)
    assert vardrop_("train") == (
        130,
        "",
        "vardrop: error: stopped; what is finished is kept: train goes on with --resume, reproduce by itself\n",
    )


def test_only_the_first_process_speaks(vardrop_, monkeypatch, tmp_path):
    monkeypatch.setenv("RANK", "1")
    assert vardrop_("train", "--out", tmp_path, "--method", "x") == (2, "", "")


def test_help_teaches(vardrop_):
    status, out, _ = vardrop_("train", "--help")
    assert status == 0
    for words in (
        "vardrop train --out runs/first",
        "--resume",
        *METHODS,
        *ESTIMATORS,
        *ACCELERATORS,
        *STRATEGIES,
        *PRECISIONS,
    ):
        assert words in out
    for command in ("report", "data", "demo"):
        assert f"vardrop {command}" in vardrop_(command, "--help")[1]
    assert "reproduce" in vardrop_()[1]


def test_every_option_of_the_config_is_one_of_the_command_line(vardrop_):
    out = vardrop_("train", "--help")[1]
    assert [name for name in vars(Config()) if f"--{name.replace('_', '-')}" not in out] == []


def test_version(vardrop_):
    assert vardrop_("--version") == (0, f"vardrop {vardrop.__version__}\n", "")


def test_report_is_made_again_from_the_files(vardrop_, tmp_path):
    assert vardrop_("train", "--out", tmp_path, *FAST)[0] == 0
    (tmp_path / "report.html").unlink()
    status, out, err = vardrop_("report", tmp_path)
    assert (status, err) == (0, "")
    assert str(tmp_path / "report.html") in out
    assert (tmp_path / "report.html").exists()


def test_data_lists_and_downloads(vardrop_, tmp_path, monkeypatch):
    status, out, _ = vardrop_("data")
    assert status == 0
    assert "digits" in out
    assert "cifar10" in out
    assert "uci:protein-tertiary-structure " in out  # names are whole, however narrow the screen
    how = out.partition("how to get what is not here:")[2]
    here = {found.name: found.where is not None for found in listing()}
    assert ("  mnist: `vardrop data --download mnist`" in how) is not here["mnist"]
    asked = []
    monkeypatch.setattr("vardrop.data.download", lambda name, root: asked.append((name, root)) or root / name)
    status, out, _ = vardrop_("data", "--download", "mnist", "--download", "cifar10", "--data-dir", tmp_path)
    assert asked == [("mnist", tmp_path), ("cifar10", tmp_path)]
    assert f"mnist: {tmp_path}/mnist" in out
    refused(vardrop_("data", "--download"), "requires an argument")


def test_the_demo_compares_three_methods(vardrop_, tmp_path):
    status, out, err = vardrop_("demo", "--out", tmp_path, "--epochs", 2)
    assert (status, err) == (0, "")
    for method in ("none", "binary", "vd-a2"):
        assert method in out
        assert (tmp_path / method / "report.html").exists()
    assert "test error" in out
    assert str(tmp_path / "report.html") in out
    assert vardrop_("demo", "--out", tmp_path, "--epochs", 2)[0] == 0  # a second time, and nothing is in the way


def test_reproduce_hands_its_arguments_on(vardrop_):
    status, out, err = vardrop_("reproduce", "list")
    assert (status, err) == (0, "")
    assert "speed" in out
    assert "vardrop reproduce" in vardrop_("reproduce", "--help")[1]


def test_as_a_program_it_starts_without_the_heavy_libraries_and_warns_of_nothing(tmp_path):
    heavy = ("lightning_fabric", "sklearn", "pooch", "plotly", "tensorboard")
    code = f"import sys; import vardrop.cli; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("[]", "")
    command = [sys.executable, "-m", "vardrop.cli", "train", "--out", str(tmp_path / "run"), *FAST, "--tensorboard"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONWARNINGS"}
    environment["OMP_NUM_THREADS"] = "1"
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (done.returncode, done.stderr) == (0, "")
    assert list((tmp_path / "run" / "tensorboard").iterdir())
    bad = subprocess.run([*command, "--method", "x"], capture_output=True, text=True, env=environment)
    assert bad.returncode == 2
    assert bad.stderr.count("\n") == 1


def test_the_program_without_its_extra_says_how_to_get_it():
    code = "import sys; sys.modules['typer'] = None; import vardrop.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "vardrop: error: the command line needs typer; install it by pip install 'vardrop[train]'\n"
