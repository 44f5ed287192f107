"""Members of an ensemble: made, stacked into one module with one more axis in front, and taken apart again.

Legend: K members; a parameter ``[...]`` of a member is ``[K, ...]`` in the stack.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import stack_module_state

from vardrop.rates import Rated
from vardrop.weights.additive import GaussianPosterior
from vardrop.weights.geometry import Geometry
from vardrop.weights.modules import RandomWeights
from vardrop.weights.multiplicative import _Multiplicative
from vardrop.weights.posteriors import Posterior
from vardrop.weights.random_weight import RandomWeight
from vardrop.weights.sparse import SparseVariationalDropout

_RESETS = ("reset_parameters", "_reset_parameters")  # the second is MultiheadAttention's and Transformer's


@dataclass(frozen=True)
class StackedPosterior(Posterior):
    """The posterior of a weight that is stacked: the divergence is summed over members, log α has one more axis."""

    config: Posterior = None  # type: ignore[assignment]

    def _check(self) -> None:
        return

    def _each(self, function: Callable[..., Tensor], weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        try:
            return torch.vmap(lambda w, n: function(w, n, geometry))(weight, noise)
        except RuntimeError:  # the cubic looks at its values
            return torch.stack([function(w, n, geometry) for w, n in zip(weight, noise, strict=True)])

    def log_alpha(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        return self._each(self.config.log_alpha, weight, noise, geometry)

    def kl(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        if isinstance(self.config, GaussianPosterior):  # a sum over all entries as it is
            return self.config.kl(weight, noise, geometry)
        elementwise = isinstance(self.config, _Multiplicative) and self.config.prior != "gaussian"
        if elementwise or (isinstance(self.config, SparseVariationalDropout) and self.config.sharing == "weight"):
            return self.config.kl(weight, noise, geometry) * len(noise)  # so many scalars for each rate
        return self._each(self.config.kl, weight, noise, geometry).sum()

    def kl_without_padding(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> Tensor:
        if geometry.padding is None:
            return self.kl(weight, noise, geometry)
        return self._each(self.config.kl_without_padding, weight, noise, geometry).sum()

    def random(self, weight: Tensor, noise: Tensor, geometry: Geometry) -> RandomWeight:
        return self.config.random(weight, noise, geometry)  # inside the pass, where a member is by itself


def build(model: nn.Module | Callable[[], nn.Module], members: int, seed: int) -> list[nn.Module]:
    """Members that differ in the seed of their initialisation; torch's own generators stay where they are.

    Args:
        model: a module, of which every member is a copy with parameters drawn anew, or a function that builds one.
        members: K.
        seed: of all members together.

    Raises:
        TypeError: if ``model`` is neither, or the function builds something else.
        ValueError: if a module has parameters that it cannot draw anew.
    """
    devices: list[torch.device] = []
    if isinstance(model, nn.Module):
        _check_resets(model)
        devices = list({p.device for p in model.parameters() if p.device.type == "cuda"})
    elif not callable(model):
        raise TypeError(
            f"vardrop.Ensemble: model must be a torch.nn.Module or a function that builds one, got {model!r}"
        )
    seeds = torch.randint(2**62, (members,), generator=torch.Generator().manual_seed(seed)).tolist()
    made = []
    with torch.random.fork_rng(devices=devices):
        for each in seeds:
            torch.manual_seed(each)
            if isinstance(model, nn.Module):
                member = copy.deepcopy(model)
                reset_(member)
            else:
                member = model()
                if not isinstance(member, nn.Module):
                    raise TypeError(
                        "vardrop.Ensemble: the function must build a torch.nn.Module, got "
                        f"{type(member).__name__}; return a new model from every call"
                    )
            made.append(member)
    if len({id(member) for member in made}) < len(made):
        raise ValueError(
            "vardrop.Ensemble: the function must build a new model in every call, got the same one twice; "
            "make it inside the function, or pass the model itself"
        )
    return made


def _check_resets(model: nn.Module) -> None:
    for name, module in model.named_modules():
        own = [p for p in module._parameters.values() if p is not None]
        if any(isinstance(p, nn.UninitializedParameter) for p in own):
            raise ValueError(
                f"vardrop.Ensemble: every module must have its shape, got {name or 'the model'!r}, which is lazy; run "
                "a forward pass first"
            )
        if own and not any(callable(getattr(module, reset, None)) for reset in _RESETS):
            raise ValueError(
                f"vardrop.Ensemble: members must start differently, got {name or 'the model'!r}, a "
                f"{type(module).__name__} with parameters and no reset_parameters() to draw them anew; pass a function "
                "that builds the model, or Ensemble.from_modules([...])"
            )


def reset_(model: nn.Module) -> None:
    """Draw all parameters anew, children first as when they are built; the noise of random weights stays."""
    for child in model.children():
        reset_(child)
    reset = next((found for name in _RESETS if callable(found := getattr(model, name, None))), None)
    if reset is None:
        return
    training, model.training = model.training, False  # in training a random weight refuses to be initialised
    noise = {}
    if isinstance(model, RandomWeights):
        noise = {n.key: getattr(model, n.key).detach().clone() for n in model.vardrop_noise.values()}
    reset()
    model.training = training
    for key, value in noise.items():  # a recurrent module's reset takes all parameters for weights
        with torch.no_grad():
            getattr(model, key).copy_(value)


def stack(modules: Sequence[nn.Module]) -> nn.Module:
    """One module of the structure of its members, whose parameters and buffers have an axis of members in front.

    Raises:
        ValueError: if the members differ in more than their values, or have layers that learn a rate.
    """
    first = modules[0]
    for index, module in enumerate(modules):
        why = _difference(first, module)
        if why:
            raise ValueError(
                f"vardrop.Ensemble: members must differ in the values of their parameters alone, got member {index} "
                f"{why}; build them by the same function"
            )
    for name, module in first.named_modules():
        if isinstance(module, Rated) and module.is_learned:
            raise ValueError(
                f"vardrop.Ensemble: a layer that learns its rate cannot be stacked, got {name or 'the model'!r}, a "
                f"{type(module).__name__}; learn rates with vd.convert_(model, vd.VariationalDropout()) instead"
            )
    parameters, buffers = stack_module_state(list(modules))
    memo: dict[int, Any] = {id(p): nn.Parameter(parameters[n], p.requires_grad) for n, p in first.named_parameters()}
    shared = shared_buffers(first)
    memo |= {id(b): buffers[n] for n, b in first.named_buffers() if id(b) not in shared}
    stacked = _copy(first, memo)
    for module in stacked.modules():
        if isinstance(module, RandomWeights):
            noise = module.vardrop_noise.items()
            module.vardrop_noise = {n: how._replace(config=StackedPosterior(config=how.config)) for n, how in noise}
    return stacked


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with the tensors of ``memo``; in evaluation meanwhile, for a recurrent module reads its weights then."""
    flags = [module.training for module in model.modules()]
    try:
        for module in model.modules():
            module.training = False
        copied = copy.deepcopy(model, memo)
    finally:
        for module, flag in zip(model.modules(), flags, strict=True):
            module.training = flag
    for module, flag in zip(copied.modules(), flags, strict=True):
        module.training = flag
    return copied


