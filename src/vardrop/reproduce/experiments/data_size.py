"""Dropout against the amount of data: a small character transformer on growing parts of one text.

The article says that dropout only helps while a model has capacity to spare relative to its data. Fixed rates on
embedding, attention and residual branches (:func:`vardrop.set_rates_`) are compared with rates that are learned:

* *learned weights*: variational dropout A on every linear layer, one rate a layer. It is the one that claims are about,
  as its divergence is that of a posterior over weights (Kingma et al. 2015, section 3.1).
* *learned sites*: the fixed rates' own places, attention weights apart, with Gaussian noise of learned rates
  (``vd.replace_dropout_``).

N of the objective is the number of training characters, for the nll is a mean per character. The last tenth of the text
is for testing, the 5 % before it for validation, training has the first x % of the rest. All runs are equally long; the
step with the lowest validation nll is the one that counts, and chooses the best fixed rate too.
"""

from __future__ import annotations

import copy
import itertools
import math
import statistics
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.data.text import encode, load_text
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.reproduce.experiments._chars import Transformer, cover, draw, evaluate, markov_text, mean_nll

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

WEIGHTS, SITES = "learned weights", "learned sites"
START = 0.1  # where learned rates start
_TEST, _VALIDATION = 0.10, 0.05
_WARMUP = 50  # steps
_CPU = {  # percent -> rates of the first seed, and of the others: 0, and the best of the first
    1: ((0.0, 0.05, 0.1, 0.2, 0.4, 0.6), (0.0, 0.1)),
    3: ((0.0, 0.05, 0.1, 0.2, 0.4, 0.6), (0.0, 0.05)),
    10: ((0.0, 0.05, 0.1), (0.0,)),
    30: ((0.0, 0.05), (0.0, 0.05)),
    100: ((0.0, 0.05, 0.1), (0.0,)),
}
_NOISE_SPEED = 10  # learning rate of log alpha, relative to that of the weights: it has units to go, they have tenths


def cells(scale: str) -> list[Config]:
    """Seeds outermost and the ends of the range first, so that what is finished is balanced if time runs out."""
    size: dict[str, Any] = {
        "smoke": {"text": "markov", "width": 16, "layers": 1, "heads": 2, "context": 16, "batch": 8, "steps": 10},
        "cpu": {"text": "tinyshakespeare", "width": 96, "layers": 2, "heads": 4, "context": 64, "batch": 16}
        | {"steps": 1000},
        "gpu": {"text": "tinyshakespeare", "width": 384, "layers": 6, "heads": 6, "context": 256, "batch": 64}
        | {"steps": 5000},
    }[scale]
    shared = size | {
        "lr": 4e-3 if scale != "gpu" else 1e-3,
        "evaluations": 2 if scale == "smoke" else 20,
        "bfloat16": scale != "smoke",
        "device": "cuda" if scale == "gpu" else "cpu",
    }
    seeds = range({"smoke": 2, "cpu": 3, "gpu": 5}[scale])
    return [
        {"percent": percent, "method": method, "rate": rate, "seed": seed, **shared}
        for seed in seeds
        for percent in ((10, 100) if scale == "smoke" else (1, 3, 100, 10, 30))
        for method, rate in _noises(scale, percent, seed)
    ]


def _noises(scale: str, percent: int, seed: int) -> list[tuple[str, float]]:
    """The noises that are tried at a size: every rate, or at scale cpu those around the best one of validation."""
    rates: tuple[float, ...] = (0.0, 0.2) if scale == "smoke" else (0.0, 0.05, 0.1, 0.2, 0.4, 0.6)
    ways: tuple[str, ...] = (WEIGHTS, SITES)
    if scale == "cpu":  # chosen on validation while it ran: rates of 0.2 and more were far worse at 1 % and 3 %
        rates, again = _CPU[percent]
        if seed > 0:
            rates, ways = again, (WEIGHTS,)
        elif percent in (10, 30):
            ways = (WEIGHTS,)
    return [("fixed", rate) for rate in rates] + [(way, START) for way in ways]


class Parts(NamedTuple):
    """Codes of the characters for training, validation and testing."""

    train: Tensor
    validation: Tensor
    test: Tensor


def parts(codes: Tensor, percent: float) -> Parts:
    """The first ``percent`` of what is there for training, and what is set aside at the end."""
    test, validation = round(len(codes) * _TEST), round(len(codes) * _VALIDATION)
    rest = len(codes) - test - validation
    return Parts(codes[: round(rest * percent / 100)], codes[rest : rest + validation], codes[rest + validation :])


def noisy_(model: nn.Module, method: str, rate: float, width: int) -> list[nn.Parameter]:
    """Give a network its noise, and return what of it is learned."""
    if method == WEIGHTS:
        posterior = vd.VariationalDropout(type="A", sharing="layer", rate=rate)
        return vd.convert_(model, posterior, where=lambda module, _: isinstance(module, nn.Linear)).new_parameters
    if method == SITES:
        vd.set_rates_(model, embedding=rate, residual=rate)
        return vd.replace_dropout_(model, "variational", features=width).new_parameters
    vd.set_rates_(model, embedding=rate, residual=rate, attention=rate)
    return []


