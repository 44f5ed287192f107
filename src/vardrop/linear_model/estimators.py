"""Linear, logistic and Poisson regression with dropout of the features, as scikit-learn estimators."""

from __future__ import annotations

import warnings
from typing import Any, ClassVar

import numpy as np
import scipy.sparse as sp
import torch
from sklearn.base import BaseEstimator, ClassifierMixin, RegressorMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data
from torch import Tensor

from vardrop.linear_model.families import LINEAR, LOGISTIC, POISSON, Family
from vardrop.linear_model.objective import Noise, Rows, minimise
from vardrop.linear_model.penalties import METHODS, Design

_FORMATS = ("csr", "csc", "coo")


class _DropoutLinearModel(BaseEstimator):
    """What the three have in common: parameters, checks, the fit."""

    _family: ClassVar[Family]

    def __init__(
        self,
        p: float = 0.5,
        *,
        penalty: str = "quadratic",
        ridge: float = 1e-4,
        unlabelled_discount: float = 1.0,
        n_masks: int = 100,
        fit_intercept: bool = True,
        max_iter: int = 1000,
        tol: float = 1e-8,
        random_state: Any = None,
    ) -> None:
        self.p = p
        self.penalty = penalty
        self.ridge = ridge
        self.unlabelled_discount = unlabelled_discount
        self.n_masks = n_masks
        self.fit_intercept = fit_intercept
        self.max_iter = max_iter
        self.tol = tol
        self.random_state = random_state

    def _solve(self, x: Any, targets: np.ndarray, weight: np.ndarray, unlabelled: Any) -> tuple[np.ndarray, np.ndarray]:
        """Coefficients ``[D, C]`` and intercepts ``[C]``; sets ``n_iter_``."""
        self._check_options(targets.shape[1])
        seed = int(check_random_state(self.random_state).randint(2**31 - 1))
        noise = Noise(float(self.p), self.penalty, self.n_masks, seed)
        rows = noise.rows(_design(x), torch.from_numpy(weight))
        others: Rows | None = None
        if unlabelled is not None:
            unlabelled = validate_data(self, unlabelled, accept_sparse=_FORMATS, dtype=np.float64, reset=False)
            others = noise.rows(_design(unlabelled), torch.ones(unlabelled.shape[0], dtype=torch.float64))
        coefficients, intercepts, self.n_iter_, converged = minimise(
            rows, torch.from_numpy(targets), self._family, noise, others, float(self.unlabelled_discount),
            float(self.ridge), bool(self.fit_intercept), self.max_iter, self.tol,
        )  # fmt: skip
        if not converged:
            warnings.warn(
                f"vardrop.linear_model: {type(self).__name__} has not converged in {self.n_iter_} iterations; data "
                "that can be separated need a ridge above 0, others a larger max_iter",
                ConvergenceWarning,
                stacklevel=3,
            )
        return coefficients, intercepts

    def _check_options(self, outputs: int) -> None:
        where = f"vardrop.linear_model.{type(self).__name__}"
        if not 0 <= self.p < 1:
            raise ValueError(f"{where}: p must be at least 0 and below 1, got {self.p!r}")
        if self.penalty not in METHODS:
            raise ValueError(f"{where}: penalty must be one of {', '.join(METHODS)}, got {self.penalty!r}")
        if outputs > 1 and self.penalty not in ("quadratic", "monte_carlo"):
            raise ValueError(
                f"{where}: penalty must be quadratic or monte_carlo for more than two classes, got {self.penalty!r} "
                f"for {outputs}"
            )
        if self.ridge < 0 or self.unlabelled_discount < 0:
            raise ValueError(
                f"{where}: ridge and unlabelled_discount must be 0 or more, got {self.ridge!r} and "
                f"{self.unlabelled_discount!r}"
            )
        if self.n_masks < 1 or self.max_iter < 1:
            raise ValueError(
                f"{where}: n_masks and max_iter must be at least 1, got {self.n_masks!r} and {self.max_iter!r}"
            )

    def _checked(self, x: Any, y: Any, sample_weight: Any, **options: Any) -> tuple[Any, np.ndarray, np.ndarray]:
        x, y = validate_data(self, x, y, accept_sparse=_FORMATS, dtype=np.float64, **options)
        return x, y, _check_sample_weight(sample_weight, x, dtype=np.float64, ensure_non_negative=True)

    def _predictor(self, x: Any) -> np.ndarray:
        """The linear predictor of every row, ``[N, C]``."""
        check_is_fitted(self)
        x = validate_data(self, x, accept_sparse=_FORMATS, dtype=np.float64, reset=False)
        return np.asarray(x @ np.atleast_2d(self.coef_).T) + self.intercept_

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.input_tags.sparse = True
        return tags


