"""Devices, processes and precision, by Lightning Fabric."""

from __future__ import annotations

import atexit
import logging
import os
import platform
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from lightning_fabric import Fabric
from lightning_fabric.strategies.model_parallel import ModelParallelStrategy
from torch import Tensor, nn

from vardrop.training.config import Config

T = TypeVar("T")
_RANK_STRIDE = 1_000_003  # between the seeds of two processes: no seed that a person picks meets another's


def _shard(task: nn.Module, mesh: Any) -> nn.Module:
    """FSDP2: every layer with parameters is a unit of its own, and so is what is left over."""
    from torch.distributed.fsdp import fully_shard

    across = mesh["data_parallel"]
    for module in list(task.modules()):
        if module is not task and any(p is not None for p in module._parameters.values()):
            fully_shard(module, mesh=across)
    return fully_shard(task, mesh=across)  # type: ignore[return-value]


def make_fabric(config: Config) -> Fabric:
    """Fabric as the config asks for it, launched: from here on every process runs.

    Raises:
        ValueError: if this machine has no such device, or Fabric cannot combine the choices.
    """
    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    devices, nodes = config.devices, 1
    if "LOCAL_WORLD_SIZE" in os.environ:  # under torchrun
        devices = int(os.environ["LOCAL_WORLD_SIZE"])
        nodes = int(os.environ["WORLD_SIZE"]) // devices
    strategy: Any = config.strategy
    if strategy == "fsdp2":
        strategy = ModelParallelStrategy(_shard, data_parallel_size=devices * nodes, tensor_parallel_size=1)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fabric = Fabric(
                accelerator=config.accelerator,
                devices=devices,
                num_nodes=nodes,
                strategy=strategy,
                precision=config.precision,  # type: ignore[arg-type]
            )
            fabric.launch()
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"vardrop.train: accelerator={config.accelerator!r}, devices={devices}, strategy={config.strategy!r} and "
            f"precision={config.precision!r} must go together and exist here, got: {' '.join(str(error).split())}"
        ) from error
    if fabric.world_size > 1:
        atexit.register(_leave)
    return fabric


def _leave() -> None:
    """Close the connections while there is still an interpreter: gloo's threads abort a process that leaves them."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seed_noise(seed: int, rank: int) -> None:
    """Give every process noise of its own, other numbers than those of the weights, which start the same."""
    torch.manual_seed(seed + _RANK_STRIDE * (rank + 1))


def on_first(fabric: Fabric, do: Callable[[], T]) -> T:
    """Let the first process do something, and every process have its result, or raise its error."""
    done: Any = None
    if fabric.is_global_zero:
        try:
            done = do()
        except (OSError, ValueError) as error:
            done = error
    done = fabric.broadcast(done)
    if isinstance(done, Exception):
        raise done
    return done


def add_up(fabric: Fabric, x: Tensor) -> Tensor:
    """The sum of a tensor over processes."""
    return x if fabric.world_size == 1 else fabric.all_reduce(x, reduce_op="sum")  # type: ignore[return-value]


def gather(fabric: Fabric, x: Tensor) -> Tensor:
    """A tensor of every process, ``[processes, ...]``."""
    if fabric.world_size == 1:
        return x.unsqueeze(0)
    rows = [torch.empty_like(x) for _ in range(fabric.world_size)]
    torch.distributed.all_gather(rows, x.contiguous())
    return torch.stack(rows)


def describe(device: torch.device) -> str:
    """The device in words."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
