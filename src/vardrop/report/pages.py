"""The pages: what is on them, put into the templates beside this file, and written whole or not at all."""

from __future__ import annotations

import contextlib
import math
import os
import urllib.parse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import plotly.io
from plotly.offline import get_plotlyjs

from vardrop.methods import METHODS
from vardrop.report import examples, figures
from vardrop.report.reading import KINDS, Run, read

# (regression, kind) -> heading, name of the score, caption
_GROUPS = {
    (False, 0): (
        "Confident and wrong",
        "nll",
        "The wrongly classified test examples with the highest negative log-likelihood, in nats: the network was "
        "surest of something else.",
    ),
    (False, 1): (
        "Most uncertain",
        "entropy",
        "The test examples with the highest entropy of the predicted classes, in nats, among at most 2000 drawn at "
        "random: the network is least sure what they are.",
    ),
    (True, 0): (
        "Furthest off",
        "nll",
        "The test examples with the highest negative log-likelihood, in nats: their predictions are furthest from the "
        "truth.",
    ),
    (True, 1): (
        "Most uncertain",
        "spread",
        "The test examples, among at most 2000 drawn at random, whose prediction varies most when the noise is on: its "
        "standard deviation, in the units of the target.",
    ),
}


def write(run: Path) -> Path:
    """Make ``report.html`` of one run from the files in its directory.

    The page is self-contained: it opens from a disk, without a network. A run that has no summary, no rates or no
    examples (yet) gives a page that says so.

    Args:
        run: the directory that ``vardrop train --out`` wrote.

    Returns:
        Where the page is, ``run/report.html``.

    Raises:
        FileNotFoundError: if this is not the directory of a run.
        ValueError: if a file in it is broken; the message names file and line.

    Example:
        >>> import json, pathlib, tempfile
        >>> run = pathlib.Path(tempfile.mkdtemp())
        >>> config = {"data": "digits", "model": "mlp:3x400", "method": "vd-a2"}
        >>> _ = (run / "config.json").write_text(json.dumps(config))
        >>> write(run).name
        'report.html'
    """
    found = read(run)
    page = _render(
        "run.html.j2",
        run=found,
        method=_method(found),
        curves=_embed(figures.curves(found), "curves"),
        kl_weight=_kl_weight(found),
        rates=[
            (weight, _embed(figures.rates(found, weight, figures.top_rate(found)), f"rates-{i}"))
            for i, weight in enumerate(found.layers)
        ],
        examples=_example_groups(found),
    )
    return _save(page, Path(run) / "report.html")


def write_comparison(runs: Sequence[Path], out: Path) -> Path:
    """Make one page with several runs beside each other, linked to the page of each.

    Args:
        runs: directories of runs, in the order in which the page has them.
        out: the HTML file to write; links are relative to where it is.

    Returns:
        ``out``.

    Raises:
        FileNotFoundError: if one of them is not the directory of a run.
        ValueError: if there is none, or a file of one is broken.
    """
    if not runs:
        raise ValueError("vardrop.report: a comparison needs at least one run, got none; give the folders of some runs")
    found = [read(run) for run in runs]
    labels = _labels(found)
    out = Path(out)
    page = _render(
        "comparison.html.j2",
        rows=[(label, _link(run, out), run, _method(run)) for label, run in zip(labels, found, strict=True)],
        data=sorted({run.data for run in found}),
        models=sorted({run.config["model"] for run in found}),
        curves=_embed(figures.validation_curves(found, labels), "curves"),
        rates=_embed(figures.rates_by_layer(found, labels), "rates"),
    )
    return _save(page, out)


def _labels(runs: Sequence[Run]) -> list[str]:
    """The method, and the folder where that alone would name two runs."""
    count = Counter(run.config["method"] for run in runs)
    return [
        run.config["method"] if count[run.config["method"]] == 1 else f"{run.config['method']} ({run.path.name})"
        for run in runs
    ]


def _method(run: Run) -> str:
    """What the method is, in a few words, where this version knows it."""
    name = run.config["method"]
    return METHODS[name].summary if name in METHODS else ""


def _link(run: Run, out: Path) -> str | None:
    page = run.path / "report.html"
    return urllib.parse.quote(Path(os.path.relpath(page, out.resolve().parent)).as_posix()) if page.is_file() else None


def _kl_weight(run: Run) -> str:
    """A sentence on how much the KL weighs in the loss."""
    scales = [line["kl_scale"] for line in run.metrics if line.get("kl_scale") is not None]
    if not scales:
        return ""
    if math.isclose(scales[0], scales[-1]):
        return f"In the loss it is divided by the number of training examples and weighs {scales[-1]:.3g}."
    return (
        "In the loss it is divided by the number of training examples; "
        f"its weight goes from {scales[0]:.3g} to {scales[-1]:.3g}."
    )


def _example_groups(run: Run) -> list[dict[str, Any]]:
    if run.examples is None:
        return []
    count = run.examples.inputs.shape[1] if run.examples.inputs.ndim == 2 else 0
    groups = []
    for kind in KINDS:
        title, score, caption = _GROUPS[run.regression, kind]
        shown = examples.of_kind(run.examples, kind)
        groups.append({"title": title, "score": score, "caption": caption, "shown": shown, "features": count})
    return groups


def _embed(figure: Any, div_id: str) -> str | None:
    if figure is None:
        return None
    config = {"displayModeBar": False, "responsive": True}
    height = f"{figure.layout.height}px"
    return plotly.io.to_html(
        figure, config=config, include_plotlyjs=False, full_html=False, div_id=div_id, default_height=height
    )


def number(value: float | None, digits: int = 4) -> str:
    """A number to read: significant digits, thousands apart, no exponent in the middle range."""
    if value is None:
        return "–"
    if not math.isfinite(value):
        return "not finite"
    if isinstance(value, int) or 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}")
    return f"{value:.{digits}g}"


def percent(value: float | None) -> str:
    """A fraction as a percentage."""
    return "–" if value is None else f"{100 * value:.2f}\N{NARROW NO-BREAK SPACE}%"


def duration(seconds: float | None) -> str:
    """Seconds as a person would say them."""
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def _render(template: str, **content: Any) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(number=number, percent=percent, duration=duration)
    max_features = examples.MAX_FEATURES
    return environment.get_template(template).render(
        plotly_js=get_plotlyjs(), font=figures.FONT, max_features=max_features, **content
    )


def _save(page: str, path: Path) -> Path:
    """Write beside, then move: a full disk leaves the page that was there."""
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(page, encoding="utf-8")
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise OSError(
            f"vardrop.report: needs room and permission to write {path}, got {error.strerror or error}; "
            "a page that was there before is still there"
        ) from error
    return path
