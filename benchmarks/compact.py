"""Inference of compacted networks beside the dense ones, and the work that is left: ``python -m benchmarks.compact``.

Half of the units die at random, as a sparse posterior leaves them: rows of weights that write a unit are zero (for the
transformer also those that read a channel of its stream). How they died does not matter for time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vardrop as vd
from benchmarks import table, work
from benchmarks.blocks import residual_network
from benchmarks.timing import Row, interleaved, summarise
from vardrop.reproduce.experiments import _onnx
from vardrop.reproduce.experiments._compact import BandEncoder, lenet5
from vardrop.reproduce.experiments._compact import mlp as perceptron

GOAL = 1.5  # times the share of multiply-adds that is left
BATCHES = (1, 256)
ALIVE = 0.5
SHAPE = (1, 28, 28)


def _dead(units: int, generator: torch.Generator, alive: float, spread: int = 0) -> Tensor:
    """As many as are not alive, or up to ``spread`` more or fewer; one is alive at least."""
    more = int(torch.randint(-spread, spread + 1, (), generator=generator)) if spread else 0
    return torch.randperm(units, generator=generator)[: min(round((1 - alive) * units) + more, units - 1)]


def _silence(writers: Iterable[nn.Module], dead: Tensor, readers: Iterable[Tensor] = ()) -> None:
    """Units become constants: 0 with their bias, and what reads them has no weights for them."""
    with torch.no_grad():
        for writer in writers:
            for name in ("weight", "bias"):
                tensor = getattr(writer, name, None)
                if tensor is not None:
                    tensor[dead] = 0
        for weight in readers:
            weight[:, dead] = 0


def mlp(generator: torch.Generator, alive: float = ALIVE, widths: tuple[int, ...] = (300, 100)) -> nn.Module:
    """LeNet-300-100, or hidden layers of other widths, with half of the hidden units."""
    net = perceptron(28, widths)
    for layer in [module for module in net if isinstance(module, nn.Linear)][:-1]:
        _silence([layer], _dead(layer.out_features, generator, alive))
    return net


def lenet(generator: torch.Generator, alive: float = ALIVE) -> nn.Module:
    """LeNet-5 with half of its channels and hidden units."""
    net = lenet5(28, (20, 50, 500))
    for layer in (net[0], net[3], net[7]):
        _silence([layer], _dead(len(layer.weight), generator, alive))  # type: ignore[arg-type]
    return net


def resnet(generator: torch.Generator, alive: float = ALIVE, width: int = 32, spread: int = 0) -> nn.Module:
    """Twelve residual blocks of convolutions on 3 x 32 x 32, half of the channels inside of blocks and between them.

    With a spread there are up to so many more or fewer inside of each block, and what is dead is a constant other than
    zero, as where it was learned: numbers of channels that no kernel is made for.
    """
    net = residual_network(lambda branch, _: _Sum(branch), width=width)
    blocks = [module.branch for module in net.modules() if isinstance(module, _Sum)]
    between = _dead(width, generator, alive)
    for branch in blocks:
        first, norm, _, second, last = branch
        _silence([first] if spread else [first, norm], _dead(width, generator, alive, spread))
        if spread:
            nn.init.uniform_(norm.bias, generator=generator)
        _silence([second, last], between)
    _silence([net[0]], between)  # type: ignore[index]
    return net


class _Sum(nn.Module):
    """x + branch(x)."""

    def __init__(self, branch: nn.Module) -> None:
        super().__init__()
        self.branch = branch

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.branch(x)
        return y


def transformer(generator: torch.Generator, alive: float = ALIVE, width: int = 128, hidden: int = 256) -> nn.Module:
    """Four layers on the rows of an image: half of the stream, of the four heads and of the hidden units."""
    net = BandEncoder(28, 1, width, 4, 4, hidden)
    stream = _dead(width, generator, alive)
    for layer in net.encoder.layers:
        attention = layer.self_attn
        heads = (_dead(4, generator, alive)[:, None] * (width // 4) + torch.arange(width // 4)).flatten()
        _silence([layer.linear1], _dead(hidden, generator, alive))
        _silence([attention.out_proj, layer.linear2], stream, [attention.in_proj_weight, layer.linear1.weight])
        _silence([], heads, [attention.out_proj.weight])
    _silence([net.embed], stream, [net.head.weight])
    return net


NETWORKS: dict[str, tuple[Callable[..., nn.Module], tuple[int, ...]]] = {
    "LeNet-300-100": (mlp, SHAPE),
    "LeNet-5": (lenet, SHAPE),
    "residual network": (resnet, (3, 32, 32)),
    "transformer encoder": (transformer, SHAPE),
    "MLP of 1000": (partial(mlp, widths=(1000, 1000, 1000)), SHAPE),
    "residual network of 64": (partial(resnet, width=64), (3, 32, 32)),
    "residual network of 64, uneven": (partial(resnet, width=64, spread=8), (3, 32, 32)),
    "transformer encoder of 512": (partial(transformer, width=512, hidden=1024), SHAPE),
}
ONE_UNIT, NOTHING_DEAD = ", one unit left", ", nothing dead"
NOTES = {ONE_UNIT: "calls", NOTHING_DEAD: "work 1"}
WIDE = ("MLP of 1000", "residual network of 64", "residual network of 64, uneven", "transformer encoder of 512")


def measure(names: Iterable[str], rounds: int, warmup: int) -> list[Row]:
    """Ratios of times, each beside what is left of multiply-adds and of all work; on one thread, as waiting is no work.

    The time should fall with the multiply-adds; 1.5 leaves room for what is not in them, and for kernels that are less
    busy when they are narrower. How much room that takes is told by the work that is left: softmax, norms, activations
    and pooling fall less. At one example the calls of the small networks cost more than what they compute, so there is
    a goal for the wide ones only; what the calls take is told by the same network with one unit left in every layer.
    Compaction for inference folds norms and puts channels last, too: what that alone gives, where nothing is dead, has
    a row of its own.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        return [row for name in names for row in _network(name, rounds, warmup)]
    finally:
        torch.set_num_threads(threads)


