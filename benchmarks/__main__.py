"""Run the benchmarks and print one table; ``python -m benchmarks --help`` has the options."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import blocks, compact, divergence, layers, memory, peers, prediction, table, training_step
from benchmarks.timing import Row
from benchmarks.variants import HARDEST, OURS, PER_EXAMPLE
from vardrop import products


class Plan(NamedTuple):
    """What a benchmark is, and how many rounds it gets."""

    about: str
    rounds: int
    quick_rounds: int


PLANS = {
    "mlp-128": Plan("training step of the MLP 784-3x1000-10, minibatch of 128", 25, 3),
    "mlp-1000": Plan("training step of the same MLP, minibatch of 1000", 11, 2),
    "cnn-100": Plan("training step of a small CNN on 3x32x32, minibatch of 100", 15, 2),
    "layers": Plan("training step of the same MLP with layers of activation noise, minibatch of 1000", 15, 2),
    "drop-block": Plan("DropBlock, block 7, on a map (32, 64, 32, 32), forward and backward, against timm's", 11, 2),
    "drop-path": Plan("training step of residual blocks with stochastic depth that skips, against without", 11, 2),
    "per-example": Plan("a weight for every example: the MLP, minibatch of 1000, scaled from a few examples", 5, 2),
    "kl": Plan("KL divergence with its gradient, as a share of the plain step of mlp-1000", 25, 3),
    "mc-predict": Plan("vd.mc_predict of 100 passes, against a loop of 100 forwards of the same model", 7, 1),
    "compact": Plan(
        "inference of compacted networks, half of the units dead, against the dense ones; one thread", 15, 3
    ),
    "memory-4096": Plan("peak memory of a training step of the MLP, minibatch of 4096", 2, 1),
}

DESCRIPTION = """\
Time and memory of training with noise, as ratios to the same network with plain layers; and of prediction, as ratios
to a loop of forwards. Every figure is the median over rounds of (variant / reference in the same round), with the
interquartile range; a variant is timed right after a run of the reference. Goals are upper bounds of the ratio.

benchmarks:
"""


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise ValueError
    return value


_positive.__name__ = "positive whole number"  # argparse says "invalid <name> value"


def _parser() -> argparse.ArgumentParser:
    about = "\n".join(f"  {name:<12} {plan.about}" for name, plan in PLANS.items())
    parser = argparse.ArgumentParser(
        "python -m benchmarks", description=DESCRIPTION + about, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="few rounds of the main variants, under half a minute")
    parser.add_argument(
        "--only", action="append", choices=PLANS, metavar="NAME", help="only this benchmark; may be given several times"
    )
    parser.add_argument("--variant", metavar="TEXT", help="only variants with this in their name, in any case")
    parser.add_argument(
        "--rounds", type=_positive, metavar="N", help="rounds of every benchmark (their own by default)"
    )
    parser.add_argument(
        "--mkl", action="store_true", help="our products by MKL, as those of the reference (memory-4096 is as without)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="also write the figures as JSON")
    return parser


def _run(options: argparse.Namespace, say: Callable[[str], None]) -> list[Row]:
    """The rows of all benchmarks that were asked for."""
    found, missing = peers.find()

    def wanted(name: str, quick: bool) -> bool:
        return (quick or not options.quick) and (options.variant or "").lower() in name.lower()

    variants = [v for v in (*OURS, *found) if wanted(v.name, v.quick)]
    divergences = [d for d in divergence.DIVERGENCES if wanted(d.name, d.quick)]
    rows: list[Row] = []
    for name in options.only or PLANS:
        plan = PLANS[name]
        rounds = options.rounds or (plan.quick_rounds if options.quick else plan.rounds)
        warmup = 1 if options.quick else 2
        say(f"{name}: {plan.about}; {rounds} rounds")
        if name == "per-example":
            if wanted(PER_EXAMPLE.name, quick=True):
                rows += training_step.per_example(10 if options.quick else 50, rounds)
        elif name == "layers":
            noisy = [v for v in layers.LAYERS if wanted(v.name, v.quick)]
            rows += layers.measure(noisy, rounds, warmup) if noisy else []
        elif name == "drop-block":
            rows += [row for row in blocks.drop_blocks(rounds, warmup) if wanted(row.variant, quick=True)]
        elif name == "drop-path":
            steps = 3 if options.quick else blocks.WARMUP
            measured = blocks.stochastic_depth(rounds, steps, large=not options.quick)
            rows += [row for row in measured if wanted(row.variant, quick=True)]
        elif name == "compact":
            these = [each for each in compact.NETWORKS if wanted(each, quick=each not in compact.WIDE)]
            rows += compact.measure(these, rounds, warmup)
        elif name == "mc-predict":
            cases = [case for case in prediction.CASES if wanted(case.name, case.quick)]
            rows += prediction.measure(cases, rounds, warmup) if cases else []
        elif name == "kl":
            if divergences:
                rows += divergence.measure(divergences, rounds, warmup)
        else:
            if name == "memory-4096":
                few = [v for v in variants if v is HARDEST or not options.quick]  # a process each takes seconds
                rows += memory.measure(few, rounds) if few else []
            elif variants:
                rows += training_step.measure(name, variants, rounds, warmup)
            rows += [Row(name, peer, note=reason) for peer, reason in missing.items() if wanted(peer, quick=True)]
    return rows


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.out is not None and (options.out.is_dir() or not options.out.parent.is_dir()):
        parser.error(f"--out must name a file in a folder that exists, got {options.out}")
    torch.manual_seed(0)
    if options.mkl:
        products._WORTH = sys.maxsize
    rows = _run(options, lambda text: print(text, file=sys.stderr, flush=True))
    if not rows:
        parser.error(f"no variant of these benchmarks has {options.variant!r} in its name; leave out --variant for all")
    threads = torch.get_num_threads()
    kernel = ", products by MKL" if options.mkl else ""
    setting = f"{table.device_name()}, {threads} threads, torch {torch.__version__}{kernel}"
    table.show(rows, f"{setting}: ratios to plain layers")
    if options.out is not None:
        try:
            table.write(rows, options.out)
        except OSError as error:
            parser.error(f"--out could not be written: {error}")


if __name__ == "__main__":
    main()
