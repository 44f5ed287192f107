"""What the local trick is for: gradient noise per second, and seconds to a given bound on validation rows.

The trick costs a second product per layer, a weight sample for the whole minibatch costs a draw of the weights, and the
larger the minibatch, the cheaper is the latter. What counts is the noise for the time: a step that takes twice as long
pays if the variance is less than half. So one cell measures variance and seconds of a step under every estimator, the
steps of all estimators interleaved, and the others count steps until the evidence lower bound on validation rows, per
data point, has passed a mark. Their seconds are those steps times the seconds of a step, so that what else the machine
does while they run does not count; for the same reason those of a single CPU thread are the processor's own.

Each estimator has its best of the learning rates that it was run with: three, but for a weight sample per data point,
which is too slow for that, two, the local trick's best one and its neighbour.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.data import load
from vardrop.methods import prepare
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.run import device_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

ESTIMATORS = ("local", "per_example", "per_minibatch", "flipout")
SLOW = {32: (0.01, 0.003), 128: (0.01, 0.003), 1000: (0.01, 0.03)}  # minibatch -> learning rates of per_example
GRADIENTS = {"theta": "weight", "log_alpha": "weight_log_alpha"}  # and the ends of their parameters' names


def cells(scale: str) -> list[Config]:
    """One cell for variances and times, and one for every estimator, minibatch size and seed."""
    shared: Config = {
        "smoke": {"data": "digits", "model": "mlp:1x16", "validation": 200, "mark": 3.1, "device": "cpu"},
        "cpu": {"data": "mnist", "model": "mlp:3x50", "validation": 10_000, "mark": 1.0, "device": "cpu"},
        "gpu": {"data": "mnist", "model": "mlp:3x340", "validation": 10_000, "mark": 5.0, "device": "cuda"},
    }[scale]
    sizes = {32: 1600, 128: 1000, 1000: 400}  # minibatch -> steps at most
    rates, batches, rounds, seeds = [0.003, 0.01, 0.03], 30, 9, 2
    if scale == "smoke":
        sizes, rates, batches, rounds, seeds = {32: 40, 128: 30, 1000: 30}, [0.01], 4, 2, 1
    made: list[Config] = [
        {"part": "steps", "sizes": list(sizes), "batches": batches, "rounds": rounds,
         "before": max(sizes.values()) // 10, "seed": 0, **shared}
    ]  # fmt: skip
    for name in ESTIMATORS:
        for size, steps in sizes.items():
            together = [[lr] for lr in SLOW[size]] if name == "per_example" and scale != "smoke" else [rates]
            for lrs, seed in itertools.product(together, range(seeds)):
                made.append({"part": "training", "estimator": name, "M": size, "steps": steps, "lrs": lrs,
                             "looks": 80 if scale != "smoke" else 5, "seed": seed, **shared})  # fmt: skip
    return made


class Problem:
    """A network with variational dropout B, a rate for every weight, and the rows to train and to judge it by."""

    def __init__(self, config: Config) -> None:
        data = load(config["data"])
        kept, device = config["validation"], config["device"]
        x, y = data.train_x.to(device), data.train_y.to(device)
        self.x, self.y = x[:-kept], y[:-kept]
        self.validation = x[-kept:], y[-kept:]
        self.network, _, _ = prepare("vd-b", config["model"], data.shape, data.outputs, "weight")
        self.network.to(device).train()
        self.elbo = vd.ELBO(self.network, num_data=len(self.x))

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        rows = torch.randint(len(self.x), (size,), generator=generator).to(self.x.device)
        return self.x[rows], self.y[rows]

    def step(self, name: str, batch: tuple[Tensor, Tensor], optimizer: torch.optim.Optimizer) -> None:
        with vd.estimator(name):
            loss = self.elbo(F.cross_entropy(self.network(batch[0]), batch[1]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    @torch.no_grad()
    def bound(self) -> float:
        """The negative bound per data point on validation rows: mean nll under weight noise, and KL / N."""
        x, y = self.validation
        nll = sum(F.cross_entropy(self.network(a), b, reduction="sum").item()
                  for a, b in zip(x.split(1000), y.split(1000), strict=True))  # fmt: skip
        return nll / len(x) + vd.kl_divergence(self.network).item() / len(self.x)


def run_cell(config: Config) -> list[Row]:
    """Variances and seconds of a step, or the steps that training needs."""
    with torch.random.fork_rng(devices=[0] if config["device"] == "cuda" else []):
        if config["part"] == "steps":
            return _steps(config)
        return [_training(config, lr) for lr in config["lrs"]]


def _training(config: Config, lr: float) -> Row:
    """Train until the mark is passed, looking every few steps."""
    torch.manual_seed(config["seed"])
    problem = Problem(config)
    optimizer = torch.optim.Adam(problem.network.parameters(), lr=lr, fused=True)
    generator = torch.Generator().manual_seed(config["seed"])
    every = max(1, config["steps"] // config["looks"])
    bound, needed = math.inf, None
    for step in range(1, config["steps"] + 1):
        problem.step(config["estimator"], problem.batch(config["M"], generator), optimizer)
        if step % every == 0:
            bound = problem.bound()
            if bound <= config["mark"]:
                needed = step
                break
    return {
        "table": "runs", "estimator": config["estimator"], "M": config["M"], "lr": lr, "seed": config["seed"],
        "steps": needed, "last_bound": bound, "mark": config["mark"],
    }  # fmt: skip


def _steps(config: Config) -> list[Row]:
    """Seconds of a step, every one right after a local step of the same minibatch size, and variances of gradients."""
    torch.manual_seed(config["seed"])
    problem = Problem(config)
    generator = torch.Generator().manual_seed(config["seed"])
    optimizer = torch.optim.Adam(problem.network.parameters(), lr=0.003, fused=True)
    for _ in range(config["before"]):
        problem.step("local", problem.batch(128, generator), optimizer)
    rows: list[Row] = []
    for size in config["sizes"]:
        some = [problem.batch(size, generator) for _ in range(config["batches"])]
        variances = vd.gradient_variance(problem.network, _nll, some, ESTIMATORS)
        seconds = _seconds(problem, some[0], config["rounds"])
        beside = statistics.median(reference for _, reference in seconds["local"])
        for name in ESTIMATORS:
            ratios = [own / reference for own, reference in seconds[name]]
            ratio = 1.0 if name == "local" else statistics.median(ratios)
            rows.append({
                "table": "steps", "M": size, "estimator": name, "seconds": ratio * beside, "seconds_to_local": ratio,
                **{f"variance_{key}": _total(problem.network, variances[name], end) for key, end in GRADIENTS.items()},
                "threads": torch.get_num_threads(), "device": device_name(config["device"]),
            })  # fmt: skip
    return rows


def _nll(network: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(network(batch[0]), batch[1])


def _total(network: nn.Module, variances: dict[str, float], end: str) -> float:
    """Added up over the entries of all parameters of a kind."""
    sizes = {name: parameter.numel() for name, parameter in network.named_parameters()}
    return sum(variance * sizes[name] for name, variance in variances.items() if name.endswith(f".{end}"))


def _seconds(problem: Problem, batch: tuple[Tensor, Tensor], rounds: int) -> dict[str, list[tuple[float, float]]]:
    """Estimator -> seconds of a step and of the local step right before it, in every round.

    The steps have a learning rate of 0: they cost the same, and change nothing.
    """
    optimizer = torch.optim.Adam(problem.network.parameters(), lr=0.0, fused=True)

    one_thread = not batch[0].is_cuda and torch.get_num_threads() == 1
    clock = time.process_time if one_thread else time.perf_counter  # what others do on the machine does not count

    def seconds(name: str) -> float:
        _wait(batch[0])
        start = clock()
        problem.step(name, batch, optimizer)
        _wait(batch[0])
        return clock() - start

    found: dict[str, list[tuple[float, float]]] = {name: [] for name in ESTIMATORS}
    for i in range(rounds + 1):
        for name in ESTIMATORS:
            reference = seconds("local")
            own = seconds(name)
            if i > 0:  # the first pays for memory
                found[name].append((own, reference))
    return found


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)


def summarise(results: list[Result]) -> list[Row]:
    """For every minibatch size and estimator: noise times seconds, and seconds to the mark; and who wins."""
    rows = [row for result in results for row in result.rows]
    steps = {(row["M"], row["estimator"]): row for row in rows if row["table"] == "steps"}
    made: list[Row] = []
    for (size, name), step in steps.items():
        local = steps[size, "local"]
        row: Row = {"table": "noise for the time", "M": size, "estimator": name,
                    "seconds_to_local": step["seconds_to_local"]}  # fmt: skip
        for key in GRADIENTS:
            ratio = step[f"variance_{key}"] / local[f"variance_{key}"]
            row[f"variance_{key}_to_local"] = ratio
            row[f"variance_times_seconds_{key}_to_local"] = ratio * step["seconds_to_local"]
        made.append(row)
    times = {key: best for key, step in steps.items() if (best := _best(rows, *key, step["seconds"]))}
    for (size, name), found in times.items():
        beside = {other: times[size, other]["seconds"] for other in ESTIMATORS if (size, other) in times}
        reached = [seconds for seconds in beside.values() if seconds is not None]
        local_seconds = beside.get("local")
        own = found["seconds"]
        made.append({
            "table": "time to the mark", "M": size, "estimator": name, **found,
            "seconds_to_local": own / local_seconds if own and local_seconds else None,
            "first": own is not None and own == min(reached),
        })  # fmt: skip
    return made


def _best(rows: list[Row], size: int, name: str, seconds: float) -> dict[str, Any]:
    """The learning rate that needs the fewest steps on average, of those with which every seed arrived."""
    runs: dict[float, list[int | None]] = {}
    for row in rows:
        if row["table"] == "runs" and (row["M"], row["estimator"]) == (size, name):
            runs.setdefault(row["lr"], []).append(row["steps"])
    if not runs:
        return {}
    arrived = {lr: [n for n in steps if n is not None] for lr, steps in runs.items()}
    means = {lr: statistics.fmean(some) for lr, some in arrived.items() if some and len(some) == len(runs[lr])}
    seeds = max(len(steps) for steps in runs.values())
    if not means:
        return {"lr": None, "steps": None, "seconds": None, "seeds": seeds}
    lr = min(means, key=lambda lr: means[lr])
    return {"lr": lr, "steps": means[lr], "seconds": means[lr] * seconds, "seeds": seeds}


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Noise times seconds for θ and for log α, and seconds to the mark, against M; stars are the winners."""
    from matplotlib.figure import Figure

    rows = summarise(results)
    steps = {(row["M"], row["estimator"]): row for r in results for row in r.rows if row["table"] == "steps"}
    panels: list[tuple[str, dict[tuple[int, str], float]]] = [
        (f"variance of the gradient of {symbol}\n× seconds of a step",
         {key: row[f"variance_{name}"] * row["seconds"] for key, row in steps.items()})
        for name, symbol in (("theta", "θ"), ("log_alpha", "log α"))
    ]  # fmt: skip
    times = {(r["M"], r["estimator"]): r["seconds"] for r in rows if r["table"] == "time to the mark" and r["seconds"]}
    panels.append(("seconds to the bound\non validation rows", times))
    drawn = Figure(figsize=(11, 3.8), layout="constrained")
    for axes, (title, values) in zip(drawn.subplots(1, 3), panels, strict=True):
        for color, name in enumerate(ESTIMATORS):
            of_name = sorted(size for size, other in values if other == name)
            axes.plot(of_name, [values[size, name] for size in of_name], "o-", color=f"C{color}", label=name)
        sizes = sorted({size for size, _ in values})
        for size in sizes:
            own = {other: value for (some, other), value in values.items() if some == size}
            first = min(own, key=lambda other: own[other])
            star = {"color": f"C{ESTIMATORS.index(first)}", "markersize": 16, "markeredgecolor": "white"}
            axes.plot(size, own[first], "*", **star)
        if values:
            axes.set(xscale="log", yscale="log")
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.set_xlabel("M")
        axes.set_title(title, fontsize="medium")
    drawn.legend(*drawn.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ESTIMATORS))
    return drawn


EXPERIMENT = Experiment(
    name="convergence",
    summary="Gradient noise for the time of a step, and time to a given bound, under every estimator.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("runs",),
    alone=lambda config: config["part"] == "steps",
)
