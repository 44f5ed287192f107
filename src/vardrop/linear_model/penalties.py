r"""The penalty that dropout of the features is to a generalised linear model (Wager, Wang, Liang 2013).

With :math:`\tilde x_j = x_j \xi_j / (1 - p)`, :math:`\xi_j` Bernoulli of mean 1 - p, the noisy likelihood is the plain
one and a penalty that does not look at the labels:

.. math:: R(\beta) = \sum_i E_\xi[A(\tilde x_i \cdot \beta)] - A(x_i \cdot \beta)

Here are four ways to have it. All take what :class:`Design` knows of the rows, and return one number for every row, so
that rows can be weighted, and so that unlabelled ones can take part.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from vardrop.linear_model.families import LINEAR, POISSON, Family

METHODS = ("quadratic", "delta", "exact", "monte_carlo")


@dataclass(frozen=True)
class Design:
    """The rows of X, dense ``[N, D]`` or sparse, float64, and the powers of their entries.

    Attributes:
        x: a dense or a sparse COO tensor, coalesced.
    """

    x: Tensor

    def times(self, coefficients: Tensor, power: int = 1) -> Tensor:
        """X to the given power, elementwise, times ``[D, C]``: ``[N, C]``."""
        x = self._power(power)
        return torch.sparse.mm(x, coefficients) if x.is_sparse else x @ coefficients

    def _power(self, power: int) -> Tensor:
        return self._powers.setdefault(power, self._raised(power))

    def _raised(self, power: int) -> Tensor:
        if power == 1 or not self.x.is_sparse:
            return self.x**power if power > 1 else self.x
        return torch.sparse_coo_tensor(
            self.x.indices(), self.x.values() ** power, self.x.shape, is_coalesced=True, check_invariants=False
        )

    @cached_property
    def _powers(self) -> dict[int, Tensor]:
        return {}

    def spread(self, probabilities: Tensor, coefficients: Tensor) -> Tensor:
        r"""For every row :math:`\sum_j x_j^2 (\sum_c \pi_c \beta_{jc})^2`, ``[N]``."""
        if not self.x.is_sparse:
            return (self._power(2) * (probabilities @ coefficients.T).square()).sum(-1)
        rows, columns = self.x.indices()
        means = (probabilities[rows] * coefficients[columns]).sum(-1)
        return torch.zeros(len(probabilities), dtype=means.dtype).index_add(
            0, rows, self.x.values().square() * means.square()
        )

    def with_values(self, factors: Tensor) -> Design:
        """The same places with every entry multiplied by its factor: ``[N, D]``, or one for every stored value."""
        if not self.x.is_sparse:
            return Design(self.x * factors)
        values = self.x.values() * factors
        return Design(
            torch.sparse_coo_tensor(self.x.indices(), values, self.x.shape, is_coalesced=True, check_invariants=False)
        )

    @property
    def entries(self) -> torch.Size:
        """The shape of what :meth:`with_values` takes."""
        return self.x.values().shape if self.x.is_sparse else self.x.shape


def quadratic(family: Family, design: Design, beta: Tensor, eta: Tensor, p: float) -> Tensor:
    r"""Second order in the noise (Wager et al. 2013, eq. 6); exact for the linear model.

    .. math:: \tfrac12 A''(\eta) \tfrac{p}{1-p} \sum_j x_j^2 \beta_j^2

    Args:
        family: of the model.
        design: the rows.
        beta: coefficients ``[D, 1]``.
        eta: the linear predictor of every row, with its intercept, ``[N, 1]``.
        p: the dropout rate.

    Returns:
        The penalty of every row, ``[N]``.

    Example:
        >>> import torch
        >>> from vardrop.linear_model.families import LINEAR
        >>> from vardrop.linear_model.penalties import Design, quadratic
        >>> x, beta = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
        >>> quadratic(LINEAR, Design(x), beta, x @ beta, p=0.5)
        tensor([6.5000])
    """
    variance = p / (1 - p) * design.times(beta**2, 2)
    return (0.5 * family.derivatives[0](eta) * variance).squeeze(-1)


def delta(family: Family, design: Design, beta: Tensor, eta: Tensor, p: float) -> Tensor:
    r"""Fourth order in the noise: the delta method with the third and fourth moments of the sum.

    .. math:: \tfrac12 A'' \kappa_2 + \tfrac16 A''' \kappa_3 + \tfrac1{24} A'''' (\kappa_4 + 3 \kappa_2^2)

    with the cumulants of :math:`\tilde x \cdot \beta`, sums over j of those of a scaled Bernoulli variable. Better than
    the second order where the noise is small, and no better where it is not: an even order may fall below the truth.

    Args:
        family: of the model.
        design: the rows.
        beta: coefficients ``[D, 1]``.
        eta: the linear predictor of every row, with its intercept, ``[N, 1]``.
        p: the dropout rate.

    Returns:
        The penalty of every row, ``[N]``.

    Example:
        >>> import torch
        >>> from vardrop.linear_model.families import LINEAR
        >>> from vardrop.linear_model.penalties import Design, delta
        >>> x, beta = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
        >>> delta(LINEAR, Design(x), beta, x @ beta, p=0.5)  # nothing beyond the second order
        tensor([6.5000])
    """
    q = 1 - p
    second = p / q * design.times(beta**2, 2)
    third = p * (2 * p - 1) / q**2 * design.times(beta**3, 3)
    fourth = p * (1 - 6 * p * q) / q**3 * design.times(beta**4, 4)
    a2, a3, a4 = (derivative(eta) for derivative in family.derivatives)
    return (a2 * second / 2 + a3 * third / 6 + a4 * (fourth + 3 * second**2) / 24).squeeze(-1)


def exact(family: Family, design: Design, beta: Tensor, eta: Tensor, p: float) -> Tensor:
    r"""The expectation itself, where it has a closed form: the linear model, and Poisson regression.

    .. math:: E\,e^{\tilde x \cdot \beta} = \prod_j \left(p + (1 - p)\, e^{x_j \beta_j / (1 - p)}\right)

    Args:
        family: of the model.
        design: the rows.
        beta: coefficients ``[D, 1]``.
        eta: the linear predictor of every row, with its intercept, ``[N, 1]``.
        p: the dropout rate.

    Returns:
        The penalty of every row, ``[N]``.

    Raises:
        ValueError: for a family without a closed form.

    Example:
        >>> import math, torch
        >>> from vardrop.linear_model.families import POISSON
        >>> from vardrop.linear_model.penalties import Design, exact
        >>> x, beta = torch.tensor([[1.0]]), torch.tensor([[0.5]])
        >>> found = exact(POISSON, Design(x), beta, x @ beta, p=0.5)
        >>> bool(torch.isclose(found, torch.tensor((1 + math.e) / 2 - math.exp(0.5))))
        True
    """
    if family is LINEAR:
        return quadratic(family, design, beta, eta, p)
    if family is not POISSON:
        raise ValueError(
            f"vardrop.linear_model: penalty 'exact' must have a closed form, got {family.name} regression, which has "
            "none; use 'quadratic', 'delta' or 'monte_carlo'"
        )
    q = 1 - p
    if design.x.is_sparse:
        rows, columns = design.x.indices()
        products = design.x.values() * beta.squeeze(-1)[columns]
        logs = torch.zeros(design.x.shape[0], dtype=products.dtype).index_add(0, rows, _log_mean(products, p))
    else:
        products = design.x * beta.squeeze(-1)
        logs = _log_mean(products, p).sum(-1)
    plain = eta.squeeze(-1)
    without = plain - design.times(beta).squeeze(-1)  # the intercept, which is never dropped
    return (without + logs).exp() - plain.exp() if q else torch.zeros_like(plain)


def _log_mean(products: Tensor, p: float) -> Tensor:
    """log(p + (1 - p) exp(product / (1 - p))) for every entry, without overflow."""
    q = 1 - p
    kept = products / q + torch.log(torch.tensor(q, dtype=products.dtype))
    return torch.logaddexp(torch.full_like(kept, p).log(), kept)


def monte_carlo(family: Family, masks: list[Design], beta: Tensor, eta: Tensor, intercept: Tensor) -> Tensor:
    """The average over masks that are drawn once: as many sets of noisy rows, without bias, and never quite exact.

    Args:
        family: of the model.
        masks: the noisy rows, from :func:`masked`.
        beta: coefficients ``[D, 1]``.
        eta: the linear predictor of every plain row, with its intercept, ``[N, 1]``.
        intercept: ``[1]``.

    Returns:
        The penalty of every row, ``[N]``.

    Example:
        >>> import torch
        >>> from vardrop.linear_model.families import LINEAR
        >>> from vardrop.linear_model.penalties import Design, masked, monte_carlo
        >>> x, beta = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
        >>> masks = masked(Design(x), 0.5, 4000, torch.Generator().manual_seed(0))
        >>> found = monte_carlo(LINEAR, masks, beta, x @ beta, torch.zeros(1))
        >>> bool((found - 6.5).abs() < 0.5)
        True
    """
    total = torch.zeros_like(eta)
    for noisy in masks:
        total = total + family.log_partition(noisy.times(beta) + intercept)
    return (total / len(masks) - family.log_partition(eta)).squeeze(-1)


def masked(design: Design, p: float, count: int, generator: torch.Generator) -> list[Design]:
    """The rows with dropout, so many times."""
    return [
        design.with_values((torch.rand(design.entries, generator=generator) >= p).to(design.x.dtype) / (1 - p))
        for _ in range(count)
    ]


def multinomial(design: Design, beta: Tensor, eta: Tensor, p: float) -> Tensor:
    r"""Second order in the noise for classes by softmax.

    .. math:: \tfrac12 \mathrm{tr}(\nabla^2 A\, \mathrm{Cov}[\tilde\eta]) = \tfrac12 \tfrac{p}{1-p} \sum_j x_j^2
              \Big(\sum_c \pi_c \beta_{jc}^2 - \big(\sum_c \pi_c \beta_{jc}\big)^2\Big)

    Args:
        design: the rows.
        beta: coefficients ``[D, C]``.
        eta: the linear predictor, ``[N, C]``.
        p: the dropout rate.

    Returns:
        The penalty of every row, ``[N]``.

    Example:
        >>> import torch
        >>> from vardrop.linear_model.families import LOGISTIC
        >>> from vardrop.linear_model.penalties import Design, multinomial, quadratic
        >>> x, beta = torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0], [1.0]])
        >>> two = torch.cat([torch.zeros_like(beta), beta], dim=1)  # two classes are logistic regression
        >>> a = multinomial(Design(x), two, x @ two, p=0.5)
        >>> bool(torch.isclose(a, quadratic(LOGISTIC, Design(x), beta, x @ beta, p=0.5)))
        True
    """
    probabilities = eta.softmax(-1)
    squares = (probabilities * design.times(beta**2, 2)).sum(-1)
    return 0.5 * p / (1 - p) * (squares - design.spread(probabilities, beta))


def every_mask(features: int) -> Iterator[Tensor]:
    """All 2^D masks of zeros and ones, for checks by brute force.

    Example:
        >>> from vardrop.linear_model.penalties import every_mask
        >>> [mask.tolist() for mask in every_mask(1)]
        [[0.0], [1.0]]
    """
    for bits in itertools.product((0.0, 1.0), repeat=features):
        yield torch.tensor(bits, dtype=torch.float64)


def brute_force(family: Family, x: Tensor, beta: Tensor, p: float, intercept: float = 0.0) -> Tensor:
    """R by averaging over all 2^D masks: the truth, for a dozen features at most.

    Args:
        family: of the model.
        x: dense rows ``[N, D]``.
        beta: ``[D, 1]``.
        p: the dropout rate.
        intercept: never dropped.

    Returns:
        The penalty of every row, ``[N]``.

    Example:
        >>> import torch
        >>> from vardrop.linear_model.families import LINEAR
        >>> from vardrop.linear_model.penalties import brute_force
        >>> brute_force(LINEAR, torch.tensor([[1.0, 2.0]]).double(), torch.tensor([[3.0], [1.0]]).double(), p=0.5)
        tensor([6.5000], dtype=torch.float64)
    """
    total = torch.zeros(len(x), dtype=torch.float64)
    for mask in every_mask(x.shape[1]):
        kept = mask.sum()
        weight = (1 - p) ** kept * p ** (len(mask) - kept)
        total = total + weight * family.log_partition((x * mask / (1 - p)) @ beta + intercept).squeeze(-1)
    return total - family.log_partition(x @ beta + intercept).squeeze(-1)
