"""Compacted networks: what is left of parameters, work, error and time when whole units were learned to be noise.

Each network is trained plainly for some epochs, then with a rate for every output unit and a share of the divergence,
sparsified at log α > 3, fine-tuned with its zeros held, and compacted: with channels in multiples of four, and for
inference, which folds norms and puts channels last, too. What that alone gives is told by the plainly trained network,
of which nothing is removed. The divergence grows in over half of the epochs. At a share of 0.3 of it and above LeNet-5
and the MLP of 1000 collapsed, and at 0.1 next to nothing of the small transformer went: so the shares that are tried
are others for every network, smaller where there are more weights. Validation images choose the share: the least work
whose error is at most half a point above that of the network trained plainly for as long, or else the smallest error.
The time of inference is measured of the sparse network as it was and of the compacted ones, in turn, in torch and in
onnxruntime. At a batch of one a call of torch costs more than what it computes, unless a network is wide; so each kind
of network is there with a wide one.
"""

from __future__ import annotations

import copy
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments import _compact as networks
from vardrop.reproduce.experiments import _onnx
from vardrop.reproduce.run import device_name

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

THRESHOLD = 3.0  # of log α
ALLOWED = 0.5  # points of validation error
DRAWN = 0.01  # of the work: where less is left the network has collapsed
SHARES = {  # of the divergence: tried on validation images
    "LeNet-300-100": (0.3, 1.0), "LeNet-5": (0.1, 0.2), "ResNet": (1.0, 2.0), "transformer": (0.3, 0.6),
    "MLP of 1000": (0.03, 0.1), "ResNet of 64": (0.1,), "transformer of 256": (0.005, 0.02),
}  # fmt: skip
WIDE = ("MLP of 1000", "LeNet-5", "ResNet of 64", "transformer of 256")  # one example computes longer than it calls
BATCHES = (1, 256)
ENGINES = ("torch", "onnxruntime")
FORMS = ("compact", "for inference", "nothing removed")

SIZES: dict[str, dict[str, tuple[int, ...]]] = {
    "smoke": {"LeNet-300-100": (30, 10), "LeNet-5": (4, 6, 20), "ResNet": (1, 4), "transformer": (2, 8, 1, 2, 16)},
    "cpu": {
        "LeNet-300-100": (300, 100), "LeNet-5": (20, 50, 500), "ResNet": (1, 16), "transformer": (2, 64, 2, 4, 128),
        "MLP of 1000": (1000, 1000, 1000), "ResNet of 64": (1, 64), "transformer of 256": (4, 256, 2, 4, 1024),
    },
}  # fmt: skip
SIZES["gpu"] = SIZES["cpu"] | {"ResNet": (2, 16), "transformer": (2, 128, 4, 4, 256)}
SCALES: dict[str, Config] = {
    "smoke": {"data": "digits", "side": 16, "train": 200, "validation": 100, "batch": 50, "plain": 1, "epochs": 1,
              "warmup": 1, "finetune": 1, "rounds": 1, "seeds": 1},
    "cpu": {"data": "mnist", "side": 28, "train": 10000, "validation": 5000, "batch": 100, "plain": 6, "epochs": 16,
            "warmup": 8, "finetune": 8, "rounds": 15, "seeds": 2},
    "gpu": {"data": "mnist", "side": 28, "train": 50000, "validation": 10000, "batch": 100, "plain": 20, "epochs": 60,
            "warmup": 20, "finetune": 10, "rounds": 25, "seeds": 3},
}  # fmt: skip


def cells(scale: str) -> list[Config]:
    """Networks, shares of the divergence and seeds; on the processor at every scale, for that is what is timed."""
    shared = {key: value for key, value in SCALES[scale].items() if key != "seeds"}
    shared |= {"sharing": "neuron", "unit": "output", "lr": 1e-3, "noise_lr": 3e-3, "forms": list(FORMS)}
    return [
        {**shared, "network": network, "size": list(size), "kl_scale": share, "seed": seed}
        for seed in range(SCALES[scale]["seeds"])
        for network, size in SIZES[scale].items()
        for share in (SHARES[network] if scale != "smoke" else (0.5,))
    ]


