"""What is optimised: the divergences of a model, and the evidence lower bound that they are part of."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from numbers import Real
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vardrop.given import check_module
from vardrop.rates import Rated
from vardrop.weights.modules import noisy_weights


def _whole(x: Tensor) -> Tensor:
    """All of a tensor that FSDP has sharded, so that its divergence counts once."""
    return x.full_tensor() if type(x).__name__ == "DTensor" else x  # type: ignore[attr-defined]


def _divergences(model: nn.Module) -> list[Tensor]:
    """Of every random weight, and of every layer whose noise has one."""
    terms = [
        config.kl_without_padding(_whole(mean), _whole(noise), geometry)
        for _, mean, noise, config, geometry in noisy_weights(model)
    ]
    return terms + [kl for module in model.modules() if isinstance(module, Rated) and (kl := module.kl()) is not None]


def kl_divergence(model: nn.Module) -> Tensor:
    """Sum of the KL divergences of all random weights of a model from their priors (eq. 1).

    Layers that learn the rate of their noise (``layers.GaussianDropout``, ``layers.ConcreteDropout``) count too.

    It is a sum over random scalars, never divided by anything: every weight (type B, mean-field), every input unit
    (type A), whether or not they share a rate; a weight that several modules share counts once.

    Args:
        model: a module that :func:`vardrop.convert_` has been at, or that has such layers.

    Returns:
        A scalar, in nats, that gradients flow through.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if no weight of the model is random.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(100, 10)
        >>> _ = vd.convert_(layer, vd.VariationalDropout(type="A", alpha=1.0))
        >>> round(vd.kl_divergence(layer).item(), 2)  # 100 input units, 0.4267 nats each
        42.67
    """
    check_module(model, "kl_divergence")
    terms = _divergences(model)
    if not terms:
        raise ValueError(
            f"vardrop.kl_divergence: no weight of this {type(model).__name__} is random; call vd.convert_ first"
        )
    return _sum(terms)


def _sum(terms: list[Tensor]) -> Tensor:
    dtype = functools.reduce(torch.promote_types, (term.dtype for term in terms), torch.float32)
    return torch.stack([term.to(terms[0].device, dtype) for term in terms]).sum()


def dropout_rates(model: nn.Module, as_: str = "rate") -> dict[str, Tensor]:
    """The dropout rates of all random weights of a model, p = α / (1 + α), and those that layers learn.

    Args:
        model: a module that :func:`vardrop.convert_` has been at.
        as_: ``"rate"`` for p, ``"alpha"`` or ``"log_alpha"``.

    Returns:
        Name of the weight -> tensor, detached: ``[1]`` for a rate per layer, ``[units]`` per neuron, the shape of the
        weight for a rate (or a variance) per weight. Name of a layer of activation noise -> 0-dim tensor.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for another ``as_``.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(3, 2)
        >>> _ = vd.convert_(layer, vd.VariationalDropout(rate=0.25))
        >>> vd.dropout_rates(layer)
        {'weight': tensor([0.2500, 0.2500, 0.2500])}
    """
    check_module(model, "dropout_rates")
    transforms: dict[str, Callable[[Tensor], Tensor]] = {
        "rate": torch.sigmoid,
        "alpha": torch.exp,
        "log_alpha": lambda x: x,
    }
    if as_ not in transforms:
        raise ValueError(f"vardrop.dropout_rates: as_ must be one of {', '.join(transforms)}, got {as_!r}")
    with torch.no_grad():
        found = {
            name: config.log_alpha(_whole(mean), _whole(noise), geometry)
            for name, mean, noise, config, geometry in noisy_weights(model)
        }
        for name, module in model.named_modules():
            if isinstance(module, Rated) and module.is_learned:
                found[name or type(module).__name__] = module.logit()
        return {name: transforms[as_](log_alpha.clone()) for name, log_alpha in found.items()}


def _finite(x: object) -> bool:
    """Whether x is a finite number, of Python or NumPy; True and False are none."""
    return isinstance(x, Real) and not isinstance(x, bool) and math.isfinite(x)


class Terms(NamedTuple):
    """The parts of one loss: nll (mean per data point), kl (sum), scale (its weight, warm-up included)."""

    nll: float
    kl: float
    scale: float


class ELBO:
    r"""The negative evidence lower bound per data point, as a loss (eq. 1-3, divided by N).

    .. math:: loss = \overline{nll} + scale \cdot \frac{KL}{N}

    Args:
        model: a converted module. One without random weights has no KL: the loss is then the nll.
        num_data: N, the number of examples in the *training set*; never guessed.
        kl_scale: factor on the KL; 1/3 is variational dropout A2 of the paper's section 5.
        warmup: the KL grows from 0 to its full weight linearly over so many calls in training mode; or a function
            of the number of calls so far that returns a factor. For a delayed start:
            ``lambda step: min(1.0, max(0.0, (step - 1000) / 5000))``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if ``num_data`` is no positive number, ``kl_scale`` or ``warmup`` are negative or not finite, or
            ``mean_nll`` is no scalar tensor.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(3, 2)
        >>> _ = vd.convert_(layer, vd.VariationalDropout())
        >>> elbo = vd.ELBO(layer, num_data=1000)
        >>> x, y = torch.randn(8, 3), torch.randint(2, (8,))
        >>> loss = elbo(torch.nn.functional.cross_entropy(layer(x), y))
        >>> loss.backward()
        >>> round(elbo.last.kl, 3), elbo.last.scale
        (3.467, 1.0)
    """

    def __init__(
        self,
        model: nn.Module,
        num_data: int,
        kl_scale: float = 1.0,
        warmup: int | Callable[[int], float] | None = None,
    ) -> None:
        check_module(model, "ELBO")
        if not (_finite(num_data) and num_data > 0):
            raise ValueError(
                "vardrop.ELBO: num_data must be the number of examples in the training set, a positive number, got "
                f"{num_data!r}; for example num_data=len(train_set)"
            )
        if not (_finite(kl_scale) and kl_scale >= 0):
            raise ValueError(f"vardrop.ELBO: kl_scale must be finite and not negative, got {kl_scale!r}")
        if not (warmup is None or callable(warmup) or (_finite(warmup) and warmup >= 0)):
            raise ValueError(
                f"vardrop.ELBO: warmup must be a number of steps, 0 or more, or a function of the step, got {warmup!r}"
            )
        self.model = model
        self.num_data = num_data
        self.kl_scale = kl_scale
        self.warmup = warmup
        self.step = 0
        self._last: tuple[Tensor, Tensor, float] | None = None

    def scale(self) -> float:
        """The weight of the KL at this step: ``kl_scale`` times the warm-up."""
        if self.warmup is None or self.warmup == 0:
            return self.kl_scale
        if not callable(self.warmup):
            return self.kl_scale * min(1.0, self.step / self.warmup)
        factor = self.warmup(self.step)
        if not (_finite(factor) and factor >= 0):
            raise ValueError(
                f"vardrop.ELBO: warmup must return a factor, finite and not negative, got {factor!r} for {self.step}"
            )
        return self.kl_scale * float(factor)

    def __call__(self, mean_nll: Tensor) -> Tensor:
        """The loss, from the *mean* negative log-likelihood of a minibatch."""
        if not isinstance(mean_nll, Tensor) or mean_nll.ndim:
            given = f"shape {tuple(mean_nll.shape)}" if isinstance(mean_nll, Tensor) else repr(mean_nll)
            raise ValueError(
                "vardrop.ELBO: expects the mean negative log-likelihood of the minibatch, a scalar tensor, got "
                f"{given}; did you mean elbo(nll.mean())?"
            )
        scale = self.scale()
        terms = _divergences(self.model)
        kl = _sum(terms) if terms else mean_nll.new_zeros(())
        self._last = mean_nll.detach(), kl.detach(), scale
        if self.model.training:
            self.step += 1
        return mean_nll + scale / self.num_data * kl.to(mean_nll.device)

    @property
    def last(self) -> Terms:
        """The parts of the last loss, as numbers."""
        if self._last is None:
            raise ValueError("vardrop.ELBO: nothing to report yet; call it with a mean negative log-likelihood first")
        nll, kl, scale = self._last
        return Terms(nll.item(), kl.item(), scale)

    def state_dict(self) -> dict[str, Any]:
        """The number of steps taken, which the warm-up goes by."""
        return {"step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up where :meth:`state_dict` left off."""
        step = state.get("step")
        if isinstance(step, bool) or not isinstance(step, int) or step < 0:
            raise ValueError(f"vardrop.ELBO: state must have a 'step', a whole number of 0 or more, got {state!r}")
        self.step = step
