"""All noise of a model on, and everything else as in evaluation, for the length of a block."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import nn

from vardrop.given import check_module
from vardrop.prediction import noise_mode
from vardrop.prediction.noise_buffers import put_back, remember
from vardrop.prediction.noise_modules import Source, survey

__all__ = ["Noise", "Source", "stochastic"]

_SHOWN = 4  # modules of one kind that a report names


@dataclass
class Noise:
    """What :func:`stochastic` found in a model.

    Attributes:
        sources: the noise that is on: module, kind and rate.
        left_off: name -> reason, in a sentence, for what looks like noise and stays off.
        put_back: modules whose buffers were changed inside the block and had to be put back, known at its end.
    """

    sources: list[Source] = field(default_factory=list)
    left_off: dict[str, str] = field(default_factory=dict)
    put_back: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"sources of noise: {len(self.sources) or 'none that could be found'}"]
        for what in dict.fromkeys(source.what for source in self.sources):
            alike = [source.name for source in self.sources if source.what == what]
            more = f" and {len(alike) - _SHOWN} more" if len(alike) > _SHOWN else ""
            lines.append(f"  {what}: {', '.join(alike[:_SHOWN])}{more}")
        lines += [f"left off: {name}: {reason}" for name, reason in self.left_off.items()]
        return "\n".join(lines + [f"buffers put back: {name}" for name in self.put_back])


class _Block:
    """One open block: whose flags it holds, and what it tells."""

    def __init__(self, names: dict[nn.Module, str], on: dict[nn.Module, str], noise: Noise) -> None:
        self.names = names
        self.thread = threading.current_thread()
        self._on = on
        self._noise = noise

    def has(self, module: nn.Module) -> bool:
        return module in self.names

    def is_on(self, module: nn.Module) -> bool:
        return module in self._on

    def saw_attention_without_dropout(self, module: nn.Module) -> None:
        rates = {name: value for name, value in vars(module).items() if "drop" in name and isinstance(value, float)}
        name, rate = max(rates.items(), key=lambda item: item[1], default=("", 0.0))
        if rate > 0:
            reason = f"its fused attention ran without dropout, although it has {name} = {rate:g}"
            self._noise.left_off.setdefault(self.names[module], reason)


_LOCK = threading.RLock()
_CLAIMS: dict[nn.Module, list[tuple[_Block, bool]]] = {}  # who holds it, with the flags found, the innermost last


@contextlib.contextmanager
def stochastic(model: nn.Module) -> Iterator[Noise]:
    """Turn on all noise of a model that can be found, and nothing else, until the block ends.

    On are dropouts of every class, those that attention and recurrent layers carry out themselves, functional dropout
    in a forward, random weights (:func:`vardrop.convert_`), every layer of :mod:`vardrop.layers`, and noise of other
    modules whose code says that it is noise. Everything else is as in ``model.eval()``: batch norm keeps to its running
    statistics, auxiliary outputs stay away. At the end, however it comes, flags and buffers are what they were.

    Blocks may be nested. Flags belong to the model and not to a thread, so two threads cannot hold one model at a time.
    Passes through a copy of the model, or through modules that are added inside the block, are not looked after.

    Args:
        model: any module; it may be in training or in evaluation.

    Returns:
        A context manager, whose value is a report: the sources of noise, what was left off and why. If it has no
        sources, passes will not vary.

    Raises:
        TypeError: if ``model`` is no module.
        RuntimeError: if another thread holds the model, or a part of it.

    Example:
        >>> import torch, vardrop as vd
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(4, 64), nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 2)).eval()
        >>> x = torch.ones(1, 4)
        >>> with vd.stochastic(net) as noise:
        ...     print(noise, torch.equal(net(x), net(x)))
        sources of noise: 1
          Dropout, p = 0.5: 2 False
        >>> torch.equal(net(x), net(x))
        True
    """
    check_module(model, "stochastic")
    with opened(model) as (noise, _):
        yield noise


@contextlib.contextmanager
def opened(model: nn.Module) -> Iterator[tuple[Noise, Iterable[nn.Module]]]:
    """The block behind :func:`stochastic`, with the modules of the model too.

    Args:
        model: any module.
    """
    names, on, sources, left_off = survey(model)
    noise = Noise(sources, left_off)
    block = _Block(names, on, noise)
    try:
        _claim(block)
        kept = remember(names)
        try:
            for module in names:
                if module.training != (module in on):
                    module.training = module in on
            mode = noise_mode.open_block(block)
            try:
                yield noise, names
            finally:
                noise_mode.close_block(mode, block)
        finally:
            noise.put_back.extend(put_back(kept))
    finally:
        _release(block)


def _claim(block: _Block) -> None:
    """Note the flags that a block finds, and that its thread holds the modules."""
    with _LOCK:
        for module, name in block.names.items():
            if module not in _CLAIMS:
                continue
            holder = _CLAIMS[module][-1][0].thread
            if holder is not block.thread and holder.is_alive():
                raise RuntimeError(
                    f"vardrop.stochastic: a model must be held by one thread at a time, got {name!r}, which is in a "
                    f"block of thread {holder.name!r}; use a copy of the model for every thread"
                )
        for module in block.names:
            _CLAIMS.setdefault(module, []).append((block, module.training))


def _release(block: _Block) -> None:
    """Give the flags back that a block has found; if blocks are closed out of order, to the one that came after it."""
    with _LOCK:
        for module in block.names:
            blocks = _CLAIMS.get(module, [])
            place = len(blocks) - 1
            while place >= 0 and blocks[place][0] is not block:
                place -= 1
            if place < 0:  # it was refused
                continue
            flag = blocks.pop(place)[1]
            if place < len(blocks):
                blocks[place] = (blocks[place][0], flag)
            elif module.training != flag:
                module.training = flag
            if not blocks:
                del _CLAIMS[module]
