"""Noise with a seed of its own: torch's generators are lent for a prediction and put back as they were."""

from __future__ import annotations

import pickle
import random
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _has_any_global_hook


def draw(generator: torch.Generator | None) -> int:
    """A seed from a generator; from torch's default one if None."""
    device = "cpu" if generator is None else generator.device
    return int(torch.randint(1 << 62, (), generator=generator, device=device, dtype=torch.int64))


def accelerators(tensors: Iterable[torch.Tensor]) -> list[torch.device]:
    """The devices of these tensors that have generators of their own."""
    if not torch.accelerator.is_available():
        return []
    return sorted({t.device for t in tensors if t.device.type not in ("cpu", "meta")}, key=str)


LOCK = threading.RLock()  # held while the generators are lent: torch has one of a kind for all threads


@contextmanager
def lent(devices: list[torch.device]) -> Iterator[None]:
    """Everything inside may seed and draw; afterwards the generators of the CPU and these devices are as before.

    One thread at a time: the others wait.
    """
    with LOCK:
        states = [(device, torch.get_device_module(device).get_rng_state(device)) for device in devices]
        state = torch.default_generator.get_state()
        try:
            yield
        finally:
            torch.default_generator.set_state(state)
            for device, before in states:
                torch.get_device_module(device).set_rng_state(before, device)


def sow(seed: int, devices: list[torch.device]) -> None:
    """Seed the generators of the CPU and of these devices, and of no other."""
    torch.default_generator.manual_seed(seed)
    for device in devices:
        module = torch.get_device_module(device)
        if device.type == "mps":
            module.manual_seed(seed)
            continue
        with module.device(device):
            module.manual_seed(seed)


def may_be_foreign(modules: Iterable[nn.Module]) -> bool:
    """Whether code of others runs, in a class or a hook: torch's and ours draws from torch's generators alone."""
    return _has_any_global_hook() or any(
        module._forward_hooks
        or module._forward_pre_hooks
        or "forward" in vars(module)
        or not all(base.__module__.startswith(("torch.nn.", "vardrop.", "builtins")) for base in type(module).__mro__)
        for module in modules
    )


def generators(modules: Iterable[nn.Module]) -> list[Any]:
    """The generators of Python and of numpy that modules have as attributes."""
    numpy = sys.modules.get("numpy")
    kinds = (random.Random, *((numpy.random.Generator, numpy.random.RandomState) if numpy is not None else ()))
    return [value for module in modules for value in vars(module).values() if isinstance(value, kinds)]


def foreign(own: Iterable[Any]) -> tuple[Any, ...]:
    """The state of generators that are not torch's: Python's, numpy's and ``own``. It changes if somebody draws."""
    numpy = sys.modules.get("numpy")
    state = numpy.random.get_state() if numpy is not None else ()
    return random.getstate(), *((state[1].tobytes(), state[2]) if state else ()), *map(pickle.dumps, own)
