r"""The divergence from the log-uniform prior: our exact form and the two fits of the literature against the truth.

The truth is computed twice, by quadrature and (on a few points) by a hypergeometric function of mpmath:

.. math:: KL = 2 \int_0^x D(t)\,dt = u \, {}_2F_2(1, 1; \tfrac32, 2; -u), \qquad \frac{dKL}{d \log \alpha} = -x D(x),
          \qquad u = x^2 = \frac{1}{2 \alpha}

Kingma et al. (2015) leave the constant of their cubic unnamed; here it makes the cubic right at alpha = 1.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

import vardrop as vd
from vardrop.reproduce.experiment import Config, Experiment, Row

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from vardrop.reproduce.claims import Claim
    from vardrop.reproduce.results import Result

FORMS = ("exact", "cubic", "sigmoid")
RANGES = {"alpha <= 1": (-10.0, 0.0), "|log alpha| <= 8": (-8.0, 8.0), "|log alpha| <= 10": (-10.0, 10.0)}
_PRINTED = 200  # steps of the grid that are kept in the JSON, for the figure


def cells(scale: str) -> list[Config]:
    """One cell for each precision; the grid is so fine at scale cpu that its maxima are those of the curve."""
    steps = 200 if scale == "smoke" else 4000
    device = "cuda" if scale == "gpu" else "cpu"
    return [{"dtype": dtype, "steps": steps, "device": device} for dtype in ("float64", "float32")]


def truth(log_alpha: list[float]) -> tuple[list[float], list[float]]:
    """Value and slope on an ascending grid, by quadrature from each point to the next."""
    from scipy.integrate import quad
    from scipy.special import dawsn

    values, slopes = [], []
    value, before = 0.0, 0.0
    for point in reversed(log_alpha):  # from alpha = infinity, where the divergence is zero, inwards
        x = float(torch.tensor(-point, dtype=torch.float64).exp().div(2).sqrt())
        value += 2 * quad(dawsn, before, x, epsabs=0, epsrel=1e-12)[0]
        before = x
        values.append(value)
        slopes.append(-x * float(dawsn(x)))
    return values[::-1], slopes[::-1]


def _by_series(log_alpha: float) -> float:
    import mpmath

    with mpmath.workdps(30):
        u = mpmath.exp(-mpmath.mpf(log_alpha)) / 2
        return float(u * mpmath.hyp2f2(1, 1, mpmath.mpf(3) / 2, 2, -u))


def run_cell(config: Config) -> list[Row]:
    """The curves, their largest errors, and how well the two ways to the truth agree."""
    dtype, steps = getattr(torch, config["dtype"]), config["steps"]
    grid = torch.linspace(-10, 10, steps + 1, dtype=torch.float64).to(dtype).double()  # points that dtype can hold
    value, slope = (torch.tensor(t, dtype=torch.float64) for t in truth(grid.tolist()))
    curves = {form: _curve(form, grid, dtype, config["device"]) for form in FORMS}

    rows: list[Row] = []
    for form, (ours, gradient) in curves.items():
        for name, (low, high) in RANGES.items():
            if form == "cubic" and high > 0:
                continue  # it is refused there
            inside = (grid >= low) & (grid <= high)
            off, gradient_off = (ours - value)[inside].abs(), (gradient - slope)[inside].abs()
            rows.append({
                "table": "errors", "dtype": config["dtype"], "form": form, "range": name,
                "value_error": off.max().item(),
                "value_relative_error": (off / value[inside].abs()).max().item(),
                "gradient_error": gradient_off.max().item(),
                "gradient_relative_error": (gradient_off / slope[inside].abs()).max().item(),
            })  # fmt: skip
    few = range(0, steps + 1, steps // 20)
    series = torch.tensor([_by_series(grid[i].item()) for i in few], dtype=torch.float64)
    rows.append({
        "table": "truth", "dtype": config["dtype"], "points": len(few),
        "quadrature_against_series": ((value[list(few)] - series) / series).abs().max().item(),
    })  # fmt: skip
    for i in range(0, steps + 1, steps // _PRINTED) if dtype == torch.float64 else ():
        row: Row = {
            "table": "curves",
            "log_alpha": round(grid[i].item(), 6),
            "value": value[i].item(),
            "gradient": slope[i].item(),
        }
        for form, (ours, gradient) in curves.items():
            there = i < len(ours) and not ours[i].isnan()
            row[form] = ours[i].item() if there else None
            row[f"{form}_gradient"] = gradient[i].item() if there else None
        rows.append(row)
    return rows


def _curve(form: str, grid: torch.Tensor, dtype: torch.dtype, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Value and gradient on the grid, computed in ``dtype``; nan where the form does not hold."""
    held = grid <= 0 if form == "cubic" else torch.ones_like(grid, dtype=torch.bool)
    points = grid[held].to(device, dtype).requires_grad_()
    values = vd.kl.log_uniform(points, form=form)
    (gradients,) = torch.autograd.grad(values.sum(), points)
    full = torch.full((2, len(grid)), torch.nan, dtype=torch.float64)
    full[0, held], full[1, held] = values.detach().cpu().double(), gradients.cpu().double()
    return full[0], full[1]


def figure(results: list[Result], claims: list[Claim]) -> Figure:
    """The divergence, and the errors of the three forms, in float64; the only one whose curves are kept."""
    from matplotlib.figure import Figure

    rows = [row for result in results for row in result.rows if row["table"] == "curves"]
    drawn = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = drawn.subplots(1, 3)
    styles: dict[str, Any] = {"exact": "C0-", "cubic": "C1--", "sigmoid": "C2:"}
    names = {"exact": "exact", "cubic": "cubic (2015)", "sigmoid": "sigmoid (2017)"}
    for form, style in styles.items():
        there = [row for row in rows if row[form] is not None]
        x = [row["log_alpha"] for row in there]
        left.plot(x, [row[form] for row in there], style, label=names[form])
        middle.plot(x, [abs(row[form] - row["value"]) for row in there], style)
        right.plot(x, [abs(row[f"{form}_gradient"] - row["gradient"]) for row in there], style)
    left.set(title="KL, nats", xlabel="log α")
    left.legend()
    for axes, title in ((middle, "|error of KL|"), (right, "|error of dKL / d log α|")):
        axes.set(title=title, xlabel="log α", yscale="log", ylim=(1e-12, 1))
    return drawn


EXPERIMENT = Experiment(
    name="kl",
    summary="The exact KL divergence from the log-uniform prior against Kingma's cubic and Molchanov's sigmoid fit.",
    cells=cells,
    run_cell=run_cell,
    figure=figure,
    figure_only=("curves",),
)
