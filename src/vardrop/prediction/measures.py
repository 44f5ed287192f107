"""Uncertainty of classes and values from the outputs of T passes, as pure functions.

Legend: T passes, N examples, C classes; p_t the probabilities of pass t and p̄ their mean over passes; H entropy in
nats. Samples are ``[T, N, C, ...]`` with the classes on ``class_dim`` of one pass, which is 1 unless said otherwise.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "entropy",
    "expected_entropy",
    "log_likelihood",
    "mutual_information",
    "predictive_entropy",
    "variation_ratio",
]


def wide(x: Tensor, narrow: bool = False) -> Tensor:
    """x in float64 where that is cheap and there is such a type; else at least in float32."""
    if x.dtype == torch.float64:
        return x
    return x.float() if narrow or x.device.type == "mps" else x.double()


def entropy(probabilities: Tensor, dim: int = -1, log_probabilities: Tensor | None = None) -> Tensor:
    r"""H[p] in nats, where a probability of 0 adds 0.

    .. math:: H[p] = - \sum_c p_c \log p_c

    Args:
        probabilities: p, summing to 1 along ``dim``.
        dim: the classes.
        log_probabilities: log p, if it is at hand.

    Shape:
        That of p without ``dim``.

    Example:
        >>> import torch
        >>> from vardrop.prediction.measures import entropy
        >>> entropy(torch.tensor([[0.5, 0.5], [1.0, 0.0]]))
        tensor([0.6931, 0.0000])
    """
    if log_probabilities is None:
        terms = torch.special.entr(probabilities)
    else:
        terms = torch.where(probabilities > 0, -probabilities * log_probabilities, 0)
    return terms.sum(dim).clamp_min(0)  # and no -0.0


def _classes(samples: Tensor, class_dim: int) -> int:
    """The dimension of the classes in the samples, counted from the end."""
    return class_dim if class_dim < 0 else class_dim + 1 - samples.ndim


def predictive_entropy(samples: Tensor, class_dim: int = 1) -> Tensor:
    r"""H[p̄]: all there is to be unsure about, the data's noise and the model's ignorance.

    Args:
        samples: probabilities of every pass.
        class_dim: the classes, as a dimension of one pass.

    Shape:
        ``[T, N, C, ...]`` -> ``[N, ...]``.

    Example:
        >>> import torch
        >>> from vardrop.prediction.measures import predictive_entropy
        >>> predictive_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.6931])
    """
    return entropy(wide(samples).mean(0), _classes(samples, class_dim)).to(samples.dtype)


def expected_entropy(samples: Tensor, class_dim: int = 1) -> Tensor:
    r"""E_t H[p_t]: what a pass is unsure about by itself, the noise in the data (aleatoric).

    Args:
        samples: probabilities of every pass.
        class_dim: the classes, as a dimension of one pass.

    Shape:
        ``[T, N, C, ...]`` -> ``[N, ...]``.

    Example:
        >>> import torch
        >>> from vardrop.prediction.measures import expected_entropy
        >>> expected_entropy(torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]]))
        tensor([0.])
    """
    return entropy(wide(samples), _classes(samples, class_dim)).mean(0).to(samples.dtype)


def mutual_information(samples: Tensor, class_dim: int = 1) -> Tensor:
    r"""H[p̄] − E_t H[p_t] ≥ 0: what the passes disagree about, the model's ignorance (epistemic; BALD's score).

    Args:
        samples: probabilities of every pass.
        class_dim: the classes, as a dimension of one pass.

    Shape:
        ``[T, N, C, ...]`` -> ``[N, ...]``.

    Example:
        >>> import torch
        >>> from vardrop.prediction.measures import mutual_information
        >>> mutual_information(torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.5, 0.5]]]))
        tensor([0.6931, 0.0000])
    """
    samples_, dim = wide(samples), _classes(samples, class_dim)
    difference = entropy(samples_.mean(0), dim) - entropy(samples_, dim).mean(0)
    return difference.clamp_min(0).to(samples.dtype)  # below 0 only by rounding


def variation_ratio(samples: Tensor, class_dim: int = 1) -> Tensor:
    r"""1 − f / T, where f passes of T choose the class that most of them choose (Freeman 1965).

    Args:
        samples: probabilities, or anything else whose largest entry is the choice.
        class_dim: the classes, as a dimension of one pass.

    Shape:
        ``[T, N, C, ...]`` -> ``[N, ...]``.

    Example:
        >>> import torch
        >>> from vardrop.prediction.measures import variation_ratio
        >>> variation_ratio(torch.tensor([[[0.9, 0.1]], [[0.8, 0.2]], [[0.4, 0.6]], [[0.7, 0.3]]]))
        tensor([0.2500])
    """
    most = votes(samples, class_dim).amax(_classes(samples, class_dim))
    return 1 - most / max(1, len(samples))


def votes(samples: Tensor, class_dim: int = 1) -> Tensor:
    """How many passes choose each class: ``[T, N, C, ...]`` -> ``[N, C, ...]``, whole numbers in float32."""
    dim = _classes(samples, class_dim)
    counts = torch.zeros(samples.shape[1:], dtype=torch.float32, device=samples.device)
    chosen = samples.argmax(dim).movedim(0, dim)  # the passes where the classes were
    return counts.scatter_add_(dim, chosen, torch.ones_like(chosen, dtype=torch.float32))


def log_likelihood(
    samples: Tensor, y: Tensor, precision: float | Tensor = 1.0, degrees: float | Tensor | None = None
) -> Tensor:
    r"""Log-density of y under the mixture of the passes (Gal, Ghahramani 2016, eq. 8), for every example.

    .. math:: \log \frac{1}{T} \sum_t N(y; \hat y_t, \tau^{-1} I)
              = \operatorname{logsumexp}_t\Bigl(-\tfrac12 \tau \lVert y - \hat y_t \rVert^2\Bigr)
              - \log T - \tfrac{D}{2} \log 2\pi + \tfrac{D}{2} \log \tau

    with D the entries of one example: they are independent given the pass, and depend on each other through it. A
    precision that is not the same for all examples is a random variable of mean τ and ν degrees of freedom, Gamma(ν/2,
    ν/2τ); the density of a pass is then Student's,

    .. math:: St(y; \hat y_t) = \frac{\Gamma((\nu + D) / 2)}{\Gamma(\nu / 2)} \Bigl(\frac{\tau}{\nu \pi}\Bigr)^{D/2}
              \Bigl(1 + \frac{\tau}{\nu} \lVert y - \hat y_t \rVert^2\Bigr)^{-(\nu + D) / 2}

    Args:
        samples: ŷ of every pass.
        y: the truths; ``[N]`` will do for outputs ``[N, 1]``.
        precision: τ, above 0: one over the variance of the noise in y. A number, ``[N]``, or a tensor that broadcasts
            with one pass.
        degrees: ν, above 0: the fewer, the more the precision differs. A number, or ``[N]``; None for one precision.

    Shape:
        ``[T, N, ...]`` and ``[N, ...]`` -> ``[N]``.

    Raises:
        ValueError: if the shapes do not fit, or a precision or degrees are not above 0.

    Example:
        >>> import torch
        >>> from vardrop.prediction.measures import log_likelihood
        >>> log_likelihood(torch.zeros(5, 1), torch.ones(1), precision=1.0)
        tensor([-1.4189])
        >>> log_likelihood(torch.zeros(5, 1), torch.ones(1), precision=1.0, degrees=1.0)  # Cauchy's, 1 / 2π
        tensor([-1.8379])
    """
    shape = samples.shape[1:]
    if y.shape != shape and not (y.shape[:1] == shape[:1] and y.numel() == shape.numel()):
        raise ValueError(
            f"vardrop.log_likelihood: y must have the shape of the predictions, {tuple(shape)}, got {tuple(y.shape)}"
        )
    tau = checked_precision(precision, samples, shape)
    error = wide(y.to(samples.device)).reshape(shape) - wide(samples)
    distance = _of_example(tau * error.square())  # [T, N]
    size = shape[1:].numel()
    constant = 0.5 * _of_example(tau.log().expand(shape).unsqueeze(0))
    if degrees is None:
        terms = constant - 0.5 * (distance + size * math.log(2 * math.pi))
    else:
        nu = wide(torch.as_tensor(degrees, device=samples.device))
        if nu.ndim and nu.shape != shape[:1]:
            raise ValueError(
                "vardrop.log_likelihood: degrees of freedom must be a number or one for each of the "
                f"{shape[0]} examples, [N], got the shape {tuple(nu.shape)}"
            )
        if not bool((nu > 0).all()):
            raise ValueError(
                f"vardrop.log_likelihood: degrees of freedom must be above 0, got {degrees}; leave them out for one "
                "precision of all examples"
            )
        power = 0.5 * (nu + size)
        constant = constant + power.lgamma() - (0.5 * nu).lgamma() - 0.5 * size * (nu * math.pi).log()
        terms = constant - power * (distance / nu).log1p()
    found = terms.logsumexp(0) - math.log(len(samples))
    return found.to(samples.dtype if samples.dtype.itemsize >= 4 else torch.float32)


def _of_example(values: Tensor) -> Tensor:
    """Sums over the entries of every example: ``[T, N, ...]`` -> ``[T, N]``."""
    return values.flatten(2).sum(-1) if values.ndim > 2 else values


def checked_precision(precision: float | Tensor, like: Tensor, shape: torch.Size) -> Tensor:
    """τ as a wide tensor on the device of ``like`` that broadcasts with ``shape``; refused if it is not above 0."""
    tau = wide(torch.as_tensor(precision, device=like.device))
    if tau.ndim and tau.shape == shape[:1]:
        tau = tau.reshape(-1, *[1] * (len(shape) - 1))  # one for every example
    if not _broadcasts(tau.shape, shape):
        raise ValueError(
            f"vardrop: precision must be a number, one for each of the examples, or broadcast with {tuple(shape)}, got "
            f"the shape {tuple(tau.shape)}"
        )
    if not bool((tau > 0).all()):
        raise ValueError(f"vardrop: precision must be above 0, got {precision}; it is one over the noise's variance")
    return tau


def _broadcasts(small: torch.Size, shape: torch.Size) -> bool:
    try:
        return torch.broadcast_shapes(small, shape) == shape
    except RuntimeError:
        return False
