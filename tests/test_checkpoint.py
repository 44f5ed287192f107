"""Nothing is lost: killed at any moment, on a full disk, over damaged files."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from vardrop.training import Config, load_model, train
from vardrop.training import files as files_module
from vardrop.training.files import read_tensors, write_atomically, write_tensors

SMALL = Config(model="mlp:1x8", method="vd-a", epochs=4, average=0.9, warmup=2, batch_size=256, seed=3)
TRAIN = [
    sys.executable, "-c",
    "import sys, dataclasses, json; from pathlib import Path; from vardrop.training import Config, train;"
    "train(Config(**json.loads(sys.argv[1])), Path(sys.argv[2]), resume=True, progress=False)",
]  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose by more, on a busy machine a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Killed(BaseException):
    """What a process does not live to handle."""


def results(run: Path) -> tuple:
    """All that a run leaves, but for the time it took."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    summary = json.loads((run / "summary.json").read_text())
    for told in (*lines, summary):
        told.pop("seconds")
    tensors = {
        f"{name}/{key}": tensor.numpy().tobytes()
        for name in ("model", "examples", "checkpoint")
        for key, tensor in load_file(run / f"{name}.safetensors").items()
    }
    return lines, summary, tensors


def same(run: Path, other: Path) -> None:
    (lines, summary, tensors), (their_lines, their_summary, their_tensors) = results(run), results(other)
    assert lines == their_lines
    assert summary == their_summary
    assert [key for key in tensors if tensors[key] != their_tensors[key]] == []
    assert tensors.keys() == their_tensors.keys()


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that was left alone."""
    out = tmp_path_factory.mktemp("straight") / "run"
    train(SMALL, out, progress=False)
    return out


def count_writes(monkeypatch, tmp_path) -> int:
    writes = []
    monkeypatch.setattr(files_module.os, "replace", lambda a, b, replace=os.replace: (writes.append(b), replace(a, b)))
    train(SMALL, tmp_path / "counted", progress=False)
    monkeypatch.undo()
    return len(writes)


def test_dying_before_or_after_any_write_changes_no_bit(monkeypatch, tmp_path, straight):
    total = count_writes(monkeypatch, tmp_path)
    assert total == 1 + (1 + SMALL.epochs) + 3  # config; a checkpoint at the start and after every epoch; the results
    for moment in range(total):
        for after in (False, True):
            seen = 0

            def replace(source, target, replace=os.replace, moment=moment, after=after):
                nonlocal seen
                seen += 1
                if seen == moment + 1 and not after:
                    raise Killed
                replace(source, target)
                if seen == moment + 1:
                    raise Killed

            out = tmp_path / f"{moment}-{after}"
            monkeypatch.setattr(files_module.os, "replace", replace)
            with pytest.raises(Killed):
                train(SMALL, out, progress=False)
            monkeypatch.undo()
            train(SMALL, out, resume=True, progress=False)
            same(out, straight)


def test_killed_by_sigkill_at_random_moments_a_run_ends_bit_identical(tmp_path):
    config = Config(**vars(SMALL) | {"epochs": 400, "patience": 0})
    out, kills = tmp_path / "killed", 0
    arguments = [*TRAIN, json.dumps(vars(config)), str(out)]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    moments = random.Random(11)  # where exactly in its work this finds the process is left to chance

    def epochs() -> int:
        return len((out / "metrics.jsonl").read_bytes().splitlines()) if (out / "metrics.jsonl").exists() else 0

    for _ in range(3):
        before = epochs()
        process = subprocess.Popen(arguments, env=environment, stderr=subprocess.PIPE)
        while process.poll() is None and epochs() < before + 5:
            time.sleep(0.002)
        time.sleep(moments.uniform(0, 0.1))
        process.send_signal(signal.SIGKILL)
        _, words = process.communicate()
        assert process.returncode in (0, -signal.SIGKILL), words
        kills += process.returncode == -signal.SIGKILL
    assert kills >= 2
    done = subprocess.run(arguments, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert list(out.glob(".*.tmp")) == []

    train(config, tmp_path / "alone", progress=False)
    same(out, tmp_path / "alone")


def test_longer_training_is_the_same_as_going_on(tmp_path, straight):
    out = tmp_path / "run"
    train(Config(**vars(SMALL) | {"epochs": 2}), out, progress=False)
    summary = train(SMALL, out, resume=True, progress=False)
    assert summary["epochs_run"] == 4
    same(out, straight)


def test_a_finished_run_is_not_run_again(straight):
    before = {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}
    summary = train(SMALL, straight, resume=True, progress=False)
    assert summary == json.loads((straight / "summary.json").read_text())
    assert before == {path.name: path.stat().st_mtime_ns for path in straight.iterdir()}


def test_resume_where_nothing_is_starts(tmp_path, straight):
    train(SMALL, tmp_path / "new", resume=True, progress=False)
    same(tmp_path / "new", straight)


def test_half_a_line_of_metrics_is_dropped(tmp_path, straight):
    out = tmp_path / "run"
    train(Config(**vars(SMALL) | {"epochs": 2}), out, progress=False)
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 3, "train_nll": 1.0}\n{"epoch": 4, "tra')
    train(SMALL, out, resume=True, progress=False)
    same(out, straight)


def refused(resume: bool, on_resume: str, else_: str):
    return pytest.raises(ValueError, match=on_resume) if resume else pytest.raises(FileExistsError, match=else_)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_another_run_is_refused(tmp_path, resume):
    train(Config(**vars(SMALL) | {"epochs": 1}), tmp_path, progress=False)
    words = r"holds a run with other options \(lr 0\.001 there and 0\.1 here, seed 3 there and 4 here\)"
    with refused(resume, words, "which holds a finished run") as caught:
        train(Config(**vars(SMALL) | {"lr": 0.1, "seed": 4}), tmp_path, resume=resume, progress=False)
    assert str(tmp_path) in str(caught.value)
    (tmp_path / "summary.json").unlink()
    with refused(resume, "other options", "which holds an unfinished run"):
        train(Config(**vars(SMALL) | {"lr": 0.1, "seed": 4}), tmp_path, resume=resume, progress=False)


@pytest.fixture
def unfinished(tmp_path) -> Path:
    train(Config(**vars(SMALL) | {"epochs": 1}), tmp_path / "run", progress=False)
    return tmp_path / "run"


def flip(content: bytes) -> bytes:
    return content[:-5] + bytes([content[-5] ^ 1]) + content[-4:]


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda content: content[: len(content) // 2], "is damaged or no safetensors file"),
        (lambda content: b"hello", "is damaged or no safetensors file"),
        (lambda content: b"", "is damaged or no safetensors file"),
        (flip, "is damaged, its checksum is wrong; remove it to start again"),
    ],
    ids=["truncated", "garbage", "empty", "flipped"],
)
def test_damaged_checkpoints_are_refused_and_left(unfinished, damage, words):
    path = unfinished / "checkpoint.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    before = path.read_bytes(), (unfinished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=words):
        train(SMALL, unfinished, resume=True, progress=False)
    assert before == (path.read_bytes(), (unfinished / "metrics.jsonl").read_bytes())


def test_foreign_checkpoints_are_refused(unfinished):
    path = unfinished / "checkpoint.safetensors"
    tensors, about = read_tensors(path)
    save_file(tensors, path)
    with pytest.raises(ValueError, match="was not written by vardrop"):
        train(SMALL, unfinished, resume=True, progress=False)
    write_tensors(path, tensors, about | {"format": "vardrop checkpoint 0"})
    with pytest.raises(ValueError, match="must be a checkpoint of this version, got format 'vardrop checkpoint 0'"):
        train(SMALL, unfinished, resume=True, progress=False)
    write_tensors(path, tensors, about | {"config": about["config"] | {"method": "vd-b"}})
    with pytest.raises(ValueError, match="of a run with other options \\(method 'vd-b' there and 'vd-a' here\\)"):
        train(SMALL, unfinished, resume=True, progress=False)
    write_tensors(path, tensors | {"model.network.2.weight": torch.zeros(3)}, about)
    with pytest.raises(ValueError, match=r"does not fit the model, first in 'model\.network\.2\.weight'"):
        train(SMALL, unfinished, resume=True, progress=False)
    write_tensors(path, tensors, about)
    assert train(SMALL, unfinished, resume=True, progress=False)["epochs_run"] == 4


def test_on_a_full_disk_nothing_is_lost(monkeypatch, tmp_path, straight):
    out, writes = tmp_path / "run", 0

    def full(handle, fsync=os.fsync):
        nonlocal writes
        writes += 1
        if writes > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(handle)

    monkeypatch.setattr(files_module.os, "fsync", full)
    with pytest.raises(
        OSError, match=r"cannot write .*run.* \(No space left on device\); files written before are kept"
    ):
        train(SMALL, out, progress=False)
    monkeypatch.undo()
    assert list(out.glob(".*.tmp")) == []
    read_tensors(out / "checkpoint.safetensors")
    train(SMALL, out, resume=True, progress=False)
    same(out, straight)


def test_write_atomically_leaves_the_old_file_where_it_fails(monkeypatch, tmp_path):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    monkeypatch.setattr(files_module.os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "broken")))
    with pytest.raises(OSError, match=r"cannot write .*file \(broken\)"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_tensors_come_back_with_what_is_told_about_them(tmp_path):
    tensors = {
        "a": torch.arange(3),
        "b": torch.zeros(0),
        "c": torch.ones(2, 2, dtype=torch.bfloat16),
        "d": torch.ones(()),
    }
    write_tensors(tmp_path / "file", tensors, {"told": {"x": [1, 2.5, None]}})
    found, about = read_tensors(tmp_path / "file")
    assert about == {"told": {"x": [1, 2.5, None]}}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_missing_and_foreign_models_are_refused(tmp_path, unfinished):
    with pytest.raises(FileNotFoundError, match=r"there is no file .*model.safetensors"):
        load_model(tmp_path)
    tensors, about = read_tensors(unfinished / "model.safetensors")
    write_tensors(unfinished / "model.safetensors", tensors, {})
    with pytest.raises(ValueError, match="must be the model of a run, got a file without its config"):
        load_model(unfinished)
    write_tensors(unfinished / "model.safetensors", {"x": torch.ones(1)}, about)
    with pytest.raises(ValueError, match="does not fit its own config"):
        load_model(unfinished)