class DropoutLinearRegression(RegressorMixin, _DropoutLinearModel):
    r"""Least squares with dropout of the features: ridge regression that penalises a feature by its second moment.

    .. math:: \min_\beta \tfrac12 \sum_i (y_i - x_i \cdot \beta - b)^2
              + \tfrac12 \tfrac{p}{1-p} \sum_j \beta_j^2 \sum_i x_{ij}^2

    The penalty is exact whatever its name (Wager, Wang, Liang 2013, section 2).

    Args:
        p: the dropout rate of the features, in [0, 1).
        penalty: ``"quadratic"``, ``"delta"``, ``"exact"`` (three names for the same here) or ``"monte_carlo"``.
        ridge: a plain L2 penalty beside it, on the sum over rows: a trace, so that there is one solution.
        unlabelled_discount: how much an unlabelled row counts against a labelled one.
        n_masks: of ``"monte_carlo"``.
        fit_intercept: whether there is an intercept, which is neither dropped nor penalised.
        max_iter: of L-BFGS.
        tol: on the largest entry of the gradient of the mean loss.
        random_state: of the masks.

    Attributes:
        coef_: ``[D]``.
        intercept_: a number.
        n_iter_: iterations that it took.

    Example:
        >>> import numpy as np
        >>> from vardrop.linear_model import DropoutLinearRegression
        >>> x = np.array([[1.0], [2.0], [3.0]])
        >>> model = DropoutLinearRegression(p=0.5, fit_intercept=False).fit(x, 4 * x.ravel())
        >>> model.coef_.round(4)  # half of 4: the penalty is as large as the sum of squares
        array([2.])
    """

    _family = LINEAR

    def fit(self, X: Any, y: Any, sample_weight: Any = None, X_unlabelled: Any = None) -> DropoutLinearRegression:  # noqa: N803
        """Fit to rows X ``[N, D]``, dense or sparse, and numbers y ``[N]``; further rows without y shape the penalty.

        Raises:
            ValueError: for options or data that make no sense.
        """
        x, y, weight = self._checked(X, y, sample_weight, y_numeric=True)
        coefficients, intercepts = self._solve(x, y.astype(np.float64)[:, None], weight, X_unlabelled)
        self.coef_, self.intercept_ = coefficients[:, 0], float(intercepts[0])
        return self

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The expected y of every row, ``[N]``."""
        return self._predictor(X)[:, 0]


class DropoutPoissonRegressor(RegressorMixin, _DropoutLinearModel):
    r"""Poisson regression of counts, with a logarithmic link and dropout of the features.

    .. math:: \min_\beta \sum_i e^{\eta_i} - y_i \eta_i + R(\beta)

    Args:
        p: the dropout rate of the features, in [0, 1).
        penalty: ``"quadratic"`` (second order), ``"delta"`` (fourth order), ``"exact"`` or ``"monte_carlo"``.
        ridge: a plain L2 penalty beside it, on the sum over rows: a trace, so that there is one solution.
        unlabelled_discount: how much an unlabelled row counts against a labelled one.
        n_masks: of ``"monte_carlo"``.
        fit_intercept: whether there is an intercept, which is neither dropped nor penalised.
        max_iter: of L-BFGS.
        tol: on the largest entry of the gradient of the mean loss.
        random_state: of the masks.

    Attributes:
        coef_: ``[D]``.
        intercept_: a number.
        n_iter_: iterations that it took.

    Example:
        >>> import numpy as np
        >>> from vardrop.linear_model import DropoutPoissonRegressor
        >>> x = np.array([[0.0], [1.0], [0.0], [1.0]])
        >>> model = DropoutPoissonRegressor(p=0.0, ridge=0.0).fit(x, np.array([1.0, 3.0, 1.0, 5.0]))
        >>> model.predict(x[:2]).round(4)
        array([1., 4.])
    """

    _family = POISSON

    def fit(self, X: Any, y: Any, sample_weight: Any = None, X_unlabelled: Any = None) -> DropoutPoissonRegressor:  # noqa: N803
        """Fit to rows X ``[N, D]``, dense or sparse, and counts y ``[N]``; further rows without y shape the penalty.

        Raises:
            ValueError: for options or data that make no sense, or counts below 0.
        """
        x, y, weight = self._checked(X, y, sample_weight, y_numeric=True)
        if (y < 0).any():
            raise ValueError(
                f"vardrop.linear_model.DropoutPoissonRegressor: y must be 0 or more, got {float(y.min()):g}"
            )
        coefficients, intercepts = self._solve(x, y.astype(np.float64)[:, None], weight, X_unlabelled)
        self.coef_, self.intercept_ = coefficients[:, 0], float(intercepts[0])
        return self

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The expected count of every row, ``[N]``."""
        return np.exp(self._predictor(X)[:, 0])

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.target_tags.positive_only = True
        return tags


