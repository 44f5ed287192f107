"""A network that the noise has taken over says so."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from vardrop.data import load
from vardrop.training import Config, train
from vardrop.training.guessing import error_of_guessing, notes


def test_a_guess_is_the_answer_that_is_best_for_training():
    data = load("digits")
    data = dataclasses.replace(data, train_y=torch.tensor([3, 3, 1]), test_y=torch.tensor([3, 1, 3, 0]))
    assert error_of_guessing(data) == 0.5
    numbers = dataclasses.replace(data, task="regression", train_y=torch.tensor([[1.0], [3.0]]))
    numbers = dataclasses.replace(numbers, test_y=torch.tensor([[2.0], [5.0]]))
    assert error_of_guessing(numbers) == pytest.approx((9 / 2) ** 0.5)


def test_only_what_is_no_better_is_told():
    data = load("digits")
    guess = error_of_guessing(data)
    assert notes(data, 0.5 * guess, learned=True) == []
    (note,) = notes(data, guess, learned=True)
    assert "no better than a guess" in note
    assert "--warmup" in note
    assert "--warmup" not in notes(data, guess, learned=False)[0]


def test_a_run_that_collapsed_says_so_in_its_summary(tmp_path: Path):
    """The whole divergence from the first step on, with a few examples for many weights."""
    config = Config(model="mlp:2x200", method="sparse-vd", warmup=0, epochs=15, lr=1e-2, average=0.0, patience=0)
    summary = train(config, tmp_path, progress=False)
    assert "no better than a guess" in summary["notes"][0]
    assert json.loads((tmp_path / "summary.json").read_text())["notes"] == summary["notes"]
    assert train(Config(model="mlp:1x32", epochs=5), tmp_path / "good", progress=False)["notes"] == []
