"""DropBlock beside timm's, and stochastic depth beside a network without: ``python -m benchmarks.blocks``.

``python -m benchmarks.blocks --rates`` prints the table of realised rates in docs/dropblock.md instead.
"""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import table
from benchmarks.operators import importable_torchvision
from benchmarks.timing import Row, interleaved, summarise
from vardrop.layers import StochasticDepth, survival_rates
from vardrop.layers.dropblock import drop_block

DEPTH = 12
TOKENS, WIDTH = 49, 128
# A convolution is set up anew for a number of rows that it has not met: a cost of the first steps only. After so many
# steps of twelve blocks nearly all numbers have been met.
WARMUP = 24
BATCH_STEPS = 4  # in a round of batch mode, as the number of blocks that run in one step is left to a dozen coins


def _timm() -> Any:
    """timm's layers."""
    importable_torchvision()
    return importlib.import_module("timm.layers")


def _pass(function: Callable[[Tensor], Tensor], shape: tuple[int, ...]) -> Callable[[], None]:
    """Forward and backward of a function of a random feature map."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).requires_grad_()
    gradient = torch.randn(shape, generator=generator)

    def run() -> None:
        x.grad = None
        function(x).backward(gradient)

    return run


def drop_blocks(rounds: int, warmup: int, shape: tuple[int, ...] = (32, 64, 32, 32)) -> list[Row]:
    """Independent channels, blocks of 7, p = 0.1, forward and backward; the reference is timm's."""
    name = "drop-block"
    try:
        timm = _timm()
    except ImportError as error:
        return [Row(name, "timm", note=f"cannot be used here: {type(error).__name__}: {error}")]
    ours = partial(drop_block, rate=0.1, block_size=7)
    variants: dict[str, Callable[[Tensor], Tensor]] = {
        "timm, itself again": partial(timm.drop_block_2d, drop_prob=0.1, block_size=7, couple_channels=False),
        "drop_block": ours,
        "drop_block, by sample": partial(ours, rescale="sample"),
        "drop_block, by batch": partial(ours, rescale="batch"),
        "drop_block, valid seeds": partial(ours, seeds="valid", rescale="batch"),
        "drop_block, shared channels": partial(ours, share_channels=True),
        "timm, shared channels": partial(timm.drop_block_2d, drop_prob=0.1, block_size=7),
    }
    reference = _pass(variants["timm, itself again"], shape)
    pairs = interleaved({key: _pass(f, shape) for key, f in variants.items()}, reference, rounds, warmup)
    goals = {"drop_block": 0.1}
    return [summarise(name, variant, seen, goal=goals.get(variant)) for variant, seen in pairs.items()]


class _Residual(nn.Module):
    """x + path(block(x)), the usual way: what is dropped has been computed."""

    def __init__(self, block: nn.Module, path: nn.Module) -> None:
        super().__init__()
        self.block, self.path = block, path

    def forward(self, x: Tensor) -> Tensor:
        return x + self.path(self.block(x))


def residual_network(wrap: Callable[[nn.Module, float], nn.Module], depth: int = DEPTH, width: int = 32) -> nn.Module:
    """A small residual network on 3 x 32 x 32; ``wrap`` gets a branch and the drop rate of its depth."""

    def branch() -> nn.Module:
        def conv() -> list[nn.Module]:
            return [nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)]

        return nn.Sequential(*conv(), nn.ReLU(), *conv())

    blocks = [wrap(branch(), 1 - survival) for survival in survival_rates(depth, last=0.5)]
    stem = [nn.Conv2d(3, width, 3, stride=2, padding=1), nn.ReLU()]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))