def run_cell(config: Config) -> list[Row]:
    """Train once; a row for the run, and one for every learned rate."""
    with torch.random.fork_rng(devices=["cuda"] if config["device"] == "cuda" else []):
        torch.manual_seed(config["seed"])
        return _train(config)


def _train(config: Config) -> list[Row]:
    context, steps, device = config["context"], config["steps"], torch.device(config["device"])
    text = markov_text(6000, seed=0) if config["text"] == "markov" else load_text(config["text"])
    codes, alphabet = encode(text)
    train, *aside = parts(codes.to(device), config["percent"])
    validation, test = (cover(part, context) for part in aside)
    model = Transformer(len(alphabet), context, config["width"], config["layers"], config["heads"]).to(device)
    learned = noisy_(model, config["method"], config["rate"], config["width"])
    elbo = vd.ELBO(model, num_data=len(train))
    plain = [p for p in model.parameters() if all(p is not q for q in learned)]
    optimizer = torch.optim.Adam(
        [{"params": plain, "lr": config["lr"]}, {"params": learned, "lr": _NOISE_SPEED * config["lr"]}]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / _WARMUP, 0.55 + 0.45 * math.cos(math.pi * step / steps))
    )
    batches = torch.Generator().manual_seed(config["seed"])
    best: tuple[float, int, dict[str, Tensor]] = (math.inf, 0, {})
    for step in range(1, steps + 1):
        with torch.autocast(device.type, torch.bfloat16, enabled=config["bfloat16"]):
            nll = mean_nll(model, draw(train, config["batch"], context, batches))
        optimizer.zero_grad()
        elbo(nll).backward()
        nn.utils.clip_grad_norm_(plain, 1.0)
        optimizer.step()
        scheduler.step()
        if step % (steps // config["evaluations"]) == 0:
            now = evaluate(model, validation[::4])  # every fourth window, for it is done often
            if now < best[0]:
                best = now, step, copy.deepcopy(model.state_dict())
    last = _rates(model)
    model.load_state_dict(best[2])
    kept = _rates(model)
    named = {key: config[key] for key in ("percent", "method", "seed")}
    run = {
        "table": "runs", **named, "rate": None if learned else config["rate"],
        "characters": len(train), "steps": steps, "best_step": best[1],
        "val_nll": best[0], "test_nll": evaluate(model, test),
        "learned_rate": statistics.mean(kept.values()) if kept else None,
        "learned_rate_at_the_end": statistics.mean(last.values()) if last else None,
    }  # fmt: skip
    return [run] + [
        {"table": "rates", **named, "where": name, "rate": rate, "rate_at_the_end": last[name]}
        for name, rate in kept.items()
    ]


def _rates(model: nn.Module) -> dict[str, float]:
    return {name: rate.mean().item() for name, rate in vd.dropout_rates(model).items()}


def summarise(results: list[Result]) -> list[Row]:
    """Means over seeds, the best fixed rate of every size beside the learned one, and the answers to the claims."""
    runs = [row for result in results for row in result.rows if row["table"] == "runs"]
    means = _means(runs)
    sizes = [_size(percent, runs, means) for percent in dict.fromkeys(row["percent"] for row in means)]
    return means + sizes + _answers(sizes)


def _means(runs: list[Row]) -> list[Row]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in runs:
        groups.setdefault((row["percent"], row["method"], row["rate"]), []).append(row)
    rows = []
    for (percent, method, rate), group in sorted(groups.items(), key=lambda item: item[0][0]):

        def mean(column: str, group: list[Row] = group) -> float | None:
            return None if group[0][column] is None else statistics.mean(row[column] for row in group)

        rows.append({
            "table": "means", "percent": percent, "method": method, "rate": rate, "seeds": len(group),
            "val_nll": mean("val_nll"), "test_nll": mean("test_nll"),
            "test_nll_sd": statistics.stdev(r["test_nll"] for r in group) if len(group) > 1 else None,
            "best_step": mean("best_step"), "learned_rate": mean("learned_rate"),
            "learned_rate_at_the_end": mean("learned_rate_at_the_end"),
        })  # fmt: skip
    return rows


def _size(percent: float, runs: list[Row], means: list[Row]) -> Row:
    """One size: the fixed rate that validation chooses, the learned one, and how far seeds lie apart."""
    here = [row for row in means if row["percent"] == percent]
    fixed = [row for row in runs if row["percent"] == percent and row["method"] == "fixed"]
    seeds = {rate: {row["seed"] for row in fixed if row["rate"] == rate} for rate in {row["rate"] for row in fixed}}
    every = set.union(*seeds.values())  # at scale cpu the first seed tries all rates, the others 0 and its best

    def chosen_by(rate: float) -> float:
        return sum(row["val_nll"] for row in fixed if row["rate"] == rate)

    rate = min((rate for rate in sorted(seeds) if seeds[rate] == every), key=chosen_by)
    (best,) = (row for row in here if row["rate"] == rate)
    (zero,) = (row for row in here if row["rate"] == 0)
    learned, sites = (next((r for r in here if r["method"] == m), {}) for m in (WEIGHTS, SITES))
    deviations = [row["test_nll_sd"] for row in here if row["test_nll_sd"] is not None]
    deviations = deviations or [row["test_nll_sd"] for row in means if row["test_nll_sd"] is not None]
    return {
        "table": "sizes", "percent": percent, "best_fixed_rate": best["rate"],
        "learned_rate": learned.get("learned_rate"), "learned_rate_sites": sites.get("learned_rate"),
        "test_nll_rate_0": zero["test_nll"], "test_nll_best_fixed": best["test_nll"],
        "test_nll_learned": learned.get("test_nll"), "test_nll_learned_sites": sites.get("test_nll"),
        "spread": math.sqrt(statistics.mean(d**2 for d in deviations)) if deviations else None,  # of seeds, pooled
    }  # fmt: skip


def _answers(sizes: list[Row]) -> list[Row]:
    """A number for every claim; a difference of nll is in spreads between seeds."""
    best = [row["best_fixed_rate"] for row in sizes]
    rates = [(row["best_fixed_rate"], row["learned_rate"]) for row in sizes if row["learned_rate"] is not None]

    def spreads(row: Row, ours: str) -> float | None:
        known = row[ours] is not None and row["spread"]
        return (row[ours] - row["test_nll_best_fixed"]) / row["spread"] if known else None

    learned = [spreads(row, "test_nll_learned") for row in sizes]
    answers = {
        "fall of the best fixed rate from the smallest to the largest size": best[0] - best[-1],
        "sizes at which the best fixed rate is above that of the next smaller size": sum(
            after > before for before, after in itertools.pairwise(best)
        ),
        "all data: test nll of rate 0 above that of the best fixed rate, in spreads": spreads(
            sizes[-1], "test_nll_rate_0"
        ),
        "correlation of the learned rate with the best fixed one over sizes": _correlation(rates),
        "largest excess of learned over best fixed test nll, in spreads": max(
            (excess for excess in learned if excess is not None), default=None
        ),
        "sizes at which learned is no worse than best fixed plus one spread": sum(
            excess is not None and excess <= 1 for excess in learned
        ),
    }
    return [{"table": "answers", "question": question, "value": value} for question, value in answers.items()]


def _correlation(pairs: list[tuple[float, float]]) -> float:
    """Pearson's; 0 where one side does not vary, and so says nothing about the other."""
    x, y = zip(*pairs, strict=True) if pairs else ((), ())
    return statistics.correlation(x, y) if len(set(x)) > 1 and len(set(y)) > 1 else 0.0


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Test nll against size, and the best fixed and the learned rates beside what the article says of large models."""
    from matplotlib.figure import Figure

    rows = summarise(results)
    sizes = [row for row in rows if row["table"] == "sizes"]
    percents = [row["percent"] for row in sizes]
    sites = SITES + " (first seed)" * any(
        row["method"] == SITES and row["seeds"] == 1 for row in rows if "seeds" in row
    )
    drawn = Figure(figsize=(12, 3.4), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    for column, style, label in (
        ("test_nll_rate_0", "C7o-", "rate 0"),
        ("test_nll_best_fixed", "C1s-", "best fixed rate"),
        ("test_nll_learned", "C0D-", WEIGHTS),
        ("test_nll_learned_sites", "C2^--", sites),
    ):
        values = [math.nan if row[column] is None else row[column] for row in sizes]
        left.plot(percents, values, style, label=label, markersize=4)
        above = [value - row["test_nll_rate_0"] for value, row in zip(values, sizes, strict=True)]
        middle.errorbar(percents, above, [row["spread"] or 0 for row in sizes], fmt=style, markersize=4, capsize=2)
    for column, style, label in (
        ("best_fixed_rate", "C1s-", "best fixed"),
        ("learned_rate", "C0D-", WEIGHTS),
        ("learned_rate_sites", "C2^--", sites),
    ):
        values = [math.nan if row[column] is None else row[column] for row in sizes]
        right.plot(percents, values, style, label=label, markersize=4)
    right.axhspan(0, 0.05, color="C3", alpha=0.15, label="large models (article)")
    middle.set(title="test nll above that of rate 0", xlabel="training data, %", xscale="log")
    left.set(title="test nll, nats a character", xlabel="training data, %", xscale="log")
    right.set(title="rate", xlabel="training data, %", xscale="log")
    for axes in (left, middle, right):
        axes.set_xticks(percents, [f"{percent:g}" for percent in percents])
    left.legend(fontsize="small")
    right.legend(fontsize="small")
    return drawn


EXPERIMENT = Experiment(
    name="data-size",
    summary="A character transformer on 1 % to 100 % of a text: the best fixed dropout rate and the learned one.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("runs", "rates"),
)
