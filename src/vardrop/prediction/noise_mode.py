"""Noise that no flag of a module switches: what is caught on its way into torch's functions."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch._C import _len_torch_function_stack
from torch.overrides import TorchFunctionMode, _pop_mode, _push_mode

from vardrop.prediction.noise_functions import HANDLED, Args, Block, Kwargs


class NoiseMode(TorchFunctionMode):
    """Functional dropout on and batch statistics off, in what the models of the open blocks compute.

    Dropout whose ``training`` argument is false is made true if a module of a block is among its callers, so that other
    models that run meanwhile are left alone. Dropout that is on is carried out by :func:`vardrop.functional.drop`,
    which has the same law.
    """

    def __init__(self) -> None:
        super().__init__()
        self.blocks: list[Block] = []
        self.thread = threading.get_ident()
        self.look_at: Callable[[Any], None] | None = None  # gets what every function returns

    def __torch_function__(self, func: Any, types: Any, args: Args = (), kwargs: Kwargs | None = None) -> Any:
        handle = HANDLED.get(func)
        if handle is None or not self.blocks:
            out = func(*args, **(kwargs or {}))
        else:
            out = handle(self, func, args, kwargs or {})
        if self.look_at is not None:
            self.look_at(out)
        return out

    def caller(self) -> tuple[Block, nn.Module] | None:
        """The innermost module of a block whose code is running, and its block."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            code = frame.f_code
            if code.co_argcount:
                first = frame.f_locals.get(code.co_varnames[0])
                if isinstance(first, nn.Module):
                    for block in self.blocks:
                        if block.has(first):
                            return block, first
            frame = frame.f_back
        return None

    def turns_on(self) -> bool:
        """Whether noise that is off is to be on."""
        return torch.compiler.is_compiling() or self.caller() is not None


class _Here(threading.local):
    mode: NoiseMode | None = None


_here = _Here()


def open_block(block: Block) -> NoiseMode:
    """Make the mode look after a block, in this thread: the same mode for all blocks that are open."""
    mode = _here.mode
    if mode is None:
        mode = _here.mode = NoiseMode()
        _push_mode(mode)
    mode.blocks.append(block)
    return mode


def close_block(mode: NoiseMode, block: Block) -> None:
    """Undo :func:`open_block`, whatever the order in which blocks are closed."""
    mode.blocks = [other for other in mode.blocks if other is not block]
    if mode.blocks or mode.thread != threading.get_ident():
        return
    _here.mode = None
    above = []
    while _len_torch_function_stack():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


@contextmanager
def watched(look_at: Callable[[Any], None]) -> Iterator[None]:
    """Have what every function returns looked at, in this thread, while a block is open."""
    mode = _here.mode
    if mode is None:
        raise RuntimeError("vardrop.stochastic: a block must be open where functions are watched, got none; open one")
    before, mode.look_at = mode.look_at, look_at
    try:
        yield
    finally:
        mode.look_at = before