class _Attention(nn.Module):
    """Self-attention of four heads."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inputs, self.output = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.inputs(x).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        return self.output(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def transformer(
    wrap: Callable[[nn.Module, float], nn.Module], depth: int = DEPTH, width: int = WIDTH, tokens: int = TOKENS
) -> nn.Module:
    """The blocks of a small vision transformer on embedded patches; the branches of one have the rate of its depth."""

    def branches() -> Iterator[nn.Module]:
        yield nn.Sequential(nn.LayerNorm(width), _Attention(width))
        yield nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    blocks = [wrap(branch, 1 - survival) for survival in survival_rates(depth, last=0.5) for branch in branches()]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(tokens * width, 10))


def stochastic_depth(rounds: int, warmup: int, examples: int = 64, large: bool = True) -> list[Row]:
    """A training step at p_L = 0.5, forward and backward without an optimiser; the reference drops nothing.

    On maps of 32 channels, 16 x 16, a branch is little arithmetic for its memory, and what row mode saves there is
    least. The transformer of 384 has the sizes of DeiT-S, for which such paths are used, with four of its blocks.
    """
    batch = partial(StochasticDepth, mode="batch")
    wraps: dict[str, Callable[[nn.Module, float], nn.Module]] = {
        "no drop, itself again": lambda block, p: _Residual(block, nn.Identity()),
        "StochasticDepth, row": StochasticDepth,
        "StochasticDepth, batch": batch,
    }
    missing = []
    try:
        path = _timm().DropPath
    except ImportError as error:
        missing = [Row("drop-path", "timm", note=f"cannot be used here: {type(error).__name__}: {error}")]
    else:
        wraps["timm DropPath"] = lambda block, p: _Residual(block, path(p))
    plain = wraps["no drop, itself again"]

    def steps(network: Callable[..., nn.Module], wrap: Callable[..., nn.Module], x: Tensor, count: int) -> Any:
        net, y = network(wrap), torch.randint(10, (len(x),))

        def run() -> None:
            for _ in range(count):
                net.zero_grad()
                F.cross_entropy(net(x), y).backward()

        return run

    rows = []
    images = torch.randn(examples, 3, 32, 32)
    deit = partial(transformer, depth=4, width=384, tokens=196)
    cases: list[tuple[str, int, Callable[..., nn.Module], Tensor]] = [
        ("convolutions of 32", DEPTH, residual_network, images),
        ("convolutions of 32, twice the examples", DEPTH, residual_network, torch.randn(2 * examples, 3, 32, 32)),
        ("convolutions of 64", DEPTH, partial(residual_network, width=64), images),
        ("transformer", DEPTH, transformer, torch.randn(examples // 2, TOKENS, WIDTH)),
    ]
    if large:
        cases.append(("transformer of 384", 4, deit, torch.randn(max(1, examples // 8), 196, 384)))
    for model, depth, network, x in cases:
        share = sum(survival_rates(depth, last=0.5)) / depth
        notes = {
            "StochasticDepth, row": f"{share:.2f} of the rows reach a block",
            "StochasticDepth, batch": f"{share:.2f} of the blocks run on average; {BATCH_STEPS} steps",
        }
        pairs = {}
        for name, wrap in wraps.items():
            count = BATCH_STEPS if wrap is batch else 1
            timed = {name: steps(network, wrap, x, count)}
            pairs |= interleaved(timed, steps(network, plain, x, count), rounds, max(1, warmup // count))
        for name, seen in pairs.items():
            goal = 0.8 if name in notes else None
            rows.append(summarise("drop-path", f"{model}: {name}", seen, goal=goal, note=notes.get(name, "")))
    return rows + missing


def _rate(function: Callable[[Tensor], Tensor], size: tuple[int, int], units: int) -> str:
    """The share of units that a function drops, or that it refuses the map."""
    maps = max(2, units // (size[0] * size[1]))
    try:
        gone = function(torch.ones(1, maps, *size)) == 0
    except ValueError:  # torchvision's for even blocks
        return "error"
    return f"{gone.double().mean():.3f}"


def rates_table(p: float = 0.1, units: int = 4_000_000) -> str:
    """Realised rates of DropBlock on maps of several sizes, as Markdown; channels are independent."""
    timm, ops = _timm(), importlib.import_module("torchvision.ops")
    functions: dict[str, Callable[..., Tensor]] = {
        "vardrop": partial(drop_block, rate=p),
        "vardrop, valid seeds": partial(drop_block, rate=p, seeds="valid"),
        "timm": partial(timm.drop_block_2d, drop_prob=p, couple_channels=False),
        "torchvision": partial(ops.drop_block2d, p=p),
    }
    blocks = range(1, 10)
    lines = [f"| | map | {' | '.join(f'b = {b}' for b in blocks)} |", "|---|---|" + "---|" * len(blocks)]
    for name, function in functions.items():
        for height, width in [(56, 56), (28, 28), (14, 14), (14, 7), (7, 7), (4, 4), (3, 9), (1, 1)]:
            rates = [_rate(partial(function, block_size=b), (height, width), units) for b in blocks]
            lines.append(f"| {name} | {height} × {width} | {' | '.join(rates)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser("python -m benchmarks.blocks", description="Speed of DropBlock and DropPath.")
    parser.add_argument("--rates", action="store_true", help="the table of realised rates of DropBlock instead")
    torch.manual_seed(0)
    if parser.parse_args().rates:
        print(rates_table())
        return
    threads = torch.get_num_threads()
    title = f"{table.device_name()}, {threads} threads, torch {torch.__version__}: ratios to timm, and to no drop"
    table.show(drop_blocks(15, 2) + stochastic_depth(15, WARMUP), title)


if __name__ == "__main__":
    main()
