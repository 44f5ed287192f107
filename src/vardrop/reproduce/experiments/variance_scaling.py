"""How the gradient's variance falls with the minibatch size M, and what of it does not: equation 5, measured.

A network of three hidden layers is trained for a few epochs with variational dropout B, a rate for every weight. Then
pairs of gradients of the data term at several M give Var[g], minibatches of one give Var[g_i], and the covariance of
two examples' gradients follows. With noise of its own for every example it is zero, and the variance falls as 1/M; with
one weight sample for the whole minibatch it is not, and soon it is all there is (section 2.2). Drawn without
replacement (appendix F) the data's share of the variance is smaller by (N - M) / (N - 1).
"""

from __future__ import annotations

import math
import statistics
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.data import load
from vardrop.models import build
from vardrop.reproduce.experiment import Config, Experiment, Row
from vardrop.variance import variance_terms

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

ESTIMATORS = ("local", "per_example", "per_minibatch", "flipout", "none")


def cells(scale: str) -> list[Config]:
    """A cell for every estimator; all of them train the same network first."""
    size: Config = {
        "smoke": {"data": "digits", "model": "mlp:1x16", "epochs": 2, "sizes": [10, 100], "pairs": 6, "singles": 40},
        "cpu": {
            "data": "mnist", "model": "mlp:3x100", "epochs": 3, "sizes": [10, 100, 1000, 10_000], "pairs": 20,
            "singles": 1000,
        },
        "gpu": {
            "data": "mnist", "model": "mlp:3x1000", "epochs": 10, "sizes": [10, 100, 1000, 10_000], "pairs": 100,
            "singles": 3000,
        },
    }[scale]  # fmt: skip
    device = "cuda" if scale == "gpu" else "cpu"
    made = []
    for name in ESTIMATORS:
        sizes = size["sizes"]
        if name == "per_example" and scale == "cpu":  # 10,000 weight matrices for one gradient take minutes
            sizes = [m for m in sizes if m <= 1000]
        made.append({"estimator": name, **size, "sizes": sizes, "device": device, "seed": 0})
    return made


def run_cell(config: Config) -> list[Row]:
    """A row for every way of drawing, minibatch size and layer."""
    data = load(config["data"])
    device = config["device"]
    x, y = data.train_x.to(device), data.train_y.to(device)
    model = trained(config, x, y, data.outputs)
    weights = [name for name, parameter in model.named_parameters() if name.endswith(".weight") and parameter.ndim == 2]
    layers = {weights[0]: "bottom", weights[-1]: "top"}
    terms = variance_terms(
        model, mean_nll, (x, y), sizes=config["sizes"], estimators=[config["estimator"]], replacement=(True, False),
        pairs=config["pairs"], singles=config["singles"], parameters=list(layers),
        generator=torch.Generator(device).manual_seed(config["seed"]),
    )  # fmt: skip
    rows: list[Row] = []
    for term in terms.rows:
        rows.append({
            "table": "terms", "estimator": term.estimator,
            "drawn": "with replacement" if term.replacement else "without", "layer": layers[term.parameter],
            "M": term.size, "variance": term.variance, "variance_error": term.variance_error,
            "variance_part": term.variance_part, "covariance": term.covariance,
            "covariance_error": term.covariance_error,
            "covariance_share": term.covariance_part / term.variance,
        })  # fmt: skip
    return rows


def mean_nll(model: nn.Module, batch: tuple[Tensor, ...]) -> Tensor:
    """The data term of the objective for one data point, averaged over the minibatch."""
    return F.cross_entropy(model(batch[0]), batch[1])


def trained(config: Config, x: Tensor, y: Tensor, classes: int) -> nn.Module:
    """A network with variational dropout B after a few epochs of Adam on the evidence lower bound."""
    generator = torch.Generator().manual_seed(config["seed"])
    with torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(config["seed"])
        model = build(config["model"], tuple(x.shape[1:]), classes)
        vd.convert_(model, vd.VariationalDropout(type="B", sharing="weight"))
        model.to(x.device)
        elbo = vd.ELBO(model, num_data=len(x))
        optimizer = torch.optim.Adam(model.parameters())
        for _ in range(config["epochs"]):
            for rows in torch.randperm(len(x), generator=generator).to(x.device).split(128):
                loss = elbo(F.cross_entropy(model(x[rows]), y[rows]))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return model


def summarise(results: list[Result]) -> list[Row]:
    """For every estimator and layer: the power of M that the variance falls with, and how far Cov is from zero."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in (row for result in results for row in result.rows):
        groups.setdefault((row["estimator"], row["drawn"], row["layer"]), []).append(row)
    made = []
    for (estimator, drawn, layer), rows in groups.items():
        logs = [(math.log(row["M"]), math.log(row["variance"])) for row in rows]
        x, y = ([pair[i] for pair in logs] for i in (0, 1))
        slope = statistics.linear_regression(x, y).slope
        scores = [row["covariance"] / row["covariance_error"] for row in rows]
        made.append({
            "table": "scaling", "estimator": estimator, "drawn": drawn, "layer": layer,
            "power_of_M": slope, "largest_M": max(row["M"] for row in rows),
            "covariance_share_at_largest_M": max(rows, key=lambda row: row["M"])["covariance_share"],
            "covariance_in_standard_errors": max(scores, key=abs),
            "size_of_that": max(map(abs, scores)),
        })  # fmt: skip
    return made


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """Variance against M, with and without replacement, for the bottom and the top layer; dotted: Var[g_i] / M."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows]
    drawn = Figure(figsize=(9, 6), layout="constrained")
    panels = drawn.subplots(2, 2, sharex=True, sharey="row")
    for line, layer in zip(panels, ("top", "bottom"), strict=True):
        for axes, way in zip(line, ("with replacement", "without"), strict=True):
            for color, name in enumerate(ESTIMATORS):
                chosen = [r for r in rows if (r["estimator"], r["drawn"], r["layer"]) == (name, way, layer)]
                sizes = [row["M"] for row in chosen]
                errors = [2 * row["variance_error"] for row in chosen]
                axes.errorbar(
                    sizes, [row["variance"] for row in chosen], errors, fmt="o-", color=f"C{color}", label=name
                )
                axes.plot(sizes, [row["variance_part"] for row in chosen], ":", color=f"C{color}")
            axes.set(xscale="log", yscale="log", title=f"{layer} layer, drawn {way}", xlabel="M")
        line[0].set_ylabel("variance of the gradient")
    panels[0][0].legend(fontsize="small")
    return drawn


EXPERIMENT = Experiment(
    name="variance-scaling",
    summary="The gradient's variance against the minibatch size: Var[g_i] / M, and a covariance that does not fall.",
    cells=cells,
    run_cell=run_cell,
    summarise=summarise,
    figure=figure,
)
