"""Cells that sweeps are tested with; what a worker has to import for them is little."""

from __future__ import annotations

import os
import time
from pathlib import Path

import torch

from vardrop.reproduce import unfinished
from vardrop.reproduce.experiment import Experiment


def run_cell(config):
    """A number that depends on torch's own generator, as networks' weights do; some configurations go wrong."""
    if "log" in config:
        with Path(config["log"]).open("a") as log:
            log.write(f"{config['i']} {os.getpid()} {torch.get_num_threads()}\n")
    if config.get("fails"):
        raise ValueError("vardrop.data: it must be there, got nothing; get it")
    if config.get("bug"):
        return [{"x": int("one")}]
    if config.get("stops"):
        raise KeyboardInterrupt
    if config.get("dies"):
        os._exit(1)
    if config.get("odd"):
        return [{"x": torch.ones(())}]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config["seed"])
        time.sleep(config.get("sleep", 0.0))
        return [{"i": config["i"], "x": torch.randn(2000).exp().sum().item()}]


def count(cells=4, alone=False, each=(), **every) -> Experiment:
    """An experiment of a few cells; ``each`` adds entries to some of them."""
    configs = [{"i": i, "seed": i, **every, **dict(each).get(i, {})} for i in range(cells)]
    return Experiment("count", "Numbers.", lambda scale: configs, run_cell, alone=alone)


class Stopped(BaseException):
    """What no code of ours catches, as a kill."""


def run_long_cell(config):
    """Four random numbers that are kept one by one; a file makes it stop, once, after two of them."""
    torch.manual_seed(config["seed"])
    rows = (unfinished.found() or {"rows": []})["rows"]
    stop = Path(config["stop"])
    while len(rows) < 4:
        rows.append({"i": len(rows), "x": torch.rand(()).item()})
        unfinished.keep({"rows": rows})
        if stop.exists() and len(rows) == 2:
            stop.unlink()
            raise Stopped
    return rows


def long(stop: Path) -> Experiment:
    """Two cells of it."""
    configs = [{"seed": seed, "stop": str(stop / str(seed))} for seed in range(2)]
    return Experiment("long", "Numbers.", lambda scale: configs, run_long_cell)
