"""Two processes under torchrun, on CPUs with gloo: this file is also what they run, with a strategy and a folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

import vardrop as vd
from vardrop.methods import prepare
from vardrop.training import Config, load_task, train
from vardrop.training.task import Categorical, Task

STRATEGIES = ("ddp", "fsdp2")
ROWS, REPEATS = 16, 300
QUIET = Config(
    model="mlp:2x16", method="vd-a2", estimator="none", epochs=2, batch_size=101, average=0.9, patience=0, lr=3e-3
)  # 1,294 rows: the last batch has 82


def a_task() -> tuple[Task, vd.ELBO]:
    torch.manual_seed(5)
    network, _, _ = prepare("vd-b", "mlp:1x6", (4,), 3)
    return Task(network, Categorical()), vd.ELBO(network, num_data=20)  # few data: the KL weighs as much as the nll


def a_batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(6)
    return torch.randn(ROWS, 4, generator=generator), torch.randint(3, (ROWS,), generator=generator)


def gradients(forward, task: Task, elbo: vd.ELBO, x: Tensor, y: Tensor, backward) -> dict[str, Tensor]:
    from vardrop.training.sharding import whole

    task.zero_grad()
    backward(elbo(forward(x, y)[1].mean()))
    return {name: whole(p.grad).clone() for name, p in task.named_parameters()}


def repeated(*args) -> dict[str, Tensor]:
    every = [gradients(*args) for _ in range(REPEATS)]
    return {name: torch.stack([one[name] for one in every]) for name in every[0]}


def work(strategy: str, out: Path) -> None:
    """What each of the two processes does."""
    from vardrop.training.devices import gather, make_fabric, seed_noise
    from vardrop.training.sharding import whole

    fabric = make_fabric(Config(strategy=strategy, devices=2))
    task, elbo = a_task()
    model = fabric.setup_module(task)
    seed_noise(0, fabric.global_rank)
    x, y = a_batch()
    found: dict[str, object] = {}
    with torch.no_grad():
        model.train()
        found["outputs"] = gather(fabric, model(x, y)[0])  # the same rows in both
        model.eval()
        found["means"] = gather(fabric, model(x, y)[0])
    model.train()
    half = slice(fabric.global_rank, None, 2)
    with vd.estimator("none"):
        found["quiet"] = gradients(model, task, elbo, x[half], y[half], fabric.backward)
    found["noisy"] = repeated(model, task, elbo, x[half], y[half], fabric.backward)
    found["kl"] = gather(fabric, vd.kl_divergence(task.network).detach())
    found["weights"] = {name: whole(p) for name, p in task.named_parameters()}
    found["sharded"] = any(type(p).__name__ == "DTensor" for p in task.parameters())

    summary = train(Config(**vars(QUIET) | {"devices": 2, "strategy": strategy}), out / "run", progress=False)
    if fabric.is_global_zero:
        torch.save(found, out / "found.pt")
        (out / "returned.json").write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("distributed")


@pytest.fixture(scope="module", params=STRATEGIES)
def two(request, folder) -> Path:
    """The folder that two processes have filled."""
    out = folder / request.param
    out.mkdir()
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, __file__, request.param, str(out)], capture_output=True, text=True, env=environment, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return out


@pytest.fixture(scope="module")
def found(two) -> dict:
    return torch.load(two / "found.pt")


@pytest.fixture(scope="module")
def one(folder) -> Path:
    """The run of a single process."""
    train(QUIET, folder / "one", progress=False)
    return folder / "one"


def test_noise_differs_between_processes_and_weights_do_not(found, two):
    first, second = found["outputs"]
    assert not (first == second).any()
    assert torch.equal(*found["means"])
    assert found["sharded"] == (two.name == "fsdp2")


def test_the_divergence_counts_once(found):
    task, elbo = a_task()
    x, y = a_batch()
    with vd.estimator("none"):
        expected = gradients(task.train(), task, elbo, x, y, torch.Tensor.backward)
    assert found["kl"].tolist() == pytest.approx([vd.kl_divergence(task.network).item()] * 2)
    for name, gradient in expected.items():
        torch.testing.assert_close(found["quiet"][name], gradient, rtol=1e-4, atol=1e-6)
    first = next(name for name in expected if name.endswith("log_alpha"))  # the others start at their bound
    assert expected[first].abs().min() > 1e-3  # with the noise off it is the KL's alone: a second count would show


def test_with_noise_the_expected_gradient_is_that_of_one_process(found):
    task, elbo = a_task()
    torch.manual_seed(7)
    expected = repeated(task.train(), task, elbo, *a_batch(), torch.Tensor.backward)
    scores = []
    for name, alone in expected.items():
        together = found["noisy"][name]
        error = ((alone.var(0) + together.var(0)) / REPEATS).sqrt()
        scores.append(((alone.mean(0) - together.mean(0)) / error.clamp_min(1e-9)).flatten())
    score = torch.cat(scores)
    assert score.abs().max() < 5
    assert score.square().mean() < 1.5


def test_training_agrees_with_one_process_of_the_same_total_batch(two, one):
    ours, theirs = (load_task(run).state_dict() for run in (two / "run", one))
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-3, atol=1e-4)
    lines = [
        [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (two / "run", one)
    ]
    for mine, its in zip(*lines, strict=True):
        assert mine["train_nll"] == pytest.approx(its["train_nll"], rel=1e-4)
        assert mine["kl"] == pytest.approx(its["kl"], rel=1e-4)
        assert mine["val_nll"] == pytest.approx(its["val_nll"], rel=1e-4)


def test_every_process_gets_the_summary_and_one_writes_it(two):
    assert json.loads((two / "returned.json").read_text()) == json.loads((two / "run" / "summary.json").read_text())


def test_one_process_goes_on_from_the_checkpoint_of_two(two, one, folder):
    longer = Config(**vars(QUIET) | {"epochs": 3})
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("LOCAL_WORLD_SIZE", raising=False)
        ours = train(longer, two / "run", resume=True, progress=False)
    theirs = train(longer, folder / f"straight-{two.name}", progress=False)
    assert ours["epochs_run"] == 3
    assert ours["test_nll"] == pytest.approx(theirs["test_nll"], rel=1e-3)


if __name__ == "__main__":
    work(sys.argv[1], Path(sys.argv[2]))
    torch.distributed.barrier()
    os._exit(0)  # as the command line does: torch's threads race with the end of an interpreter, and may abort it