def shared_buffers(model: nn.Module) -> set[int]:
    """The ids of buffers that are settings and not state: fixed rates, which all members have in common."""
    return {id(buffer) for m in model.modules() if isinstance(m, Rated) for buffer in m._buffers.values()}


def _in_short(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"


def _difference(first: nn.Module, other: nn.Module) -> str | None:
    if type(first) is not type(other):
        return f"of class {type(other).__name__} beside {type(first).__name__}"
    if first.training != other.training:
        return f"in {'training' if other.training else 'evaluation'} mode, unlike the first"
    for kind in ("parameters", "buffers"):
        ours, theirs = dict(getattr(first, f"named_{kind}")()), dict(getattr(other, f"named_{kind}")())
        if ours.keys() != theirs.keys():
            return f"with other {kind}: {', '.join(sorted(ours.keys() ^ theirs.keys()))}"
        for name, tensor in ours.items():
            a, b = ([t.shape, t.dtype, t.device, t.requires_grad] for t in (tensor, theirs[name]))
            if a != b:
                return f"whose {name} is of shape {tuple(b[0])}, {b[1]} on {b[2]}, requires_grad={b[3]}"
    for (name, mine), (_, its) in zip(first.named_modules(), other.named_modules(), strict=False):
        if (type(mine), mine.extra_repr()) != (type(its), its.extra_repr()):
            return f"whose {name} is {_in_short(its)} beside {_in_short(mine)}"
    return None


def take(stacked: nn.Module, index: int) -> nn.Module:
    """A plain module by itself: a copy of one member."""
    shared = shared_buffers(stacked)
    memo: dict[int, Any] = {
        id(p): nn.Parameter(p.detach()[index].clone(), p.requires_grad) for p in stacked.parameters()
    }
    memo |= {id(b): b.detach()[index].clone() for b in stacked.buffers() if id(b) not in shared}
    member = _copy(stacked, memo)
    for module in member.modules():
        if isinstance(module, RandomWeights):
            noise = module.vardrop_noise.items()
            module.vardrop_noise = {n: how._replace(config=how.config.config) for n, how in noise}  # type: ignore[attr-defined]
    return member
