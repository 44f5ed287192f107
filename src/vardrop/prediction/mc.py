"""Monte Carlo prediction: many noisy passes of a model, and what they say together."""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.ensemble.ensemble import Ensemble
from vardrop.given import check_module
from vardrop.prediction import probe, seeds
from vardrop.prediction.engine import Engine, Refused
from vardrop.prediction.moments import KINDS, Collector, Summary, check_numbers, joined
from vardrop.prediction.prediction import Prediction, beside
from vardrop.prediction.progress import Bar
from vardrop.prediction.stochastic import opened
from vardrop.prediction.structure import Call, Select, device_of, is_batches, moved, of_loader, single

_ENGINES = ("auto", "vmap", "loop")


def mc_predict(
    model: nn.Module,
    x: Any,
    samples: int = 100,
    *,
    outputs: str | None = None,
    engine: str = "auto",
    chunk: int | None = None,
    max_memory: int | None = None,
    keep: bool = True,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    progress: bool | None = None,
    select: Select | None = None,
    class_dim: int = 1,
) -> Prediction:
    r"""Predict with all noise on, many times, and tell how much the passes disagree (Gal, Ghahramani 2016).

    .. math:: E\,y \approx \frac{1}{T} \sum_t f(x, \varepsilon_t)

    Noise is switched on by :func:`vardrop.stochastic`: dropout of every kind and converted weights, while BatchNorm
    stays in evaluation. Everything is put back afterwards. An output that does not vary is an error, never an answer.

    Under vmap what stands before the first noise runs once for all passes. Where vmap refuses, the passes are made one
    by one, and ``prediction.reason`` says why. No gradients are kept. Threads that predict take turns, as torch has
    one default generator for all of them.

    Args:
        model: any module.
        x: one batch: a tensor, a tuple of arguments, or a mapping of keyword arguments. Or several: a DataLoader, a
            list, any iterable of batches that are tensors, tuples whose first entry is the input (the rest, labels,
            is not used), or mappings (without their ``labels`` or ``label``).
        samples: T, the number of passes, at least 2.
        outputs: what the model returns: ``"logits"``, ``"probabilities"`` or ``"log_probabilities"`` of classes, which
            the prediction turns into probabilities; ``"values"``, or None for outputs as they are.
        engine: ``"vmap"``, ``"loop"``, or ``"auto"`` for vmap wherever it can.
        chunk: passes at once; None to choose by the size of the activations.
        max_memory: bytes that the tensors of the passes may take at one time, beside the results.
        keep: keep every pass; else only what is summed up, in the memory of a few passes.
        generator: where the noise comes from: the same state gives the same answer to the same call, whatever
            ``keep`` is. Another engine, chunk or device gives other draws of the same noise. None takes one number from
            torch's default generator, whose state is otherwise left alone.
        device: where the batches go, which is where the model takes them; None for where its first parameter is.
        progress: show a bar (needs rich); None for long work over several batches on a terminal.
        select: the tensor of the output that this is about, by its name, such as ``"logits"``, ``0`` or
            ``"heads.mask"``, or a function of the output. None for the only one, or the one called ``logits``. The
            others are in ``prediction.outputs``.
        class_dim: where the classes are in the outputs ``[N, C, ...]``: 1 as for cross_entropy, -1 for the tokens of
            transformers.

    Returns:
        The prediction: on the device of the outputs, or on the CPU if x was several batches.

    Raises:
        ValueError: for arguments outside those above, a device where nothing of the model is, no batches, outputs that
            are not numbers or not what ``outputs`` says, and a ``max_memory`` too small for one pass.
        TypeError: if ``model`` is no module, or is a :class:`vardrop.Ensemble`, or ``x`` is an array.
        RuntimeError: if the outputs do not vary, or ``engine="vmap"`` cannot run the model.

    Example:
        >>> import torch, vardrop as vd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 50), torch.nn.Dropout(0.5), torch.nn.Linear(50, 1))
        >>> p = vd.mc_predict(net, torch.randn(7, 4), samples=200)
        >>> p.mean.shape, p.std.shape, p.engine
        (torch.Size([7, 1]), torch.Size([7, 1]), 'vmap')
    """
    _check(model, samples, outputs, engine, chunk, max_memory)
    several = is_batches(x)
    whole: dict[str, list[Summary]] = {}
    with torch.inference_mode(False), torch.no_grad(), opened(model) as (noise, modules), seeds.LOCK:
        place = device_of(modules) if device is None else _place(model, device)
        devices = seeds.accelerators(itertools.chain(model.parameters(), model.buffers()))
        runner = Engine(model, select, engine, chunk, max_memory, seeds.may_be_foreign(modules))
        each = random.Random(seeds.draw(generator))
        with seeds.lent(devices), Bar(progress, several, x, samples) as bar, _as_written():
            for call in _calls(x, several, place):
                seed = each.getrandbits(62)
                with torch._C.DisableTorchFunction():  # the mode of noise is for the model, not for what is around it
                    found = _batch(runner, call, samples, (outputs, class_dim, keep), seed, devices, noise, bar)
                for name, summary in found.items():
                    whole.setdefault(name, []).append(summary.to("cpu") if several else summary)
    if not whole:
        raise ValueError("vardrop.mc_predict: x must have a batch, got an iterable without any")
    return _prediction(runner, whole, samples, outputs, class_dim, noise)


