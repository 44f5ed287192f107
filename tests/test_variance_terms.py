"""The two parts of a gradient's variance, against closed forms of a model with one weight."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import vardrop as vd

ALPHA, THETA, N = 0.5, 1.3, 12


class Line(nn.Module):
    """y = w x with one random weight: w = θ (1 + √α ε)."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1, bias=False).double()
        nn.init.constant_(self.layer.weight, THETA)
        vd.convert_(self.layer, vd.VariationalDropout(type="B", sharing="layer", rate=ALPHA / (1 + ALPHA)))

    def forward(self, x):
        return self.layer(x)


def data() -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(3)
    x = torch.randn(N, 1, generator=g, dtype=torch.float64)
    return x, 2 * x + 0.5 * torch.randn(N, 1, generator=g, dtype=torch.float64)


def loss(model, batch):
    x, y = batch
    return 0.5 * (model(x) - y).square().mean()


def truth(alpha: float = ALPHA) -> dict[str, float]:
    """g_i = a_i s² - b_i s with s ~ N(1, α), a = θ x², b = x y: its variance, and the covariance of two."""
    x, y = data()
    a, b = (THETA * x * x).squeeze(), (x * y).squeeze()
    s2, s3, s4 = 1 + alpha, 1 + 3 * alpha, 1 + 6 * alpha + 3 * alpha**2
    mean = a.mean() * s2 - b.mean()
    single = (a * a).mean() * s4 - 2 * (a * b).mean() * s3 + (b * b).mean() * s2 - mean**2
    shared = a.mean() ** 2 * s4 - 2 * a.mean() * b.mean() * s3 + b.mean() ** 2 * s2 - mean**2
    apart = -(a * s2 - b).var(correction=0) / (N - 1)
    return {"single": single.item(), "shared": shared.item(), "apart": apart.item()}


@pytest.fixture(scope="module")
def found() -> vd.VarianceTerms:
    generator = torch.Generator().manual_seed(0)
    return vd.variance_terms(
        Line(), loss, data(), sizes=[2, 6], estimators=["local", "per_example", "per_minibatch"],
        replacement=[True, False], pairs=700, singles=1400, parameters=["layer.weight"], generator=generator,
    )  # fmt: skip


def close(row, covariance: float, deviations: float = 4.0) -> bool:
    return abs(row.covariance - covariance) < deviations * row.covariance_error


def test_the_parts_are_those_of_equation_5(found):
    expected = truth()
    for row in found.rows:
        covariance = 0.0 if row.replacement else expected["apart"]
        if row.estimator == "per_minibatch":
            if not row.replacement:  # two different examples under one weight: below
                continue
            covariance = expected["shared"]
        assert close(row, covariance), row
        total = expected["single"] / row.size + (row.size - 1) / row.size * covariance
        assert abs(row.variance - total) < 4 * row.variance_error
        assert row.covariance_part == pytest.approx((row.size - 1) / row.size * row.covariance)


def test_without_replacement_one_weight_for_all_has_the_covariance_of_different_examples(found):
    x, y = data()
    a, b = (THETA * x * x).squeeze(), (x * y).squeeze()
    s2, s3, s4 = 1 + ALPHA, 1 + 3 * ALPHA, 1 + 6 * ALPHA + 3 * ALPHA**2

    def different(u, v):  # the mean of u_i v_j over i != j
        return (u.sum() * v.sum() - (u * v).sum()) / (N * (N - 1))

    mean = a.mean() * s2 - b.mean()
    shared = different(a, a) * s4 - (different(a, b) + different(b, a)) * s3 + different(b, b) * s2 - mean**2
    rows = [row for row in found.rows if row.estimator == "per_minibatch" and not row.replacement]
    assert len(rows) == 2
    assert all(close(row, shared.item()) for row in rows)


def test_the_check_would_see_more_noise(found):
    wrong = truth(1.5 * ALPHA)["shared"]
    rows = [row for row in found.rows if row.estimator == "per_minibatch" and row.replacement]
    assert not all(close(row, wrong) for row in rows)


def test_the_table_prints_and_plots(found):
    assert str(found).count("\n") == len(found.rows) == 12
    frame = found.to_pandas()
    assert len(frame) == 12
    assert (frame["variance"] - frame["variance_part"] - frame["covariance_part"]).abs().max() < 1e-12
    figure = found.plot(replacement=False)
    assert figure.axes[0].get_title() == "layer.weight"


def test_the_model_comes_back_as_it_was():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    vd.convert_(model, vd.VariationalDropout())
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(20, 3)
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):  # of BatchNorm, for one example
        vd.variance_terms(model, lambda net, batch: net(batch[0]).square().mean(), [x], sizes=[4])
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": []}, "data must be tensors with the same number of rows, at least one, got none"),
        ({"data": [torch.ones(2, 1), torch.ones(3, 1)]}, r"same number of rows, at least one, got \[2, 3\]"),
        ({"estimators": ["best"]}, "estimator must be one of local, .* got 'best'"),
        ({"sizes": [1]}, r"sizes must be minibatches of 2 or more, got \[1\]"),
        (
            {"sizes": [13], "replacement": [False]},
            "without replacement sizes must be at most the 12 examples .* got 13",
        ),
        ({"pairs": 1}, "a standard error needs two pairs or more, got pairs=1, singles=200"),
        ({"parameters": ["weight"]}, "parameters must be among layer.weight.* got weight"),
        ({"loss_fn": lambda model, batch: model(batch[0])}, "loss_fn must return a finite scalar, got shape"),
    ],
)
def test_bad_input_is_refused_with_words(changes, words):
    given = {"loss_fn": loss, "data": data(), "sizes": [4]} | changes
    with pytest.raises(ValueError, match=f"vardrop.variance_terms: .*{words}"):
        vd.variance_terms(Line(), given.pop("loss_fn"), given.pop("data"), **given)
