"""What a Prediction tells: the same whether passes are kept or not, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vardrop.prediction import measures
from vardrop.prediction.moments import Collector, Moments, Summary, joined
from vardrop.prediction.prediction import Prediction

UNCERTAINTIES = ("predictive_entropy", "expected_entropy", "mutual_information", "variation_ratio")


def outputs(passes: int, *shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(passes, *shape, generator=generator, dtype=torch.float64) + 1).to(dtype)


def predicted(
    samples: Tensor, kind: str | None, chunks: list[int] | None = None, keep: bool = True, class_dim: int = 1
) -> Prediction:
    collector = Collector(kind, class_dim, keep)
    for chunk in samples.split(chunks or [len(samples)]):
        collector.add(chunk)
    return Prediction(collector.summary(), len(samples), kind, class_dim)


# ------------------------------------------------------------------------------------------------------- moments


@given(st.lists(st.integers(1, 7), min_size=1, max_size=6), st.integers(0, 3), st.floats(-1e6, 1e6), st.integers(0, 99))
@settings(max_examples=50, deadline=None)
def test_moments_of_chunks_are_the_moments_of_all(chunks: list[int], width: int, shift: float, seed: int) -> None:
    samples = outputs(sum(chunks), 2, *[3] * min(width, 1), seed=seed, dtype=torch.float64) + shift
    moments = Moments()
    for chunk in samples.split(chunks):
        moments.add(chunk)
    assert moments.count == len(samples)
    torch.testing.assert_close(moments.mean, samples.mean(0))
    truth = samples.sub(shift).var(0, correction=0)
    torch.testing.assert_close(moments.variance, truth, rtol=1e-5, atol=1e-9)


def test_moments_of_half_precision_are_wide() -> None:
    samples = outputs(500, 4, dtype=torch.float16) + 100
    found = predicted(samples, None, [100] * 5)
    assert found.mean.dtype == torch.float32
    torch.testing.assert_close(found.variance.double(), samples.double().var(0, correction=0), rtol=1e-3, atol=0)
    assert found.samples is not None
    assert found.samples.dtype == torch.float16


@pytest.mark.parametrize("kind", ["logits", "probabilities", "log_probabilities", "values", None])
@pytest.mark.parametrize(("shape", "class_dim"), [((5, 3), 1), ((2, 3, 4, 4), 1), ((2, 6, 3), -1)])
def test_not_keeping_the_passes_changes_no_figure(kind: str | None, shape: tuple[int, ...], class_dim: int) -> None:
    raw = outputs(11, *shape)
    dim = class_dim + 1 if class_dim > 0 else class_dim
    if kind == "probabilities":
        raw = raw.softmax(dim)
    elif kind == "log_probabilities":
        raw = raw.log_softmax(dim)
    kept = predicted(raw, kind, [1, 4, 6], class_dim=class_dim)
    streamed = predicted(raw, kind, [1, 4, 6], keep=False, class_dim=class_dim)
    assert streamed.samples is None
    names = ["mean", "variance", "std"]
    if kind not in (None, "values"):
        names += ["probabilities", "predicted", *UNCERTAINTIES]
    for name in names:
        assert torch.equal(getattr(kept, name), getattr(streamed, name)), name
    assert kept.samples is not None
    torch.testing.assert_close(kept.mean, kept.samples.mean(0))
    torch.testing.assert_close(kept.variance, kept.samples.var(0, correction=0), rtol=1e-4, atol=1e-7)
    for name in names[5:]:
        truth = getattr(measures, name)(kept.samples.double(), class_dim).float()
        torch.testing.assert_close(getattr(kept, name), truth, rtol=1e-4, atol=2e-6)


def test_the_three_forms_of_classes_are_one() -> None:
    raw = outputs(7, 4, 3)
    forms = {"logits": raw, "probabilities": raw.softmax(2), "log_probabilities": raw.log_softmax(2)}
    found = [predicted(samples, kind) for kind, samples in forms.items()]
    for name in ("probabilities", "variance", *UNCERTAINTIES):
        for other in found[1:]:
            torch.testing.assert_close(getattr(found[0], name), getattr(other, name), rtol=1e-4, atol=1e-6)
    assert all(torch.equal(found[0].predicted, other.predicted) for other in found)


def test_masked_logits_are_probabilities_of_0() -> None:
    raw = outputs(5, 3, 4)
    raw[..., 2] = -torch.inf
    found = predicted(raw, "logits")
    without = predicted(raw[..., [0, 1, 3]], "logits")
    assert (found.probabilities[:, 2] == 0).all()
    for name in UNCERTAINTIES:
        torch.testing.assert_close(getattr(found, name), getattr(without, name))


def test_one_pass_has_a_variance_of_0() -> None:
    assert (predicted(outputs(1, 3), None).variance == 0).all()


def test_batches_are_joined_along_the_examples() -> None:
    raw = outputs(6, 5, 3)
    parts = []
    for batch in raw.split([2, 3], 1):
        collector = Collector("logits", 1, keep=True)
        collector.add(batch)
        parts.append(collector.summary())
    whole = predicted(raw, "logits").summary
    for name, part in vars(joined(parts)).items():
        torch.testing.assert_close(part, getattr(whole, name))


# ------------------------------------------------------------------------------------------------------ quantiles


def test_quantiles_are_torchs() -> None:
    raw = outputs(13, 4, 2)
    found = predicted(raw, None)
    torch.testing.assert_close(found.quantile(0.3), raw.quantile(0.3, 0))
    q = [0.0, 0.05, 0.5, 1.0]
    torch.testing.assert_close(found.quantile(q), raw.quantile(torch.tensor(q), 0))
    assert found.quantile(0.5).shape == (4, 2)
    assert predicted(outputs(13, 4, dtype=torch.bfloat16), None).quantile(0.5).dtype == torch.float32


def test_quantiles_refuse() -> None:
    with pytest.raises(RuntimeError, match="quantile: needs every pass, and they were not kept; use keep=True"):
        predicted(outputs(5, 4), None, keep=False).quantile(0.5)
    with pytest.raises(ValueError, match=r"q must be in \[0, 1\], got 1\.5"):
        predicted(outputs(5, 4), None).quantile(1.5)


# ---------------------------------------------------------------------------------------------- values and classes


def test_regression() -> None:
    raw, y = outputs(9, 4, 1), torch.randn(4)
    found = predicted(raw, "values")
    torch.testing.assert_close(found.total_variance(4.0), found.variance + 0.25)
    torch.testing.assert_close(found.log_likelihood(y, 4.0), measures.log_likelihood(raw, y, 4.0))
    with pytest.raises(ValueError, match="precision must be above 0, got -1; it is one over the noise's variance"):
        found.total_variance(-1)
    with pytest.raises(RuntimeError, match="log_likelihood: needs every pass"):
        predicted(raw, "values", keep=False).log_likelihood(y, 4.0)


def test_what_is_not_there_is_refused_with_what_to_say() -> None:
    values, classes = predicted(outputs(5, 4, 3), None), predicted(outputs(5, 4, 3), "logits")
    for name in ("probabilities", "predicted", *UNCERTAINTIES):
        with pytest.raises(RuntimeError, match=r"needs probabilities of classes, got outputs=None; say what the model"):
            getattr(values, name)
    for call in (lambda: classes.total_variance(1.0), lambda: classes.log_likelihood(torch.zeros(4), 1.0)):
        with pytest.raises(RuntimeError, match=r"is for predicted values, got classes \(outputs='logits'\)"):
            call()


@pytest.mark.parametrize("kind", ["probabilities", "log_probabilities"])
def test_what_is_no_probability_is_refused(kind: str) -> None:
    with pytest.raises(ValueError, match=r"must be probabilities that sum to 1 over the classes, got sums .* off"):
        predicted(outputs(5, 4, 3), kind)


def test_classes_need_an_axis_with_two_of_them() -> None:
    with pytest.raises(ValueError, match=r"two classes or more on dimension 1, got shape \(4, 1\); for one logit"):
        predicted(outputs(5, 4, 1), "logits")
    for shape, dim in (((4,), 1), ((4, 3), 0), ((4, 3), 2), ((4, 3), -2)):
        with pytest.raises(ValueError, match=rf"floating point with classes on dimension {dim} behind the examples"):
            predicted(outputs(5, *shape), "logits", class_dim=dim)


# -------------------------------------------------------------------------------------------------------- showing


@pytest.mark.parametrize(
    ("kind", "shape", "columns"),
    [
        ("logits", (4, 2), ["predicted", "probability", *UNCERTAINTIES, "p0", "p1"]),
        (None, (4,), ["mean", "std"]),
        (None, (4, 1), ["mean", "std"]),
        (None, (4, 2), ["mean[0]", "mean[1]", "std[0]", "std[1]"]),
    ],
)
def test_a_table_has_a_row_for_every_example(kind: str | None, shape: tuple[int, ...], columns: list[str]) -> None:
    pytest.importorskip("pandas")
    found = predicted(outputs(5, *shape), kind)
    table = found.to_pandas()
    assert list(table.columns) == columns
    assert len(table) == 4
    assert table.index.name == "example"
    if kind is None and len(shape) == 1:
        assert table["mean"].tolist() == found.mean.tolist()


def test_pictures() -> None:
    pytest.importorskip("plotly")
    classes = predicted(outputs(5, 4, 3), "logits")
    bars = classes.plot().data
    assert len(bars) == 2
    total = torch.tensor(bars[0].y) + torch.tensor(bars[1].y)
    torch.testing.assert_close(total.float(), classes.predictive_entropy.sort().values, rtol=1e-4, atol=1e-5)
    assert len(predicted(outputs(5, 2, 3, 4, 4), "logits").plot().data[0].y) == 2
    values = predicted(outputs(5, 4), None)
    (points,) = values.plot().data
    torch.testing.assert_close(torch.tensor(points.y).float(), values.mean.sort().values)


@pytest.mark.parametrize(("method", "library"), [("to_pandas", "pandas"), ("plot", "plotly")])
def test_a_missing_library_is_named(method: str, library: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, library, None)
    monkeypatch.setitem(sys.modules, "plotly.graph_objects", None)
    with pytest.raises(ModuleNotFoundError, match=rf"{method}: needs {library}, got no such module; pip install"):
        getattr(predicted(outputs(5, 4), None), method)()


def test_repr_tells() -> None:
    found = predicted(outputs(5, 4, 3), "logits")
    told = Prediction(
        found.summary,
        5,
        "logits",
        engine="loop",
        reason="vmap refused",
        sources=("a", "b", "c", "d", "e"),
        outputs={"states": found},
    )
    text = repr(told)
    for words in (
        "4 examples",
        "output [4, 3] from 5 passes (kept)",
        "mutual_information",
        "by loop",
        "because vmap refused",
    ):
        assert words in text
    assert "noise: a, b, c, d and 1 more" in text
    assert "also in .outputs: states" in text
    assert "not kept" in repr(predicted(outputs(5, 4), None, keep=False))
    assert "0 examples" in repr(predicted(outputs(5, 0, 3), "logits"))


def test_it_cannot_be_changed() -> None:
    found = predicted(outputs(5, 4), None)
    with pytest.raises(AttributeError):
        found.passes = 3  # type: ignore[misc]
    assert len(found) == 4
    assert isinstance(found.summary, Summary)
