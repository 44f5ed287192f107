"""Modules with random weights: a class for every plain one, made by swapping the class of a module in place."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vardrop.weights.geometry import Geometry
from vardrop.weights.posteriors import Posterior, describe
from vardrop.weights.random_weight import RandomWeight

Axes = dict[str, tuple[int, int]]  # weight name -> its axes (of input units, of output units)


class Noise(NamedTuple):
    """How one weight of a module is random: the posterior, the weight's geometry, the name of the noise tensor."""

    config: Posterior
    geometry: Geometry
    key: str


def _is_sharded(weight: Tensor) -> bool:
    """Whether this is a DTensor: FSDP reads the attribute while the parameter is sharded, and must find it."""
    return type(weight).__name__ == "DTensor"


def mean_of(module: Any, name: str) -> Tensor:
    """The parameter of a converted module that is the mean of its random weight ``name``."""
    mean: Tensor | None = module._parameters.get(name)
    if mean is None:
        raise RuntimeError(
            f"vardrop: a converted layer must keep its parameter {name!r}, got a {type(module).__name__} without it "
            "(weight_norm, spectral_norm and prune replace it); undo that, or vd.restore_ the layer before it"
        )
    return mean


class RandomWeights:
    """Mixed into a plain module class: in training its weights read as random variables, else as parameters.

    The plain class's own ``forward`` runs unchanged. The mean stays the parameter of the old name; the noise tensor
    ``<weight>_log_alpha`` or ``<weight>_log_variance`` is a parameter (or a buffer, if fixed) beside it.
    """

    vardrop_noise: dict[str, Noise]

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """Code that builds another module like a converted one gets a plain one; without arguments, an empty shell."""
        return cls.vardrop_plain(*args, **kwargs) if args or kwargs else super().__new__(cls)  # type: ignore[attr-defined]

    def random_weight(self, name: str) -> RandomWeight | Tensor:
        """The weight called ``name`` as its forward sees it: random in training, the mean parameter in evaluation."""
        if name not in self.vardrop_noise:
            return self._parameters[name]  # type: ignore[attr-defined]
        mean = mean_of(self, name)
        if not self.training or _is_sharded(mean):  # type: ignore[attr-defined]
            return mean
        config, geometry, key = self.vardrop_noise[name]
        return config.random(mean, getattr(self, key), geometry)

    def extra_repr(self) -> str:
        configs = dict.fromkeys(describe(noise.config) for noise in self.vardrop_noise.values())
        return ", ".join(filter(None, [super().extra_repr(), *configs]))  # type: ignore[misc]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _rebuild, (type(self).vardrop_plain,), self.__getstate__()  # type: ignore[attr-defined]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """A checkpoint of the plain module loads too: it has no noise at all, and the noise stays as it is."""
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[misc]
        keys = {prefix + noise.key for noise in self.vardrop_noise.values()}
        missing = args[2]
        if keys.isdisjoint(state_dict):
            missing[:] = [key for key in missing if key not in keys]


def _random_attribute(name: str) -> property:
    def read(self: RandomWeights) -> RandomWeight | Tensor:
        try:
            return self.random_weight(name)
        except AttributeError as error:  # nn.Module would answer it with the plain parameter: no noise, in silence
            raise RuntimeError(f"vardrop: {name!r} must be random in training, but: {error}") from error

    def write(self: Any, value: Any) -> None:
        if getattr(self, "_is_replica", False):  # of nn.DataParallel, which hands its copies plain tensors
            self._parameters[name] = value
            return
        raise TypeError(
            f"vardrop: {name!r} of a converted layer must be an nn.Parameter, the mean of a random weight, got a "
            f"{type(value).__name__}; undo what replaces it (weight_norm, spectral_norm, prune), or vd.restore_ the "
            "layer first"
        )

    return property(read, write)