def run_cell(config: Config) -> list[Row]:
    """A row of sizes and errors, and one of times for each engine, size of a batch and form of the network."""
    data = networks.images(config["data"], config["train"], config["validation"], config["side"])
    with torch.random.fork_rng(devices=[]):
        begun, plain = _plain(json.dumps({key: value for key, value in config.items() if key != "kl_scale"}))
        net = copy.deepcopy(begun)
        torch.manual_seed(config["seed"])
        networks.train_sparse(net, data.train, config)
        report = vd.sparsify_(net, threshold=THRESHOLD, allow_empty=True)
        vd.restore_(net)
        networks.finetune(net, data.train, config)
    example = data.train[0][:2]
    small = vd.compact(net, example, round_to=4)
    ours = (small, *(vd.compact(each, example, for_inference=True) for each in (net.eval(), plain.eval())))
    forms = dict(zip(config["forms"], ours, strict=True))
    found: Any = small.compaction
    identity: Row = {key: config[key] for key in ("network", "kl_scale", "seed")}
    (parameters, fewer), (work, less) = found.parameters, found.multiply_adds
    row: Row = {
        "table": "networks", **identity,
        "sparsity": report.sparsity,
        "parameters": parameters, "parameters_left": fewer,
        "multiply_adds": work // 2, "multiply_adds_left": less // 2,  # of one example; two were counted
        "work_ratio": less / work,
    }  # fmt: skip
    for name, each in (("plain", plain), ("sparse", net), ("compact", small)):
        row[f"validation_error_{name}"] = networks.error(each, data.validation)
        row[f"test_error_{name}"] = networks.error(each, data.test)
    x = data.test[0]
    left = {form: each.compaction.multiply_adds[1] / work for form, each in forms.items()}
    timed = [
        {"table": "times", **identity, **each, "work_ratio": left[each["form"]]}
        for engine in ENGINES
        for batch in BATCHES
        for each in times(net, forms, x[:batch], config["rounds"], engine)
    ]
    return [row, *timed]


@functools.lru_cache(maxsize=1)  # the shares of one network and seed follow each other
def _plain(config: str) -> tuple[nn.Module, nn.Module]:
    """The network that sparse training begins with, and the one that trained on for as long as the sparse one."""
    read: Config = json.loads(config)
    data = networks.images(read["data"], read["train"], read["validation"], read["side"])
    torch.manual_seed(read["seed"])
    begun = networks.network(read)
    networks.fit(begun, data.train, read, read["plain"], _same, read["seed"])
    plain = copy.deepcopy(begun)
    networks.fit(plain, data.train, read, read["epochs"] + read["finetune"], _same, read["seed"] + 1)
    return begun, plain


def _same(loss: Tensor) -> Tensor:
    return loss


