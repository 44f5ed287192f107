"""The objective of a dropout GLM, its gradient by autograd, and the search for its minimum by scipy's L-BFGS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from vardrop.linear_model.families import Family
from vardrop.linear_model.penalties import Design, delta, exact, masked, monte_carlo, multinomial, quadratic

_POLISHED = 200  # parameters of a problem whose Hessian is cheap


@dataclass(frozen=True)
class Rows:
    """Some rows, how much each counts, and the masks that they are seen through, for the Monte-Carlo penalty."""

    design: Design
    weight: Tensor  # [N]
    masks: list[Design]


@dataclass(frozen=True)
class Noise:
    """How features are dropped, and how its penalty is computed."""

    p: float
    penalty: str
    n_masks: int
    seed: int

    def rows(self, design: Design, weight: Tensor) -> Rows:
        """The rows with their masks, if the penalty needs any."""
        generator = torch.Generator().manual_seed(self.seed)
        masks = masked(design, self.p, self.n_masks, generator) if self.penalty == "monte_carlo" and self.p > 0 else []
        return Rows(design, weight, masks)


def penalty_of(rows: Rows, noise: Noise, family: Family, beta: Tensor, intercept: Tensor) -> Tensor:
    """R, weighted and summed over the rows; for several classes ``beta`` is ``[D, C]`` and the family the softmax."""
    if noise.p == 0:
        return torch.zeros((), dtype=beta.dtype)
    eta = rows.design.times(beta) + intercept
    if beta.shape[1] > 1:
        each = (
            multinomial(rows.design, beta, eta, noise.p)
            if noise.penalty == "quadratic"
            else _softmax_monte_carlo(rows.masks, beta, eta, intercept)
        )
    elif noise.penalty == "monte_carlo":
        each = monte_carlo(family, rows.masks, beta, eta, intercept)
    else:
        each = {"quadratic": quadratic, "delta": delta, "exact": exact}[noise.penalty](
            family, rows.design, beta, eta, noise.p
        )
    return (rows.weight * each).sum()


def _softmax_monte_carlo(masks: list[Design], beta: Tensor, eta: Tensor, intercept: Tensor) -> Tensor:
    total = torch.zeros(len(eta), dtype=eta.dtype)
    for noisy in masks:
        total = total + (noisy.times(beta) + intercept).logsumexp(-1)
    return total / len(masks) - eta.logsumexp(-1)


def minimise(
    rows: Rows,
    targets: Tensor,
    family: Family,
    noise: Noise,
    unlabelled: Rows | None,
    discount: float,
    ridge: float,
    fit_intercept: bool,
    max_iter: int,
    tol: float,
) -> tuple[np.ndarray, np.ndarray, int, bool]:
    r"""Coefficients that minimise the mean loss with dropout's penalty.

    .. math:: \sum_i w_i \left(A(\eta_i) - y_i \eta_i\right) + \frac{n}{n + \delta m} (R + \delta R_{unlabelled})
              + \tfrac12 \lambda |\beta|^2

    divided by the sum of the weights; n and m are the weights of labelled and unlabelled rows, δ is the discount of the
    latter (Wager et al. 2013, section 4).

    Args:
        rows: the labelled ones.
        targets: ``[N, C]``: y, or one column for every class.
        family: of the model.
        noise: the dropout.
        unlabelled: rows without a label, or None.
        discount: of those.
        ridge: a plain L2 penalty beside it.
        fit_intercept: whether there is an intercept; neither dropped nor penalised.
        max_iter: of L-BFGS.
        tol: on the largest entry of the gradient.

    Returns:
        Coefficients ``[D, C]``, intercepts ``[C]``, the number of iterations, and whether it converged.
    """
    features, outputs = rows.design.x.shape[1], targets.shape[1]
    total = rows.weight.sum()
    share = total / (total + discount * unlabelled.weight.sum()) if unlabelled is not None else torch.ones(())

    def loss(flat: Tensor) -> Tensor:
        beta = flat[: features * outputs].view(features, outputs)
        intercept = flat[features * outputs :] if fit_intercept else torch.zeros(outputs, dtype=flat.dtype)
        eta = rows.design.times(beta) + intercept
        partition = eta.logsumexp(-1) if outputs > 1 else family.log_partition(eta).squeeze(-1)
        value = (rows.weight * (partition - (targets * eta).sum(-1))).sum()
        penalty = penalty_of(rows, noise, family, beta, intercept)
        if unlabelled is not None:
            penalty = penalty + discount * penalty_of(unlabelled, noise, family, beta, intercept)
        return (value + share * penalty + 0.5 * ridge * beta.square().sum()) / total

    size = (features + fit_intercept) * outputs
    flat, iterations, converged = _lbfgs(loss, size, max_iter, tol)
    coefficients = flat[: features * outputs].reshape(features, outputs)
    intercepts = flat[features * outputs :] if fit_intercept else np.zeros(outputs)
    if outputs > 1:  # the softmax does not see what all classes share
        coefficients, intercepts = coefficients - coefficients.mean(1, keepdims=True), intercepts - intercepts.mean()
    return coefficients, intercepts, iterations, converged


def _lbfgs(loss: Callable[[Tensor], Tensor], size: int, max_iter: int, tol: float) -> tuple[np.ndarray, int, bool]:
    from scipy.optimize import minimize

    def value_and_gradient(point: np.ndarray) -> tuple[float, np.ndarray]:
        flat = torch.tensor(point, dtype=torch.float64, requires_grad=True)
        value = loss(flat)
        (gradient,) = torch.autograd.grad(value, flat)
        return value.item(), gradient.numpy()

    options = {"maxiter": max_iter, "maxfun": 20 * max_iter, "gtol": tol, "ftol": 0.0, "maxcor": 20}
    found = minimize(value_and_gradient, np.zeros(size), jac=True, method="L-BFGS-B", options=options)
    slope = np.abs(found.jac).max(initial=0.0)
    converged = bool(found.success or slope <= 100 * tol)
    point = _polished(loss, torch.from_numpy(found.x)) if converged and size <= _POLISHED else found.x
    return np.asarray(point), int(found.nit), converged


def _polished(loss: Callable[[Tensor], Tensor], point: Tensor) -> Tensor:
    """Newton's steps from where L-BFGS stops, as long as the gradient shrinks: the last digits cost it too much."""

    def gradient_at(at: Tensor) -> Tensor:
        at = at.detach().requires_grad_()
        return torch.autograd.grad(loss(at), at)[0]

    gradient = gradient_at(point)
    for _ in range(5):
        hessian = torch.autograd.functional.hessian(loss, point)
        step = torch.linalg.lstsq(hessian, gradient[:, None], rcond=1e-10, driver="gelsd").solution[:, 0]
        there = gradient_at(point - step)
        if not there.norm() < gradient.norm():
            break
        point, gradient = point - step, there
    return point
