"""Make the weights of a network random, in place, and back."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn
from torch.nn.modules import activation
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils import parametrize

from vardrop.weights.modules import Noise, RandomWeights, attach, axes_of, detach, geometries
from vardrop.weights.posteriors import Posterior

Where = str | Sequence[str] | Callable[[nn.Module, str], bool] | None

_ELEMENTWISE = (nn.Identity, nn.Flatten, *(getattr(activation, name) for name in activation.__all__))
_PLAIN_RATE = "vardrop_replaced_rate"  # on a dropout that is switched off: the p that restore_ gives back


@dataclass
class Report:
    """What :func:`convert_` did.

    Attributes:
        converted: names of the modules whose weights are random now.
        skipped: name -> reason, in a sentence, for every other module that has parameters of its own.
        new_parameters: the noise parameters. An optimiser that exists already has not got them:
            ``optimizer.add_param_group({"params": report.new_parameters})``.
        replaced: name -> p of the dropout modules in front of converted ones, now switched off.
    """

    converted: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    new_parameters: list[nn.Parameter] = field(default_factory=list)
    replaced: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        count = sum(p.numel() for p in self.new_parameters)
        lines = [f"converted {len(self.converted)} modules, {count:,} new parameters"]
        lines += [f"  {name}" for name in self.converted]
        lines += [f"  {name}: dropout of rate {p:g} replaced, now 0" for name, p in self.replaced.items()]
        if self.skipped:
            lines += [f"left {len(self.skipped)} modules alone"]
            lines += [f"  {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def convert_(model: nn.Module, config: Posterior, where: Where = None, replace_dropout: bool = True) -> Report:
    """Make the weights of a network random variables, in place, in any architecture.

    The class of every chosen module is swapped for one whose weights read as random in training and as the plain
    parameters in evaluation; its forward, hooks, ties and parameters stay what they are. New parameters hold the
    noise. Convert before wrapping a model for distributed training.

    Known are Linear, Conv1-3d, ConvTranspose1-3d, Embedding, Bilinear, MultiheadAttention, RNN, LSTM, GRU and their
    cells (one weight sample per minibatch, shared over time), ``Conv1D`` of transformers, and what
    :func:`register_layer` adds. A weight tied between modules has one noise, and one divergence. A module that is
    converted already keeps its posterior.

    Args:
        model: any module; may itself be a layer.
        config: the posterior, for example ``vd.VariationalDropout()``.
        where: which modules: a glob of names or several (``"encoder.*"``), or a predicate ``(module, name) -> bool``;
            None for all.
        replace_dropout: whether dropout modules right before a converted module of an ``nn.Sequential`` (activations
            between them do not count) are switched off; their p is where a rate starts that ``config`` leaves open.

    Returns:
        A report: what was converted, what was left alone and why, the new parameters, the dropout replaced.

    Raises:
        TypeError: if ``config`` is no posterior.
        ValueError: if nothing was converted.

    Example:
        >>> import torch, vardrop as vd
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
        >>> report = vd.convert_(net, vd.VariationalDropout(sharing="layer"))
        >>> report.converted, report.replaced
        (['0', '3'], {'2': 0.5})
        >>> {name: round(float(p), 2) for name, p in vd.dropout_rates(net).items()}
        {'0.weight': 0.2, '3.weight': 0.5}
    """
    if not isinstance(config, Posterior):
        raise TypeError(
            "vardrop.convert_: config must be a posterior, for example vd.VariationalDropout(), got "
            f"{config.__name__ + ' (the class: call it)' if isinstance(config, type) else repr(config)}"
        )
    report = Report()
    chosen: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        shown = name or type(module).__name__
        reason = _why_not(module, name, where)
        if reason is None:
            chosen.append((name, module))
            report.converted.append(shown)
        elif reason:
            report.skipped[shown] = reason
    if not chosen:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(report.skipped.items())[:5])
        raise ValueError(f"vardrop.convert_: nothing to convert. {reasons or 'The model has no parameters'}")

    dropouts = _dropouts_before(model, {id(module) for _, module in chosen}) if replace_dropout else {}
    paths = {id(module): name for name, module in model.named_modules()}
    made: dict[int, tuple[Noise, Tensor]] = {}  # by the identity of the mean: tied weights share their noise
    for _, module in chosen:
        dropout = dropouts.get(id(module))
        noise, tensors = {}, {}
        for name, geometry in geometries(module).items():
            mean: Tensor = module._parameters[name]  # type: ignore[assignment]
            key = f"{name}_{config.noise_name}"
            if id(mean) not in made:
                tensor = config.initial(mean.detach(), geometry, None if dropout is None else dropout.p)
                made[id(mean)] = Noise(config, geometry, key), nn.Parameter(tensor) if config.learned else tensor
                if config.learned:
                    report.new_parameters.append(made[id(mean)][1])  # type: ignore[arg-type]
            noise[name] = made[id(mean)][0]._replace(key=key)
            tensors[key] = made[id(mean)][1]
        attach(module, noise, tensors)
        if dropout is not None and dropout.p > 0:
            report.replaced[paths[id(dropout)]] = dropout.p
            setattr(dropout, _PLAIN_RATE, dropout.p)
            dropout.p = 0.0
    return report


def restore_(model: nn.Module) -> list[str]:
    """Undo :func:`convert_` in place: the exact plain classes and parameters, which keep the posterior means.

    Args:
        model: a converted module, or one that contains some.

    Returns:
        The names of the modules that were restored; empty if none was random.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(4, 2)
        >>> _ = vd.convert_(layer, vd.VariationalDropout())
        >>> vd.restore_(layer), type(layer).__name__, sorted(layer.state_dict())
        (['Linear'], 'Linear', ['bias', 'weight'])
    """
    restored = []
    for name, module in model.named_modules():
        if isinstance(module, RandomWeights):
            detach(module)
            restored.append(name or type(module).__name__)
        if hasattr(module, _PLAIN_RATE):
            module.p = getattr(module, _PLAIN_RATE)
            delattr(module, _PLAIN_RATE)
    return restored


def _selected(where: Where, module: nn.Module, name: str) -> bool:
    if where is None:
        return True
    if callable(where):
        return bool(where(module, name))
    return any(fnmatch.fnmatchcase(name, glob) for glob in ([where] if isinstance(where, str) else where))


def _why_not(module: nn.Module, name: str, where: Where) -> str | None:
    """Why a module is not converted, in a sentence; None if it is, empty if there is nothing in it to convert."""
    kind = type(module)
    if isinstance(module, RandomWeights):
        return "is converted already; vd.restore_ it first to give it another posterior"
    own = [p for p in module._parameters.values() if p is not None]
    known = axes_of(kind)
    if known is None and not own:
        base = next((base for base in kind.__mro__[1:] if axes_of(base) is not None), None)
        if base is None:
            return ""
    if not _selected(where, module, name):
        return "is not selected by where"
    if parametrize.is_parametrized(module):
        return "is parametrised by torch.nn.utils.parametrize; remove the parametrisation first"
    if known is None:
        base = next((base for base in kind.__mro__[1:] if axes_of(base) is not None), None)
        if base is not None:
            return (
                f"is a {kind.__name__}, a subclass of {base.__name__} that may compute something else; "
                f"vd.register_layer({kind.__name__}, weight=...) makes it known"
            )
        if all(p.ndim < 2 for p in own):
            return f"is a {kind.__name__}, which has no weight matrix"
        return f"is a {kind.__name__}, which is not known; vd.register_layer makes it so"
    found = geometries(module)
    if not found:
        return "has no weight parameter of its own (weight_norm, spectral_norm and prune replace it); undo that first"
    weights = [module._parameters[n] for n in found]
    if any(isinstance(p, nn.UninitializedParameter) for p in weights):
        return "is lazy and has no shape yet; run a forward pass first"
    if any(not p.is_floating_point() for p in weights):  # type: ignore[union-attr]
        return f"has weights of type {weights[0].dtype}; only floating-point weights can be random"  # type: ignore[union-attr]
    if any(type(p).__name__ == "DTensor" for p in weights):
        return "is sharded already (its weight is a DTensor); convert before distributing the model"
    if getattr(module, "max_norm", None) is not None:
        return "has max_norm, which rewrites the weight in place"
    if getattr(module, "sparse", False):
        return "has sparse gradients, which its noise cannot have; set sparse=False"
    return None


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    """The modules of nested nn.Sequential containers in the order they run."""
    for child in module.children():
        if type(child) is nn.Sequential:
            yield from _leaves(child)
        else:
            yield child


def _dropouts_before(model: nn.Module, chosen: set[int]) -> dict[int, _DropoutNd]:
    """id of a chosen module -> the dropout that an nn.Sequential runs right before it."""
    found: dict[int, _DropoutNd] = {}
    for container in model.modules():
        if type(container) is not nn.Sequential:
            continue
        dropout: _DropoutNd | None = None
        for child in _leaves(container):
            if isinstance(child, _DropoutNd):
                dropout = child
            elif not isinstance(child, _ELEMENTWISE):
                if dropout is not None and id(child) in chosen:
                    found[id(child)] = dropout
                dropout = None
    return found