def _check(
    model: Any, samples: int, outputs: str | None, engine: str, chunk: int | None, max_memory: int | None
) -> None:
    check_module(model, "mc_predict")
    if isinstance(model, Ensemble):
        raise TypeError(
            "vardrop.mc_predict: model must be one network, got an Ensemble, whose outputs have an axis of members; "
            "use ensemble.predict(x), or vd.mc_predict on one of ensemble.members()"
        )
    if not isinstance(samples, int) or samples < 2:
        raise ValueError(
            f"vardrop.mc_predict: samples must be a whole number of passes, 2 or more, got {samples!r}; one pass has "
            "no spread, and is made by calling the model inside of vd.stochastic(model)"
        )
    if outputs is not None and outputs not in KINDS:
        raise ValueError(f"vardrop.mc_predict: outputs must be one of {', '.join(KINDS)} or None, got {outputs!r}")
    if engine not in _ENGINES:
        raise ValueError(f"vardrop.mc_predict: engine must be one of {', '.join(_ENGINES)}, got {engine!r}")
    for name, value in (("chunk", chunk), ("max_memory", max_memory)):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"vardrop.mc_predict: {name} must be a positive whole number or None, got {value!r}")


def _place(model: nn.Module, device: torch.device | str) -> torch.device:
    """The device that was asked for, if the model has something there."""
    place = torch.device(device)
    there = {tensor.device for tensor in itertools.chain(model.parameters(), model.buffers())}
    if there and not any(place.type == d.type and (None in (place.index, d.index) or place == d) for d in there):
        raise ValueError(
            f"vardrop.mc_predict: device must be where the model is, {', '.join(sorted(map(str, there)))}, got "
            f"{place}; move the model first, with model.to({str(place)!r})"
        )
    return place


def _as_written() -> contextlib.AbstractContextManager[Any]:
    """A compiled model runs as it was written."""
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    return torch.compiler.set_stance("force_eager")


def _calls(x: Any, several: bool, device: Any) -> Iterator[Call]:
    for batch in x if several else [x]:
        call = of_loader(batch) if several else single(batch)
        yield call if device is None else Call(moved(call.args, device), moved(call.kwargs, device))


def _batch(
    runner: Engine,
    call: Call,
    samples: int,
    about: tuple[str | None, int, bool],
    seed: int,
    devices: list[torch.device],
    noise: Any,
    bar: Bar,
) -> dict[str, Summary]:
    """All passes over one batch; from the start again if vmap refuses, or wants more memory than there is."""
    while True:
        seeds.sow(seed, devices)
        collected = _Collected(runner, about, bar)
        try:
            runner.run(call, samples, collected.take)
            break
        except Refused as why:
            if not runner.may_fall_back:
                raise RuntimeError(
                    f"vardrop.mc_predict: engine='vmap' must be able to run the model, but {why}; use engine='auto'"
                ) from why.__cause__
            runner.fall_back(str(why))
        except torch.OutOfMemoryError:
            if not runner.shrink():
                raise
    return collected.summaries(noise, samples)


class _Collected:
    """The passes over one batch as they come in, and whether they vary."""

    def __init__(self, runner: Engine, about: tuple[str | None, int, bool], bar: Bar) -> None:
        self.runner, self.about, self.bar = runner, about, bar
        self.collectors: dict[str, Collector] = {}
        self.first: Tensor | None = None
        self.varies = False

    def take(self, piece: dict[str, Tensor]) -> None:
        name = self.runner.main
        main = piece[name]
        if self.first is None:
            if main.ndim < 2:
                raise ValueError(
                    "vardrop.mc_predict: the output must have the examples on its first axis, got a tensor without axes"
                    "; choose another with select="
                )
            if not main.is_floating_point():
                raise TypeError(
                    f"vardrop.mc_predict: the output must be floating point, got {main.dtype}; let the model return "
                    "its scores, not its choice, or choose another output with select="
                )
            self.first = main[0].clone()
        if not self.varies:
            self.varies = not (torch.equal(main[-1], self.first) and torch.equal(main, self.first.expand_as(main)))
        kind, class_dim, keep = self.about
        for key, tensor in piece.items():
            if key not in self.collectors:
                self.collectors[key] = Collector(kind if key == name else None, class_dim, keep)
            self.collectors[key].add(tensor)
        self.bar.advance(len(main))

    def summaries(self, noise: Any, samples: int) -> dict[str, Summary]:
        """What is left of the passes; refused if they were all the same, or are not numbers."""
        if self.runner.silent or not (self.varies or self.first is None or self.first.numel() == 0):
            raise RuntimeError(
                probe.reason(self.runner.model, noise.sources, noise.left_off, samples, self.runner.silent)
            )
        found = {name: collector.summary() for name, collector in self.collectors.items()}
        check_numbers(found[self.runner.main].mean, "mc_predict")
        return found


def _prediction(
    runner: Engine, whole: dict[str, list[Summary]], samples: int, outputs: str | None, class_dim: int, noise: Any
) -> Prediction:
    """The answer, with the other outputs beside the main one."""
    others, left_off = beside(whole, runner.main, samples)
    return Prediction(
        joined(whole[runner.main]),
        samples,
        outputs,
        class_dim,
        runner.name,
        runner.chunk,
        runner.reason,
        runner.main,
        tuple(source.name for source in noise.sources),
        others,
        left_off,
        dict(noise.left_off),
    )