def _network(name: str, rounds: int, warmup: int) -> Iterable[Row]:
    make, shape = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    dense = make(generator).eval()
    example = torch.randn(2, *shape, generator=generator)
    small, alive, calls = (
        vd.compact(net.eval(), example, for_inference=True)
        for net in (dense, _revived(dense, generator), make(generator, alive=0))
    )
    before, after = small.compaction.multiply_adds  # type: ignore[union-attr,misc]
    for batch in BATCHES:
        x = torch.randn(batch, *shape, generator=generator)
        times = 20 if batch == 1 else 1
        goal = round(GOAL * after / before, 2) if batch > 1 or name in WIDE else None
        note = f"multiply-adds {after / before:.2f}, work {work.left(dense, small, x, after / before):.2f}"
        for engine, call in (("torch", partial), ("onnxruntime", _onnx.forward)):
            nets = {"": small}
            if batch == 1:
                nets[ONE_UNIT] = calls
            if engine == "torch" and _is_other(alive):
                nets[NOTHING_DEAD] = alive
            ours = {key: _repeated(call(net, x), times) for key, net in nets.items()}
            rows = {
                key: summarise("compact", f"{name}, {engine}, batch {batch}{key}", pairs, note=NOTES.get(key, note))
                for key, pairs in interleaved(ours, _repeated(call(dense, x), times), rounds, warmup).items()
            }
            rows[""] = replace(rows[""], goal=goal)
            yield from rows.values()


def _revived(dense: nn.Module, generator: torch.Generator) -> nn.Module:
    """The same network with all of its units alive."""
    net = copy.deepcopy(dense)
    with torch.no_grad():
        for parameter in net.parameters():
            noise = 0.1 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(torch.where(parameter == 0, noise, parameter))
    return net


def _is_other(alive: nn.Module) -> bool:
    """Whether compaction did more than take out what is dead."""
    return bool(alive.compaction.changed)  # type: ignore[union-attr]


def _repeated(call: Callable[[], Any], times: int) -> Callable[[], None]:
    def run() -> None:
        with torch.inference_mode():
            for _ in range(times):
                call()

    return run


if __name__ == "__main__":
    torch.manual_seed(0)
    table.show(measure(NETWORKS, 15, 2), f"{table.device_name()}, one thread: compact / dense")