def _flat_weights() -> property:
    """Recurrent modules hand a list of weights to one fused operation: a sample of each, shared over time."""

    def read(self: Any) -> list[Tensor]:
        weights = [self.random_weight(name) for name in self._flat_weights_names]
        return [w.drawn() if isinstance(w, RandomWeight) else w for w in weights]

    def write(self: Any, weights: list[Tensor]) -> None:
        self.__dict__["_flat_weights"] = weights

    return property(read, write)


def _init_flat_weights(self: Any) -> None:
    """As torch's own, which reads ``_flat_weights`` and so would draw samples to no purpose, in every forward."""
    self._flat_weight_refs = [weakref.ref(self._parameters[name]) for name in self._flat_weights_names]
    if not self.training:
        self.flatten_parameters()


# What converts, and how the axes of its weights lie. The second table is for classes of libraries that are not
# imported here, by their full names. Recurrent modules name their weights themselves.
_PLAIN: dict[type[nn.Module], Axes] = {
    nn.Linear: {"weight": (1, 0)},
    NonDynamicallyQuantizableLinear: {"weight": (1, 0)},  # MultiheadAttention.out_proj: its own forward never runs
    nn.Conv1d: {"weight": (1, 0)},
    nn.Conv2d: {"weight": (1, 0)},
    nn.Conv3d: {"weight": (1, 0)},
    nn.ConvTranspose1d: {"weight": (0, 1)},
    nn.ConvTranspose2d: {"weight": (0, 1)},
    nn.ConvTranspose3d: {"weight": (0, 1)},
    nn.Embedding: {"weight": (0, 1)},
    nn.Bilinear: {"weight": (1, 0)},
    nn.MultiheadAttention: {f"{which}_proj_weight": (1, 0) for which in ("in", "q", "k", "v")},
    nn.RNN: {},
    nn.LSTM: {},
    nn.GRU: {},
    nn.RNNCell: {"weight_ih": (1, 0), "weight_hh": (1, 0)},
    nn.LSTMCell: {"weight_ih": (1, 0), "weight_hh": (1, 0)},
    nn.GRUCell: {"weight_ih": (1, 0), "weight_hh": (1, 0)},
}
_FOREIGN: dict[str, Axes] = {"transformers.pytorch_utils.Conv1D": {"weight": (0, 1)}}
_NOISY: dict[type[nn.Module], type[nn.Module]] = {}


def axes_of(plain: type[nn.Module]) -> Axes | None:
    """How the weights of a class lie, or None if the class is not known."""
    return _PLAIN.get(plain, _FOREIGN.get(f"{plain.__module__}.{plain.__qualname__}"))


def weight_axes(module: nn.Module) -> Axes:
    """How the weights of a plain module of a known class lie."""
    if isinstance(module, nn.RNNBase):
        return {name: (1, 0) for name in module._flat_weights_names if name.startswith("weight")}
    return axes_of(type(module)) or {}


def geometries(module: nn.Module) -> dict[str, Geometry]:
    """The weights of a plain module that can be random, by name."""
    axes = weight_axes(module)
    groups, padding = getattr(module, "groups", 1), getattr(module, "padding_idx", None)
    found = {name: module._parameters.get(name) for name in axes}
    return {n: Geometry(tuple(p.shape), *axes[n], groups, padding) for n, p in found.items() if p is not None}


