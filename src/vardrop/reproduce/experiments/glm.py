"""Dropout of features as a penalty (Wager, Wang, Liang 2013): the formula, its worth beside L2, what it spares.

Agreement: the penalty of second and of fourth order, and that of sampled masks, against the average over all masks.
Accuracy: dropout against L2, each with its strength from cross-validation inside the training half, on the sets that
come with scikit-learn and on made-up texts. The penalty of second order vanishes where the model is sure, so that data
which can be separated would have no solution: a ridge stands beside it, chosen with the rate. Features: on those texts,
how much of a word's weight survives, against how often the word occurs.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from typing import TYPE_CHECKING, Any

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator
from sklearn.datasets import load_breast_cancer, load_digits, load_wine
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import GridSearchCV, train_test_split
from sklearn.preprocessing import StandardScaler

from vardrop.linear_model import DropoutLogisticRegression, DropoutPoissonRegressor
from vardrop.linear_model.families import LOGISTIC, POISSON
from vardrop.linear_model.penalties import Design, brute_force, delta, masked, monte_carlo, quadratic
from vardrop.reproduce.experiment import Config, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

RATES = (0.1, 0.3, 0.5, 0.7, 0.9)
SETS = ("breast-cancer", "wine", "digits", "texts")
GRIDS = {
    "dropout": (DropoutLogisticRegression(tol=1e-4), {"p": [0.1, 0.3, 0.5, 0.7, 0.9], "ridge": [0.03, 0.3, 3.0]}),
    "L2": (LogisticRegression(max_iter=5000, tol=1e-5), {"C": [10.0**k for k in np.linspace(-3, 3, 15)]}),
}


def cells(scale: str) -> list[Config]:
    """The agreement of each family, and a cell for every data set and half of it."""
    made: list[Config] = [{"part": "agreement", "family": family, "seed": 0} for family in ("logistic", "Poisson")]
    splits = {"smoke": 1, "cpu": 4, "gpu": 30}[scale]
    sets = ("breast-cancer", "texts") if scale == "smoke" else SETS
    words = 40 if scale == "smoke" else 600
    return made + [
        {"part": "accuracy", "data": name, "words": words, "folds": 3 if scale == "smoke" else 5, "seed": seed}
        for seed in range(splits)
        for name in sets
    ]


def run_cell(config: Config) -> list[Row]:
    """Rows of one part."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a grid's corners that do not converge
        return agreement_rows(config) if config["part"] == "agreement" else accuracy_rows(config)


# --- agreement -----------------------------------------------------------------------------------------------------


def agreement_rows(config: Config) -> list[Row]:
    """Each penalty as a share of the true one, summed over the rows, at the coefficients of a fitted model."""
    x, y = load_breast_cancer(return_X_y=True)
    x = StandardScaler().fit_transform(x)[:200, :10]
    logistic = config["family"] == "logistic"
    if logistic:
        family, model = LOGISTIC, DropoutLogisticRegression(p=0.5).fit(x, y[:200])
        beta, intercept = torch.from_numpy(model.coef_.T.copy()), float(model.intercept_[0])
    else:
        counts = np.random.default_rng(config["seed"]).poisson(np.exp(0.3 * x[:, 0] - 0.2 * x[:, 1] + 0.5))
        family, model = POISSON, DropoutPoissonRegressor(p=0.5, penalty="exact").fit(x, counts)
        beta, intercept = torch.from_numpy(model.coef_[:, None].copy()), float(model.intercept_)
    rows = torch.from_numpy(x)
    design, eta = Design(rows), rows @ beta + intercept
    made: list[Row] = []
    for p in RATES:
        truth = brute_force(family, rows, beta, p, intercept).sum()
        masks = masked(design, p, 100, torch.Generator().manual_seed(config["seed"]))
        found = {
            "second order": quadratic(family, design, beta, eta, p),
            "fourth order": delta(family, design, beta, eta, p),
            "100 masks": monte_carlo(family, masks, beta, eta, torch.tensor([intercept], dtype=torch.float64)),
        }
        for name, each in found.items():
            made.append({
                "table": "agreement", "family": config["family"], "p": p, "penalty": name,
                "share_of_truth": (each.sum() / truth).item(),
            })  # fmt: skip
    return made