class DropoutLogisticRegression(ClassifierMixin, _DropoutLinearModel):
    r"""Logistic regression with dropout of the features: an L2 penalty that adapts to how sure the model is.

    .. math:: \min_\beta \sum_i \log(1 + e^{\eta_i}) - y_i \eta_i + R(\beta), \qquad
              R \approx \tfrac12 \tfrac{p}{1-p} \sum_i \pi_i (1 - \pi_i) \sum_j x_{ij}^2 \beta_j^2

    and the softmax with more than two classes (Wager, Wang, Liang 2013). The penalty vanishes where the model is sure,
    so that data which can be separated have no finite solution without a trace of ``ridge``.

    Args:
        p: the dropout rate of the features, in [0, 1).
        penalty: ``"quadratic"`` (second order), ``"delta"`` (fourth order; two classes) or ``"monte_carlo"``.
        ridge: a plain L2 penalty beside it, on the sum over rows: a trace, so that there is one solution.
        unlabelled_discount: how much an unlabelled row counts against a labelled one.
        n_masks: of ``"monte_carlo"``.
        fit_intercept: whether there is an intercept, which is neither dropped nor penalised.
        max_iter: of L-BFGS.
        tol: on the largest entry of the gradient of the mean loss.
        random_state: of the masks.

    Attributes:
        classes_: ``[C]``.
        coef_: ``[1, D]`` with two classes, else ``[C, D]``.
        intercept_: ``[1]`` or ``[C]``.
        n_iter_: iterations that it took.

    Example:
        >>> import numpy as np
        >>> from vardrop.linear_model import DropoutLogisticRegression
        >>> x = np.array([[1.0, 0.0], [1.0, 1.0], [-1.0, 0.0], [-1.0, 1.0], [1.0, 0.5]])
        >>> y = np.array(["up", "up", "down", "down", "down"])
        >>> plain, dropped = (DropoutLogisticRegression(p=p).fit(x, y) for p in (0.0, 0.5))
        >>> bool(abs(dropped.coef_).sum() < abs(plain.coef_).sum())
        True
    """

    _family = LOGISTIC

    def fit(self, X: Any, y: Any, sample_weight: Any = None, X_unlabelled: Any = None) -> DropoutLogisticRegression:  # noqa: N803
        """Fit to rows X ``[N, D]``, dense or sparse, and classes y ``[N]``; further rows without y shape the penalty.

        Raises:
            ValueError: for options or data that make no sense, or a single class.
        """
        x, y, weight = self._checked(X, y, sample_weight)
        check_classification_targets(y)
        self.classes_, labels = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                "vardrop.linear_model.DropoutLogisticRegression: y must have at least two classes, got one class, "
                f"{self.classes_[0]}"
            )
        targets = np.eye(len(self.classes_))[labels] if len(self.classes_) > 2 else labels[:, None].astype(np.float64)
        coefficients, intercepts = self._solve(x, targets, weight, X_unlabelled)
        self.coef_, self.intercept_ = coefficients.T, intercepts
        return self

    def decision_function(self, X: Any) -> np.ndarray:  # noqa: N803
        """The linear predictor of every row: ``[N]`` with two classes, else ``[N, C]``."""
        eta = self._predictor(X)
        return eta[:, 0] if len(self.classes_) == 2 else eta

    def predict_proba(self, X: Any) -> np.ndarray:  # noqa: N803
        """The probability of every class, ``[N, C]``."""
        eta = torch.from_numpy(self._predictor(X))
        if len(self.classes_) == 2:
            eta = torch.cat([torch.zeros_like(eta), eta], dim=1)
        return eta.softmax(-1).numpy()

    def predict(self, X: Any) -> np.ndarray:  # noqa: N803
        """The most probable class of every row, ``[N]``."""
        eta = self._predictor(X)
        best = (eta[:, 0] > 0).astype(int) if len(self.classes_) == 2 else eta.argmax(1)
        return self.classes_[best]


def _design(x: Any) -> Design:
    if not sp.issparse(x):
        return Design(torch.from_numpy(np.array(x)))
    coo = x.tocsr(copy=True)
    coo.sum_duplicates()
    coo = coo.tocoo()
    indices = torch.from_numpy(np.stack([coo.row, coo.col]).astype(np.int64))
    made: Tensor = torch.sparse_coo_tensor(indices, torch.from_numpy(coo.data), coo.shape, check_invariants=False)
    return Design(made.coalesce())
