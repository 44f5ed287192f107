"""The methods that are compared, by name: what noise a network gets, and what its divergence counts."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vardrop.convert import Report, Where, convert_
from vardrop.models import Dropout, build
from vardrop.weights.additive import GaussianPosterior
from vardrop.weights.multiplicative import GaussianDropout, VariationalDropout
from vardrop.weights.posteriors import Posterior
from vardrop.weights.sparse import SparseVariationalDropout

RATES: Dropout = (0.2, 0.5)  # of the input and of hidden units: Kingma et al. 2015, section 5
_SHARING = "neuron"  # of type B too, so that A and B learn the same number of rates


@dataclass(frozen=True)
class Method:
    """One way to regularise a network.

    Attributes:
        name: on the command line.
        summary: in one line.
        dropout: whether the network is built with plain dropout, which ``config`` then replaces: its rates are where
            fixed and learned rates start.
        config: sharing or None -> the posterior of the weights; None for no random weights.
        kl_scale: the weight of the divergence in the objective.
        default_sharing: of learned rates, where the user has not chosen; None for methods that share nothing.
        sharings: what can be chosen.
        where: which modules get random weights.
        warmup: epochs over which the weight of the divergence grows, where the user has not chosen.
    """

    name: str
    summary: str
    dropout: bool = False
    config: Callable[[str | None], Posterior] | None = None
    kl_scale: float = 1.0
    default_sharing: str | None = None
    sharings: tuple[str, ...] = ()
    where: Where = None
    warmup: int = 0

    @property
    def learns(self) -> bool:
        """Whether its noise is learned: only then does the divergence change with the steps."""
        return self.config is not None and not isinstance(self.config(None), GaussianDropout)


def _linear(module: nn.Module, name: str) -> bool:
    """Where plain dropout would be, so that the fixed methods differ in the noise alone."""
    return isinstance(module, nn.Linear)


def _variational(type_: str) -> Callable[[str | None], Posterior]:
    return lambda sharing: VariationalDropout(type=type_, sharing=sharing or _SHARING)


_A = ("layer", "neuron")  # of type A there is one random scalar for every input unit
_B = ("layer", "neuron", "weight")

METHODS: dict[str, Method] = {
    method.name: method
    for method in (
        Method("none", "no regularisation", kl_scale=0.0),
        Method("binary", "Bernoulli dropout, fixed rates", dropout=True, kl_scale=0.0),
        Method(
            "gaussian-a",
            "Gaussian dropout, fixed rates, noise on the inputs of a layer",
            dropout=True,
            config=lambda _: GaussianDropout(type="A"),
            where=_linear,
        ),
        Method(
            "gaussian-b",
            "Gaussian dropout, fixed rates, noise on the pre-activations (fast dropout)",
            dropout=True,
            config=lambda _: GaussianDropout(type="B"),
            where=_linear,
        ),
        Method(
            "vd-a",
            "variational dropout A: learned rates, correlated noise",
            dropout=True,
            config=_variational("A"),
            kl_scale=1.0,
            default_sharing=_SHARING,
            sharings=_A,
        ),
        Method(
            "vd-a2",
            "variational dropout A with a third of the divergence",
            dropout=True,
            config=_variational("A"),
            kl_scale=1 / 3,
            default_sharing=_SHARING,
            sharings=_A,
        ),
        Method(
            "vd-b",
            "variational dropout B: learned rates, independent noise",
            dropout=True,
            config=_variational("B"),
            kl_scale=1.0,
            default_sharing=_SHARING,
            sharings=_B,
        ),
        Method(
            "sparse-vd",
            "sparse variational dropout: unbounded rates, to prune by",
            config=lambda sharing: SparseVariationalDropout(sharing=sharing or "weight"),
            default_sharing="weight",
            sharings=_B,
            warmup=30,  # at full weight from the start it prunes everything before anything is learned
        ),
        Method("mean-field", "mean-field Gaussian weights, Gaussian prior", config=lambda _: GaussianPosterior()),
    )
}


def prepare(
    method: str, model_spec: str, shape: tuple[int, ...], outputs: int, sharing: str | None = None
) -> tuple[nn.Module, float, Report | None]:
    """Build a network and make it what a method asks for.

    Fixed rates (binary, Gaussian) stand in front of linear layers only. Learned ones are everywhere; in convolutions,
    which replace no plain dropout, they start at 0.2.

    Args:
        method: a key of ``METHODS``.
        model_spec: see :func:`vardrop.models.build`.
        shape: of one example.
        outputs: of the network.
        sharing: of learned rates: ``"layer"``, ``"neuron"`` (an input unit; the default of A and B alike, so that they
            learn the same rates) or, for ``vd-b`` and ``sparse-vd``, ``"weight"``, the default of the latter. A neuron
            of ``sparse-vd`` is an output unit.

    Returns:
        The network, the weight of its divergence in the objective, and the report of its conversion (None where no
        weight is random).

    Raises:
        ValueError: if there is no such method or model, or the method has no such sharing.

    Example:
        >>> import vardrop as vd
        >>> from vardrop.methods import prepare
        >>> net, kl_scale, report = prepare("vd-a2", "mlp:2x16", (64,), 10)
        >>> {name: tuple(rates.shape) for name, rates in vd.dropout_rates(net).items()}
        {'1.weight': (64,), '4.weight': (16,), '7.weight': (16,)}
        >>> round(kl_scale, 3), report.replaced
        (0.333, {'0': 0.2, '3': 0.5, '6': 0.5})
    """
    chosen = METHODS.get(method)
    if chosen is None:
        close = difflib.get_close_matches(method, METHODS, n=1)
        hint = f"; did you mean {close[0]}?" if close else ""
        raise ValueError(f"vardrop.methods: method must be one of {', '.join(METHODS)}, got {method!r}{hint}")
    if sharing is not None and not chosen.sharings:
        sharers = ", ".join(name for name, other in METHODS.items() if other.sharings)
        raise ValueError(
            f"vardrop.methods: sharing must be left out but with the methods that learn shared rates ({sharers}), got "
            f"sharing={sharing!r} with {method}"
        )
    if sharing is not None and sharing not in chosen.sharings:
        raise ValueError(
            f"vardrop.methods: sharing of {method} must be one of {', '.join(chosen.sharings)}, got {sharing!r}"
        )
    model = build(model_spec, shape, outputs, RATES if chosen.dropout else None)
    if chosen.config is None:
        return model, chosen.kl_scale, None
    report = convert_(model, chosen.config(sharing), where=chosen.where)
    return model, chosen.kl_scale, report