# --- accuracy ------------------------------------------------------------------------------------------------------


def accuracy_rows(config: Config) -> list[Row]:
    """Test error and nll of dropout and of L2 on one half, each tuned on the other; weights of words for the texts."""
    x, y, usefulness = problem(config)
    train_x, test_x, train_y, test_y = train_test_split(x, y, test_size=0.5, random_state=config["seed"], stratify=y)
    if config["data"] != "texts":
        scaler = StandardScaler().fit(train_x)
        train_x, test_x = scaler.transform(train_x), scaler.transform(test_x)
    made: list[Row] = []
    for name, (model, grid) in GRIDS.items():
        found = GridSearchCV(model, grid, cv=config["folds"], scoring="neg_log_loss").fit(train_x, train_y)
        probabilities = found.predict_proba(test_x)
        made.append({
            "table": "accuracy", "data": config["data"], "method": name, "seed": config["seed"],
            "test_error": error(found, test_x, test_y),
            "test_nll": log_loss(test_y, probabilities, labels=found.classes_),
            **{f"chosen_{key}": float(value) for key, value in found.best_params_.items()},
        })  # fmt: skip
        if usefulness is not None:
            made += feature_rows(found.best_estimator_, usefulness, train_x, name, config["seed"])
    return made


def error(model: BaseEstimator, x: Any, y: np.ndarray) -> float:
    """The share of wrong classes."""
    return float((model.predict(x) != y).mean())


def problem(config: Config) -> tuple[Any, np.ndarray, np.ndarray | None]:
    """Rows, classes, and for the made-up texts the true log-odds of every word."""
    loaders = {"breast-cancer": load_breast_cancer, "wine": load_wine, "digits": load_digits}
    if config["data"] in loaders:
        x, y = loaders[config["data"]](return_X_y=True)
        return x, y, None
    return texts(config["words"], config["seed"])


def texts(words: int, seed: int) -> tuple[sp.csr_matrix, np.ndarray, np.ndarray]:
    """Documents of two kinds over words of Zipf's frequencies, a fifth of which lean to one kind or the other."""
    generator = np.random.default_rng(seed)
    frequency = 1 / np.arange(1, words + 1)
    lean = np.where(generator.random(words) < 0.2, generator.choice([-1.0, 1.0], words), 0.0)
    kinds = generator.integers(0, 2, 2 * words)
    rows = []
    for kind in (1, -1):
        share = frequency * np.exp(0.7 * kind * lean)
        rows.append(share / share.sum())
    counts = np.stack([generator.multinomial(60, rows[0 if kind else 1]) for kind in kinds])
    return sp.csr_matrix((counts > 0).astype(float)), kinds, 1.4 * lean


def feature_rows(model: Any, lean: np.ndarray, x: sp.csr_matrix, method: str, seed: int) -> list[Row]:
    """The weight of the words that lean, as a share of their true log-odds, by how often they occur."""
    often = np.asarray(x.mean(0)).ravel()
    weight = model.coef_[0] * np.sign(lean)
    made = []
    edges = [0, 0.01, 0.02, 0.04, 0.08, 0.16, 1]
    for low, high in itertools.pairwise(edges):
        chosen = (lean != 0) & (often > low) & (often <= high)
        idle = (lean == 0) & (often > low) & (often <= high)
        if chosen.sum() and idle.sum():
            made.append({
                "table": "features", "method": method, "seed": seed, "occurs_in_up_to": high,
                "words": int(chosen.sum()), "share_of_log_odds": float(weight[chosen].mean() / 1.4),
                "weight_of_idle_words": float(np.abs(model.coef_[0][idle]).mean() / 1.4),
            })  # fmt: skip
    return made


# --- summary -------------------------------------------------------------------------------------------------------


