"""Dropout GLMs against brute force over all masks, closed forms, and scikit-learn's own checks."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from sklearn.datasets import load_digits, load_iris
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.utils.estimator_checks import parametrize_with_checks

from vardrop.linear_model import DropoutLinearRegression, DropoutLogisticRegression, DropoutPoissonRegressor
from vardrop.linear_model.families import LINEAR, LOGISTIC, POISSON
from vardrop.linear_model.penalties import (
    Design,
    brute_force,
    delta,
    every_mask,
    exact,
    masked,
    monte_carlo,
    multinomial,
    quadratic,
)

MODELS = (DropoutLinearRegression, DropoutPoissonRegressor, DropoutLogisticRegression)


@pytest.mark.filterwarnings("ignore")  # scikit-learn's checks make them on purpose
@parametrize_with_checks([model() for model in MODELS])
def test_scikit_learn_accepts(estimator, check):
    check(estimator)


def problem(rows: int = 6, features: int = 5, scale: float = 0.3) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(1)
    x = torch.randn(rows, features, generator=g, dtype=torch.float64)
    x[torch.rand(rows, features, generator=g) < 0.3] = 0
    return x, scale * torch.randn(features, 1, generator=g, dtype=torch.float64)


def sparse(x: torch.Tensor) -> Design:
    return Design(x.to_sparse_coo().coalesce())


# --- penalties -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("form", [Design, sparse])
def test_the_linear_penalty_is_exact_at_every_order(form, p):
    x, beta = problem()
    truth = brute_force(LINEAR, x, beta, p, intercept=0.4)
    for penalty in (quadratic, delta, exact):
        torch.testing.assert_close(penalty(LINEAR, form(x), beta, x @ beta + 0.4, p), truth)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("form", [Design, sparse])
def test_poisson_has_a_closed_form(form, p):
    x, beta = problem()
    truth = brute_force(POISSON, x, beta, p, intercept=0.4)
    torch.testing.assert_close(exact(POISSON, form(x), beta, x @ beta + 0.4, p), truth)


@pytest.mark.parametrize("family", [LOGISTIC, POISSON])
def test_the_orders_of_the_delta_method(family):
    """Halving β divides the error of the second order by eight or more, and that of the fourth by 32."""
    x, beta = problem(scale=0.4)
    errors = {}
    for scale in (1.0, 0.5, 0.25):
        b = scale * beta
        truth = brute_force(family, x, b, 0.5, intercept=0.3)
        for penalty in (quadratic, delta):
            found = penalty(family, Design(x), b, x @ b + 0.3, 0.5)
            errors[penalty, scale] = (found - truth).abs().max().item()
    assert errors[quadratic, 0.25] < errors[quadratic, 0.5] / 6
    assert errors[delta, 0.25] < errors[delta, 0.5] / 20
    assert errors[delta, 0.25] < errors[quadratic, 0.25] / 5


@pytest.mark.parametrize("form", [Design, sparse])
def test_monte_carlo_is_unbiased(form):
    x, beta = problem()
    truth = brute_force(LOGISTIC, x, beta, 0.5, intercept=0.3)
    eta = x @ beta + 0.3
    each = torch.stack([
        monte_carlo(LOGISTIC, [noisy], beta, eta, torch.tensor([0.3]))
        for noisy in masked(form(x), 0.5, 3000, torch.Generator().manual_seed(0))
    ])  # fmt: skip
    error = each.std(0) / len(each) ** 0.5 + 1e-12
    assert ((each.mean(0) - truth).abs() < 4.5 * error).all()
    assert not ((each.mean(0) - 1.6 * truth).abs() < 4.5 * error).all()


@pytest.mark.parametrize("form", [Design, sparse])
def test_the_multinomial_penalty_is_the_second_order_of_the_softmax(form):
    x, _ = problem()
    g = torch.Generator().manual_seed(2)
    beta = torch.randn(5, 3, generator=g, dtype=torch.float64)

    def truth(b: torch.Tensor, p: float) -> torch.Tensor:
        total = torch.zeros(len(x), dtype=torch.float64)
        for mask in every_mask(5):
            weight = (1 - p) ** mask.sum() * p ** (5 - mask.sum())
            total = total + weight * (((x * mask / (1 - p)) @ b) + 0.2).logsumexp(-1)
        return total - (x @ b + 0.2).logsumexp(-1)

    errors = [
        (multinomial(form(x), s * beta, x @ (s * beta) + 0.2, 0.3) - truth(s * beta, 0.3)).abs().max().item()
        for s in (0.2, 0.1, 0.05)
    ]
    assert errors[1] < errors[0] / 6
    assert errors[2] < errors[1] / 6


def test_exact_is_refused_for_logistic_regression():
    x, beta = problem()
    with pytest.raises(ValueError, match="penalty 'exact' must have a closed form, got logistic regression"):
        exact(LOGISTIC, Design(x), beta, x @ beta, 0.5)


# --- estimators ----------------------------------------------------------------------------------------------------


def test_linear_regression_is_ridge_by_second_moments():
    """The normal equations with p / (1 - p) Σ x² on the diagonal."""
    g = np.random.default_rng(0)
    x = g.normal(size=(50, 4)) * [1, 2, 0.5, 3]
    y = x @ [1, -2, 3, 0.5] + g.normal(size=50)
    model = DropoutLinearRegression(p=0.3, ridge=0.0, fit_intercept=False).fit(x, y)
    expected = np.linalg.solve(x.T @ x + 0.3 / 0.7 * np.diag((x * x).sum(0)), x.T @ y)
    np.testing.assert_allclose(model.coef_, expected, rtol=1e-7)


def test_rate_0_is_the_plain_model():
    g = np.random.default_rng(0)
    x = g.normal(size=(80, 3))
    y = x @ [1.0, 2.0, -1.0] + 0.5 + g.normal(size=80)
    plain = Ridge(alpha=2.0).fit(x, y)
    mine = DropoutLinearRegression(p=0.0, ridge=2.0).fit(x, y)
    np.testing.assert_allclose(mine.coef_, plain.coef_, rtol=1e-6)
    labels = (y > 0).astype(int) + (y > 2)
    for classes in (labels, labels > 0):
        reference = LogisticRegression(C=1 / 2.0, tol=1e-10, max_iter=10_000).fit(x, classes)
        ours = DropoutLogisticRegression(p=0.0, ridge=2.0).fit(x, classes)
        np.testing.assert_allclose(ours.predict_proba(x), reference.predict_proba(x), atol=1e-5)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("layout", [sp.csr_matrix, sp.csc_matrix, sp.coo_array])
def test_sparse_rows_give_the_same_fit(model, layout):
    x, _ = problem(rows=60)
    y = np.random.default_rng(0).integers(0, 3, size=60)
    dense = model(p=0.4).fit(x.numpy(), y)
    thin = model(p=0.4).fit(layout(x.numpy()), y)
    np.testing.assert_allclose(thin.coef_, dense.coef_, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(thin.predict(layout(x.numpy())), dense.predict(x.numpy()), rtol=1e-5)


def test_monte_carlo_comes_near_the_truth_with_many_masks():
    g = np.random.default_rng(0)
    x = g.normal(size=(100, 4))
    y = g.poisson(np.exp(0.5 * x[:, 0] - 0.3 * x[:, 1]))
    truth = DropoutPoissonRegressor(p=0.2, penalty="exact").fit(x, y)
    found = DropoutPoissonRegressor(p=0.2, penalty="monte_carlo", n_masks=200, random_state=0).fit(x, y)
    second = DropoutPoissonRegressor(p=0.2).fit(x, y)
    assert np.abs(found.coef_ - truth.coef_).max() < 0.04
    assert np.abs(second.coef_ - truth.coef_).max() < 0.05
    again = DropoutPoissonRegressor(p=0.2, penalty="monte_carlo", n_masks=200, random_state=0).fit(x, y)
    np.testing.assert_array_equal(again.coef_, found.coef_)


def test_several_classes_with_masks_and_at_second_order_agree_at_a_small_rate():
    x, y = load_iris(return_X_y=True)
    x = x - x.mean(0)
    models = [DropoutLogisticRegression(p=0.05, ridge=5.0, penalty=m, n_masks=60, random_state=0) for m in
              ("quadratic", "monte_carlo")]  # fmt: skip
    a, b = (model.fit(x, y) for model in models)
    assert a.coef_.shape == (3, 4)
    assert np.abs(a.predict_proba(x) - b.predict_proba(x)).max() < 0.03
    assert a.score(x, y) > 0.9


def test_unlabelled_rows_shape_the_penalty():
    """As many copies of the labelled rows change nothing; rows of another scale do."""
    g = np.random.default_rng(0)
    x = g.normal(size=(100, 3))
    y = (x[:, 0] + 2 * g.normal(size=100) > 0).astype(int)
    alone = DropoutLogisticRegression(p=0.5).fit(x, y)
    copies = DropoutLogisticRegression(p=0.5).fit(x, y, X_unlabelled=np.concatenate([x, x]))
    np.testing.assert_allclose(copies.predict_proba(x), alone.predict_proba(x), atol=1e-5)
    larger = DropoutLogisticRegression(p=0.5).fit(x, y, X_unlabelled=3 * x)
    assert np.abs(larger.predict_proba(x) - alone.predict_proba(x)).max() > 1e-3


def test_a_rare_and_telling_feature_is_penalised_less():
    """The point of the adaptive penalty: a rare but telling feature keeps more of its weight than under L2."""
    g = np.random.default_rng(0)
    n = 2000
    y = g.integers(0, 2, n)
    rare = (g.random(n) < 0.02) * (2 * y - 1.0)  # seldom there, always right
    common = g.normal(size=(n, 5)) + 0.3 * (2 * y[:, None] - 1)
    x = np.column_stack([rare, common])
    dropped = DropoutLogisticRegression(p=0.5).fit(x, y)
    l2 = LogisticRegression(C=1 / 100).fit(x, y)
    ratio = [abs(m.coef_[0, 0]) / np.abs(m.coef_[0, 1:]).mean() for m in (dropped, l2)]
    assert ratio[0] > 2 * ratio[1]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"p": 1.0}, "p must be at least 0 and below 1, got 1.0"),
        ({"penalty": "best"}, "penalty must be one of quadratic, delta, exact, monte_carlo, got 'best'"),
        ({"penalty": "delta"}, "quadratic or monte_carlo for more than two classes, got 'delta' for 3"),
        ({"ridge": -1.0}, "ridge and unlabelled_discount must be 0 or more, got -1.0 and 1.0"),
        ({"n_masks": 0}, "n_masks and max_iter must be at least 1, got 0 and 1000"),
    ],
)
def test_bad_options_are_refused(options, words):
    with pytest.raises(ValueError, match=f"vardrop.linear_model.DropoutLogisticRegression: .*{words}"):
        DropoutLogisticRegression(**options).fit(*load_iris(return_X_y=True))


def test_bad_targets_are_refused():
    x = np.ones((3, 2))
    with pytest.raises(ValueError, match="y must have at least two classes, got one class, 4"):
        DropoutLogisticRegression().fit(x, [4, 4, 4])
    with pytest.raises(ValueError, match="DropoutPoissonRegressor: y must be 0 or more, got -2"):
        DropoutPoissonRegressor().fit(x, [0, 1, -2])


def test_a_fit_that_does_not_converge_says_so():
    x, y = load_digits(return_X_y=True)
    with pytest.warns(ConvergenceWarning, match="DropoutLogisticRegression has not converged in 3 iterations"):
        DropoutLogisticRegression(max_iter=3).fit(x, y)