def times(dense: nn.Module, forms: Mapping[str, nn.Module], x: Tensor, rounds: int, engine: str) -> list[Row]:
    """Processor time of forward passes of all, measured in turn, and of each form the median of its ratio to dense."""
    repeats = max(1, 32 // len(x))
    calls = [_call(net, x, engine) for net in (dense, *forms.values())]
    seconds: list[list[float]] = []
    with torch.inference_mode():
        for _ in range(rounds + 3):
            seconds.append([])
            for call in calls:
                start = time.process_time()
                for _ in range(repeats):
                    call()
                seconds[-1].append((time.process_time() - start) / repeats)
    dense_times, *form_times = zip(*seconds[3:], strict=True)  # the first ones set kernels up
    rows: list[Row] = []
    for form, its_times in zip(forms, form_times, strict=True):
        ratios = [ours / theirs for ours, theirs in zip(its_times, dense_times, strict=True)]
        low, high = (statistics.quantiles(ratios, n=4, method="inclusive") if rounds > 1 else ratios * 3)[::2]
        rows.append({
            "form": form,
            "engine": engine,
            "batch": len(x),
            "ms_dense": 1000 * statistics.median(dense_times),
            "ms_form": 1000 * statistics.median(its_times),
            "time_ratio": statistics.median(ratios),
            "quartiles": f"{low:.3f} to {high:.3f}",
            "threads": torch.get_num_threads(),
            "device": device_name("cpu"),
        })  # fmt: skip
    return rows


def _call(net: nn.Module, x: Tensor, engine: str) -> Callable[[], Any]:
    return _onnx.forward(net, x) if engine == "onnxruntime" else functools.partial(net, x)


def summarise(results: list[Result]) -> list[Row]:
    """Of every network and seed the share that validation images choose; means of these; the network that is worst."""
    rows = [row for result in results for row in result.rows]
    chosen: list[Row] = []
    timed: list[Row] = []
    for network, seed in dict.fromkeys((row["network"], row["seed"]) for row in rows):
        of_network = [r for r in rows if (r["network"], r["seed"]) == (network, seed)]
        best = _choice([r for r in of_network if r["table"] == "networks"])
        more = best["test_error_compact"] - best["test_error_plain"]
        chosen.append({**best, "table": "chosen", "error_increase": more})
        its = [r for r in of_network if r["table"] == "times" and r["kl_scale"] == best["kl_scale"]]
        timed += [{**row, "over_work": row["time_ratio"] / row["work_ratio"]} for row in its]
    means = _means("means", chosen, ("network",), SIZES_AND_ERRORS)
    inference = _means("inference", timed, ("network", "form", "engine", "batch"), TIMES)
    groups = {"wide": WIDE, "small": set(SHARES) - set(WIDE), "all": SHARES}
    worst = [
        _worst(name, form, [row for row in means + inference if row["network"] in group])
        for form in FORMS
        for name, group in groups.items()
    ]
    return [*chosen, *means, *inference, *filter(None, worst)]


def _worst(group: str, form: str, rows: list[Row]) -> Row:
    """The largest of every measure over the networks of a group, in one form; nothing of an empty group."""
    means = [row for row in rows if row["table"] == "means"]
    if not means:
        return {}
    worst: Row = {"table": "worst", "group": group, "form": form, "networks": len(means)}
    inference = [row for row in rows if row["table"] == "inference" and row["form"] == form]
    for engine, batch in dict.fromkeys((row["engine"], row["batch"]) for row in inference):
        at = [row["over_work"] for row in inference if (row["engine"], row["batch"]) == (engine, batch)]
        worst[f"over_work_{engine}_{batch}"] = max(at)
    return worst | {column: max(row[column] for row in means) for column in ("error_increase", "work_ratio")}


SIZES_AND_ERRORS = ("parameters_left", "work_ratio", "test_error_plain", "test_error_compact", "error_increase")
TIMES = ("ms_dense", "ms_form", "work_ratio", "time_ratio", "over_work")


def _means(table: str, rows: list[Row], by: tuple[str, ...], columns: tuple[str, ...]) -> list[Row]:
    """Over seeds, with the standard deviation between them."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in by), []).append(row)
    made: list[Row] = []
    for key, group in groups.items():
        mean: Row = {"table": table, **dict(zip(by, key, strict=True)), "seeds": len(group)}
        for column in columns:
            mean[column] = statistics.fmean(row[column] for row in group)
            if len(group) > 1:
                mean[f"{column}_sd"] = statistics.stdev(row[column] for row in group)
        made.append(mean)
    return made


def _choice(rows: list[Row]) -> Row:
    """The least work of those whose validation error is near enough to the plain network's, else the smallest error."""
    near = [r for r in rows if r["validation_error_compact"] <= r["validation_error_plain"] + ALLOWED]
    if near:
        return min(near, key=lambda row: row["work_ratio"])
    return min(rows, key=lambda row: row["validation_error_compact"])


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Ratio of times against ratio of multiply-adds: hollow as compacted, full where that was done for inference."""
    from matplotlib.figure import Figure

    every = [r for result in results for r in result.rows if r["table"] == "times" and r["form"] in FORMS[:2]]
    rows = [row for row in every if row["work_ratio"] >= DRAWN]
    gone = {(row["network"], row["kl_scale"], row["seed"]) for row in every if row["work_ratio"] < DRAWN}
    panels = [(engine, batch) for engine in ENGINES for batch in sorted({row["batch"] for row in rows})]
    drawn = Figure(figsize=(9, 7.6), layout="constrained")
    grid = drawn.subplots(len(ENGINES), len(panels) // len(ENGINES), sharex=True, sharey=True)
    ends = [min(row["work_ratio"] for row in rows) / 1.2, 1.1]
    for axes, (engine, batch) in zip(grid.flat, panels, strict=True):
        for i, network in enumerate(dict.fromkeys(row["network"] for row in rows)):
            for form in FORMS[:2]:
                key = (network, form, engine, batch)
                points = [r for r in rows if (r["network"], r["form"], r["engine"], r["batch"]) == key]
                x, y = ([row[name] for row in points] for name in ("work_ratio", "time_ratio"))
                full = form == "for inference"
                face, label = (f"C{i}", network) if full else ("none", None)
                axes.scatter(x, y, edgecolors=f"C{i}", facecolors=face, label=label, s=28)
        axes.plot(ends, ends, color="C7", linewidth=0.8, label="in proportion")
        axes.plot(ends, [1.5 * end for end in ends], color="C7", linewidth=0.8, linestyle="--", label="1.5 times that")
        axes.set(xscale="log", yscale="log", title=f"{engine}, batch {batch}")
    title = "hollow: compacted; full: compacted for inference"
    if gone:
        title += f"; not drawn: {len(gone)} that collapsed, with less than {DRAWN:.0%} left"
    drawn.suptitle(title, fontsize="small")
    for axes in grid[:, 0]:
        axes.set_ylabel("time left")
    for axes in grid[-1]:
        axes.set_xlabel("multiply-adds left")
    grid[0, -1].legend(fontsize="x-small", loc="lower right")
    return drawn


EXPERIMENT = Experiment(
    name="compact",
    summary="Networks that were learned to be sparse by units, compacted: their size, error and measured time.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("times", "networks"),
    alone=True,
)
