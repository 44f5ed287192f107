"""Processes that train one network together draw noise of their own: every layer of noise, in two of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from layer_contract import LAYERS
from test_wrapping_contract import WRAPPING
from vardrop.training.devices import seed_noise

NAMES = [*map(str, LAYERS), *WRAPPING]


def outputs() -> list[torch.Tensor]:
    """Of every layer, of the same weights and inputs in every process."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        wrapping = [(make(0.5), torch.randn(shape)) for make, shape in WRAPPING.values()]
    plain = [layer.run(layer.make(0.5), torch.ones(layer.shape)) for layer in LAYERS]
    with torch.no_grad():
        return plain + [layer(x) for layer, x in wrapping]


def in_a_process(rank: int, folder: str) -> None:
    """What is equal in both: with the seeds that training gives, and with one seed for both."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    for seed in (partial(seed_noise, 0, rank), partial(torch.manual_seed, 0)):
        seed()
        for name, made in zip(NAMES, outputs(), strict=True):
            both = [torch.empty_like(made) for _ in range(2)]
            torch.distributed.all_gather(both, made.contiguous())
            with Path(folder, f"{rank}").open("a") as file:
                file.write(f"{name} {torch.equal(*both)}\n")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_noise_differs_between_processes(tmp_path: Path) -> None:
    """One seed for both shows that the comparison can fail."""
    torch.multiprocessing.spawn(in_a_process, (str(tmp_path),), nprocs=2)
    expected = [f"{name} {equal}" for equal in (False, True) for name in NAMES]
    for rank in range(2):
        assert (tmp_path / f"{rank}").read_text().splitlines() == expected
