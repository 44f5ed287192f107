"""Generalised linear models with dropout of the features, as scikit-learn estimators (Wager, Wang, Liang 2013)."""

from vardrop.linear_model.estimators import (
    DropoutLinearRegression,
    DropoutLogisticRegression,
    DropoutPoissonRegressor,
)

__all__ = ["DropoutLinearRegression", "DropoutLogisticRegression", "DropoutPoissonRegressor"]
