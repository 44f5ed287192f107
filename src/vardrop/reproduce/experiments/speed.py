"""The paper's speed: an epoch with the local reparameterization trick against one weight sample per data point.

Section 5 gives 7.4 s against 1635 s for a 784-3x1000-10 network and minibatches of 1000. A step here is the forward
and backward pass of the data term on such a minibatch. The divergence and the optimiser's step cost every form the
same, and the pixels' values nothing, so there are none of the three. Per-example forms run on a part of the minibatch
and their time is scaled up in proportion: their cost is a sum over examples.

How slow the slow side is depends on who writes it, so it is written four ways. The *naive* one is a batch of weight
samples. The *honest* baseline is whichever of the four turns out fastest.
"""

from __future__ import annotations

import itertools
import statistics
import time
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.run import device_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

TRAINING_SET = 60_000


class Form(NamedTuple):
    """A way to compute the gradient: the estimator, its chunk, and how many examples go through before a backward."""

    name: str
    estimator: str
    chunk: int | None
    slice: int  # of the minibatch, in examples


def cells(scale: str) -> list[Config]:
    """One cell: all forms have to be measured side by side."""
    size = {
        "smoke": {"measured": 4, "chunk": 2, "rounds": 1},
        "cpu": {"measured": 64, "chunk": 16, "rounds": 7},
        "gpu": {"measured": 1000, "chunk": 100, "rounds": 7},
    }[scale]
    return [{"batch": 1000, **size, "device": "cuda" if scale == "gpu" else "cpu", "seed": 0}]


def forms(batch: int, chunk: int) -> list[Form]:
    """The trick first, then the four per-example forms, the naive one first."""
    return [
        Form("local reparameterization", "local", None, batch),
        Form("weight samples in batches", "per_example", chunk, batch),
        Form("weight samples in batches, a backward each", "per_example", chunk, chunk),
        Form("loop over examples", "per_example", 1, batch),
        Form("loop over examples, a backward each", "per_example", 1, 1),
    ]


def network(device: str) -> nn.Module:
    """784-3x1000-10 with ReLUs, a rate for every weight."""
    sizes = (784, 1000, 1000, 1000, 10)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    model = nn.Sequential(*layers[:-1]).to(device)
    vd.convert_(model, vd.VariationalDropout(type="B", sharing="weight"))
    return model


def seconds(model: nn.Module, x: Tensor, y: Tensor, form: Form, batch: int, generator: torch.Generator) -> float:
    """One forward and backward pass over the given examples of a minibatch of ``batch``."""
    model.zero_grad(set_to_none=True)
    _wait(x)
    start = time.perf_counter()
    for inputs, labels in zip(x.split(form.slice), y.split(form.slice), strict=True):
        with vd.estimator(form.estimator, generator=generator, chunk=form.chunk):
            (F.cross_entropy(model(inputs), labels, reduction="sum") / batch).backward()
    _wait(x)
    return time.perf_counter() - start


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def run_cell(config: Config) -> list[Row]:
    """A row for every form: medians over rounds, in which every form is measured right after a local step."""
    batch, measured, device = config["batch"], config["measured"], config["device"]
    generator = torch.Generator(device).manual_seed(config["seed"])
    x = torch.rand(batch, 784, device=device, generator=generator)
    y = torch.randint(10, (batch,), device=device, generator=generator)
    with torch.random.fork_rng(devices=[]):  # the weights are drawn on the CPU
        torch.manual_seed(config["seed"])
        model = network(device)
    local, *others = forms(batch, config["chunk"])

    def step(form: Form, examples: int) -> float:
        return seconds(model, x[:examples], y[:examples], form, batch, generator) * batch / examples

    for form in others:  # the first pass of each pays for memory that the next ones reuse
        step(form, min(measured, 2 * config["chunk"]))
    step(local, batch)
    local_steps: list[float] = []
    steps: dict[str, list[float]] = {form.name: [] for form in others}
    ratios: dict[str, list[float]] = {form.name: [] for form in others}
    for _ in range(config["rounds"]):
        for form in others:
            local_steps.append(step(local, batch))
            steps[form.name].append(step(form, measured))
            ratios[form.name].append(steps[form.name][-1] / local_steps[-1])

    fastest = min(ratios, key=lambda name: statistics.median(ratios[name]))
    rows = []
    for form in (local, *others):
        per_step = statistics.median(steps.get(form.name, local_steps))
        rows.append({
            "variant": form.name,
            "seconds_per_step": per_step,
            "seconds_per_epoch": per_step * TRAINING_SET / batch,
            "ratio_to_local": statistics.median(ratios.get(form.name, [1.0])),
            "measured_examples": batch if form is local else measured,
            "scaled": form is not local and measured < batch,
            "naive": form is others[0],
            "fastest_per_example": form.name == fastest,
            "threads": torch.get_num_threads(),
            "device": device_name(device),
        })  # fmt: skip
    return rows


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """How many times longer every form takes than the trick, beside the paper's number."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows if row["variant"] != "local reparameterization"]
    drawn = Figure(figsize=(8, 2.8), layout="constrained")
    axes = drawn.subplots()
    bars = axes.barh(
        [row["variant"] for row in rows],
        [row["ratio_to_local"] for row in rows],
        color=["C0" if row["fastest_per_example"] else "C7" for row in rows],
    )
    axes.bar_label(bars, fmt="%.0f×", label_type="center", color="white")
    for claim in claims:
        if claim.published is not None:
            axes.axvline(claim.published, color="C3", linestyle="--", label=f"{claim.paper}: over {claim.published:g}×")
    axes.legend(loc="lower right", fontsize="small", framealpha=1)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.set(xlabel="time ÷ time with the local trick (blue: the fastest)")
    return drawn


EXPERIMENT = Experiment(
    name="speed",
    summary="An epoch with the local reparameterization trick against one with a weight sample for every data point.",
    cells=cells,
    run_cell=run_cell,
    figure=figure,
    alone=True,
)