def summarise(results: list[Result]) -> list[Row]:
    """Means over the halves, and the paired difference of dropout and L2."""
    rows = [row for result in results for row in result.rows if row["table"] == "accuracy"]
    made: list[Row] = []
    for data in dict.fromkeys(row["data"] for row in rows):
        both = {
            name: {row["seed"]: row for row in rows if (row["data"], row["method"]) == (data, name)} for name in GRIDS
        }
        summary: Row = {"table": "dropout against L2", "data": data, "splits": len(both["L2"])}
        for column in ("test_error", "test_nll"):
            for name, by_seed in both.items():
                summary[f"{column}_{name}"] = statistics.fmean(row[column] for row in by_seed.values())
            gains = [both["L2"][seed][column] - both["dropout"][seed][column] for seed in both["L2"]]
            summary[f"gain_in_{column}"] = statistics.fmean(gains)
            if len(gains) > 1:
                summary[f"gain_in_{column}_se"] = statistics.stdev(gains) / len(gains) ** 0.5
        made.append(summary)
    return made + _features(results)


def _features(results: list[Result]) -> list[Row]:
    rows = [row for result in results for row in result.rows if row["table"] == "features"]
    made = []
    for often in sorted({row["occurs_in_up_to"] for row in rows}):
        summary: Row = {"table": "weights of words", "occurs_in_up_to": often}
        for name in GRIDS:
            chosen = [row for row in rows if (row["occurs_in_up_to"], row["method"]) == (often, name)]
            if chosen:
                summary[f"telling_{name}"] = statistics.fmean(row["share_of_log_odds"] for row in chosen)
                summary[f"idle_{name}"] = statistics.fmean(row["weight_of_idle_words"] for row in chosen)
        made.append(summary)
    if made:
        made[0]["rarest"] = True
        if "telling_dropout" in made[0] and "telling_L2" in made[0]:
            made[0]["dropout_over_L2"] = made[0]["telling_dropout"] / made[0]["telling_L2"]
    return made


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Agreement against p; gain in nll over L2; weights of telling and idle words against their frequency."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows]
    drawn = Figure(figsize=(11, 3.4), layout="constrained")
    agreement, gain, words = drawn.subplots(1, 3)
    for color, name in enumerate(("second order", "fourth order", "100 masks")):
        for family, style in (("logistic", "-"), ("Poisson", ":")):
            chosen = [r for r in rows if (r.get("penalty"), r.get("family")) == (name, family)]
            agreement.plot(
                [row["p"] for row in chosen], [row["share_of_truth"] for row in chosen], style, color=f"C{color}",
                label=f"{name}, {family}",
            )  # fmt: skip
    agreement.axhline(1, color="C7", linewidth=0.7)
    agreement.set(xlabel="p", ylabel="penalty as a share of the true one", ylim=(0, 2))
    agreement.legend(fontsize="x-small")
    sets = [row for row in summarise(results) if row["table"] == "dropout against L2"]
    errors = [2 * row.get("gain_in_test_nll_se", 0.0) for row in sets]
    gain.errorbar(range(len(sets)), [row["gain_in_test_nll"] for row in sets], errors, fmt="o")
    gain.axhline(0, color="C7", linewidth=0.7)
    gain.set_xticks(range(len(sets)), [row["data"] for row in sets], rotation=20)
    gain.set(ylabel="test nll: L2 minus dropout, ± 2 se")
    weights = [row for row in summarise(results) if row["table"] == "weights of words"]
    for color, name in enumerate(GRIDS):
        for kind, style in (("telling", "o-"), ("idle", "o:")):
            points = [(r["occurs_in_up_to"], r[f"{kind}_{name}"]) for r in weights if f"{kind}_{name}" in r]
            if points:
                words.plot(*zip(*points, strict=True), style, color=f"C{color}", label=f"{kind} words, {name}")
    words.set(xlabel="share of texts that a word occurs in, up to", ylabel="weight ÷ true log-odds", xscale="log")
    words.legend(fontsize="x-small")
    return drawn


EXPERIMENT = Experiment(
    name="glm",
    summary="Dropout as an adaptive L2 penalty: its formula against all masks, its worth, and the features it spares.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
    figure_only=("accuracy", "features"),
)