def register_layer(plain: type[nn.Module], **axes: tuple[int, int]) -> None:
    """Make instances of a module class of your own convertible.

    Its ``forward`` may do what it likes with the weights named here: what is linear in them is carried out by the
    estimator, the rest gets a sample.

    Args:
        plain: the class; its subclasses are not included.
        **axes: for every weight by name, the axes ``(of input units, of output units)``.

    Raises:
        TypeError: if ``plain`` is no module class.
        ValueError: if it is known already, no weight is named, or its axes are no pair.

    Example:
        >>> import torch, vardrop as vd
        >>> class Scaled(torch.nn.Linear):
        ...     def forward(self, x):
        ...         return 2 * super().forward(x)
        >>> vd.register_layer(Scaled, weight=(1, 0))
        >>> vd.convert_(Scaled(3, 2), vd.VariationalDropout()).converted
        ['Scaled']
    """
    if not (isinstance(plain, type) and issubclass(plain, nn.Module)):
        raise TypeError(f"vardrop.register_layer: needs a subclass of torch.nn.Module, got {plain!r}")
    if axes_of(plain) is not None:
        raise ValueError(f"vardrop.register_layer: {plain.__name__} is registered already")
    if not axes:
        raise ValueError(f"vardrop.register_layer: name a weight of {plain.__name__}, for example weight=(1, 0)")
    for name, pair in axes.items():
        if not (
            isinstance(pair, tuple) and len(pair) == 2 and all(isinstance(axis, int) and axis >= 0 for axis in pair)
        ):
            raise ValueError(
                f"vardrop.register_layer: {name} must have two axes, (of input units, of output units), got {pair!r}; "
                "for example weight=(1, 0)"
            )
    _PLAIN[plain] = axes


def noisy_class(plain: type[nn.Module]) -> type[nn.Module]:
    """The class with random weights that stands for ``plain``: always the same one."""
    if plain not in _NOISY:
        body: dict[str, Any] = {"vardrop_plain": plain, "__doc__": f"{plain.__name__} with random weights."}
        if issubclass(plain, nn.RNNBase):
            body |= {"_flat_weights": _flat_weights(), "_init_flat_weights": _init_flat_weights}
        else:
            body |= {name: _random_attribute(name) for name in axes_of(plain) or {}}
        _NOISY[plain] = type(f"Variational{plain.__name__}", (RandomWeights, plain), body)
    return _NOISY[plain]


def _rebuild(plain: type[nn.Module]) -> nn.Module:
    """An empty module of the noisy class of ``plain``: how pickle and deepcopy make one."""
    if axes_of(plain) is None:
        raise ValueError(
            f"vardrop: a converted {plain.__name__} can be loaded only where that class is registered, got one that is "
            f"not; call vd.register_layer({plain.__name__}, ...) first"
        )
    noisy = noisy_class(plain)
    return noisy.__new__(noisy)


def attach(module: nn.Module, noise: dict[str, Noise], tensors: dict[str, Tensor]) -> None:
    """Swap the class of a plain module in place and give it its noise tensors, by their keys."""
    module.__class__ = noisy_class(type(module))
    module.vardrop_noise = noise  # type: ignore[assignment]
    for key, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(key, tensor)
        else:
            module.register_buffer(key, tensor)


def detach(module: Any) -> None:
    """Undo :func:`attach`: the plain class again, without noise tensors."""
    for noise in module.vardrop_noise.values():
        delattr(module, noise.key)
    del module.vardrop_noise
    module.__class__ = type(module).vardrop_plain
    if isinstance(module, nn.RNNBase):
        module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]


class NoisyWeight(NamedTuple):
    """One weight of a model that is random: its name in the model, mean and noise tensors, and their posterior."""

    name: str
    mean: Tensor
    noise: Tensor
    config: Posterior
    geometry: Geometry


def noisy_weights(model: nn.Module) -> Iterator[NoisyWeight]:
    """Every random weight of a model, once, also if several modules share it."""
    found: dict[int, NoisyWeight] = {}
    for path, module in model.named_modules():
        if not isinstance(module, RandomWeights):
            continue
        for name, (config, geometry, key) in module.vardrop_noise.items():
            mean, noise, shown = mean_of(module, name), getattr(module, key), f"{path}.{name}" if path else name
            known = found.setdefault(id(mean), NoisyWeight(shown, mean, noise, config, geometry))
            if isinstance(noise, nn.Parameter) and noise is not known.noise:
                raise ValueError(
                    f"vardrop: modules that share a weight must share its noise, got {shown} with noise of its own; "
                    "tie weights before vd.convert_"
                )
            if getattr(module, "padding_idx", None) != known.geometry.padding:  # a weight elsewhere is one here
                found[id(mean)] = known._replace(geometry=replace(known.geometry, padding=None))
    yield from found.values()
