"""The ensemble as one module: a pass over all members at once, their losses, and their prediction."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from vardrop.ensemble.stacking import build, shared_buffers, stack, take
from vardrop.prediction.structure import copied

if TYPE_CHECKING:
    from vardrop.prediction.prediction import Prediction


class Ensemble(nn.Module):
    r"""Networks of one architecture that start differently, trained and evaluated in one pass (Lakshminarayanan 2017).

    .. math:: p(y \mid x) = \tfrac1K \sum_{k=1}^{K} p(y \mid x, w_k)

    The parameters of all members are stacked: ordinary parameters with an axis of K in front, for any optimiser and
    any ``state_dict``. The forward pass is the member's own under ``torch.vmap``; where vmap refuses (control flow that
    looks at values), a loop over members runs in its place from then on, and ``fallback`` says why. Dropout draws anew
    for every member; BatchNorm keeps statistics for each.

    Many small members gain the most: on one CPU thread 20 networks of 50 hidden units train in half the time that a
    loop takes. Convolutions are slower there than in a loop; set ``fallback`` to a reason of your own, and it runs.

    Random weights of :func:`vardrop.convert_` stay random. Convert the model first, then make the ensemble;
    :func:`vardrop.kl_divergence` and :class:`vardrop.ELBO` then count every member.

    Args:
        model: a module, of which every member is a copy with all parameters drawn anew, or a function that builds one.
        members: K, how many.
        seed: of the initialisations.

    Attributes:
        fallback: why passes are a loop over members; None while vmap runs them. Set to None, vmap is tried again.

    Shape:
        x ``[N, ...]``, the same batch for every member, or with ``per_member=True`` ``[K, N, ...]``; y ``[K, N, ...]``.

    Raises:
        TypeError: if ``model`` is neither.
        ValueError: if there is no member, if a module cannot draw its parameters anew, or a layer learns its rate.

    Example:
        >>> import torch, vardrop as vd
        >>> from torch.nn import functional as F
        >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3))
        >>> ensemble = vd.Ensemble(net, members=5)
        >>> optimizer = torch.optim.SGD(ensemble.parameters(), lr=0.1)
        >>> x, y = torch.randn(16, 4), torch.randint(3, (16,))
        >>> ensemble.losses(F.cross_entropy, ensemble(x), y).sum().backward()  # as if each were trained by itself
        >>> optimizer.step()
        >>> ensemble(x).shape, len(ensemble.members())
        (torch.Size([5, 16, 3]), 5)
    """

    def __init__(self, model: nn.Module | Callable[[], nn.Module], members: int = 5, seed: int = 0) -> None:
        if isinstance(members, bool) or not isinstance(members, int) or members < 1:
            raise ValueError(f"vardrop.Ensemble: members must be a whole number of 1 or more, got {members!r}")
        super().__init__()
        self._take_over(build(model, members, seed))

    def _take_over(self, modules: Sequence[nn.Module]) -> None:
        self.stacked = stack(modules)
        self.size = len(modules)
        self.fallback: str | None = None
        self._names = frozenset(name for name, _ in self.stacked.named_parameters())
        self.training = self.stacked.training

    @classmethod
    def from_modules(cls, modules: Sequence[nn.Module]) -> Ensemble:
        """An ensemble of modules that are there already, such as separately trained ones; their values are copied.

        Raises:
            ValueError: if there is none, or they differ in more than the values of their parameters.

        Example:
            >>> import torch, vardrop as vd
            >>> nets = [torch.nn.Linear(3, 2) for _ in range(4)]
            >>> ensemble, x = vd.Ensemble.from_modules(nets), torch.randn(5, 3)
            >>> torch.allclose(ensemble(x)[2], nets[2](x), atol=1e-6)
            True
        """
        modules = list(modules)
        if not modules or not all(isinstance(module, nn.Module) for module in modules):
            raise ValueError(f"vardrop.Ensemble: from_modules needs one torch.nn.Module or more, got {modules!r}")
        ensemble = cls.__new__(cls)
        nn.Module.__init__(ensemble)
        ensemble._take_over(modules)
        return ensemble

    def forward(self, *args: Any, per_member: bool = False, **kwargs: Any) -> Any:
        """The outputs of all members, ``[K, ...]``; ``per_member``: every tensor given has an axis of K in front."""
        parameters, buffers = self._state()
        if per_member:
            self._check_per_member([*args, *kwargs.values()])
        dims = tuple(0 if per_member and isinstance(arg, Tensor) else None for arg in args)
        by_name = {name: 0 if per_member and isinstance(arg, Tensor) else None for name, arg in kwargs.items()}
        state = {**parameters, **buffers}

        def one(state: dict[str, Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return functional_call(self.stacked, state, args, kwargs)

        def loop() -> Any:
            outputs = []
            for k in range(self.size):
                args_, kwargs_ = copied((args, kwargs))  # what a member writes to must not reach the others
                arguments = tuple(a[k] if d == 0 else a for a, d in zip(args_, dims, strict=True))
                named = {name: a[k] if by_name[name] == 0 else a for name, a in kwargs_.items()}
                outputs.append(one({name: tensor[k] for name, tensor in state.items()}, arguments, named))
            return _stacked(outputs)

        if self.fallback is not None:
            return loop()
        before = {name: buffer.clone() for name, buffer in buffers.items()} if self.training else {}
        try:
            return torch.vmap(one, in_dims=(0, dims, by_name), randomness="different")(state, *copied((args, kwargs)))
        except (RuntimeError, NotImplementedError, ValueError) as error:
            reason = str(error).strip().partition("\n")[0]
        for name, buffer in before.items():  # whatever the pass did before it stopped
            buffers[name].copy_(buffer)
        out = loop()
        self.fallback = reason  # not before: what fails here too is the caller's error, and is raised as it is
        return out

    def losses(self, loss: Callable[..., Tensor], output: Any, *targets: Tensor, per_member: bool = False) -> Tensor:
        """A loss for every member, ``[K]``. Minimise their sum: each member then trains as if it were by itself.

        Args:
            loss: of one member, such as ``F.cross_entropy``: (output, targets) -> scalar.
            output: of the forward pass, with an axis of K in front.
            *targets: the same for every member.
            per_member: they have an axis of K in front.

        Raises:
            ValueError: if ``per_member`` is set and a tensor has another number in front.
        """
        if per_member:
            self._check_per_member(targets)
        dims = (0, *[0 if per_member else None] * len(targets))
        return torch.vmap(loss, in_dims=dims, randomness="different")(output, *targets)

    def members(self) -> list[nn.Module]:
        """The members as plain modules by themselves: copies, which can be saved, converted or compiled."""
        return [take(self.stacked, k) for k in range(self.size)]

    def predict(
        self, x: Any, outputs: str | None = None, *, class_dim: int = 1, select: Any = None, keep: bool = True
    ) -> Prediction:
        """The prediction of all members in evaluation mode, which play the part of MC dropout's passes.

        Args:
            x: a batch, a tuple or mapping of arguments, or a loader of batches whose first entry is the input.
            outputs: what the network gives: ``"logits"``, ``"probabilities"``, ``"log_probabilities"`` or values.
            class_dim: where the classes are in ``[N, ...]``.
            select: which tensor of the output it is about, by its path or by a function.
            keep: whether to keep what every member says, in ``samples`` ``[K, N, ...]``.

        Returns:
            The prediction, in which one pass is one member.

        Raises:
            ValueError: for a loader without batches, and outputs that are not numbers.

        Example:
            >>> import torch, vardrop as vd
            >>> ensemble = vd.Ensemble(torch.nn.Linear(4, 3), members=5)
            >>> prediction = ensemble.predict(torch.randn(7, 4), "logits")
            >>> prediction.samples.shape, prediction.mutual_information.shape
            (torch.Size([5, 7, 3]), torch.Size([7]))
        """
        from vardrop.prediction.moments import Collector, Summary, check_numbers, joined
        from vardrop.prediction.prediction import Prediction, beside
        from vardrop.prediction.structure import device_of, is_batches, moved, named, of_loader, single

        main, whole = "output", dict[str, list[Summary]]()
        with _evaluating(self), torch.no_grad():
            for call in map(of_loader, x) if is_batches(x, "Ensemble.predict") else [single(x)]:
                args, kwargs = moved(call, device_of(self.modules()))
                main, found = named(self(*args, **kwargs), select)
                for name, tensor in found.items():
                    collector = Collector(outputs if name == main else None, class_dim, keep)
                    collector.add(tensor)
                    whole.setdefault(name, []).append(collector.summary())
                check_numbers(whole[main][-1].mean, "Ensemble.predict")
        if not whole:
            raise ValueError("vardrop.Ensemble: predict needs a batch or more, got a loader that has none")
        others, left_off = beside(whole, main, self.size)
        return Prediction(
            joined(whole[main]), self.size, outputs, class_dim, engine="loop" if self.fallback else "vmap",
            chunk=self.size, reason=self.fallback or "", name=main, sources=(f"{self.size} members",), outputs=others,
            left_off=left_off,
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"members={self.size}"

    def __len__(self) -> int:
        return self.size

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Parameters and buffers by name, all with K in front."""
        parameters = dict(self.stacked.named_parameters())
        if parameters.keys() != self._names:
            raise RuntimeError(
                "vardrop.Ensemble: an ensemble must keep the parameters that it was made with, got "
                f"{', '.join(sorted(parameters.keys() ^ self._names))} added or gone; vd.convert_ the model before "
                "vd.Ensemble(model), or its members() after"
            )
        shared = shared_buffers(self.stacked)
        return dict(parameters), {n: b for n, b in self.stacked.named_buffers() if id(b) not in shared}

    def _check_per_member(self, values: Sequence[Any]) -> None:
        wrong = [tuple(v.shape) for v in values if isinstance(v, Tensor) and (v.ndim == 0 or len(v) != self.size)]
        if wrong:
            raise ValueError(
                f"vardrop.Ensemble: with per_member=True every tensor must have {self.size} members in front, got "
                f"shape {wrong[0]}; leave per_member out to give all members the same"
            )


def _stacked(outputs: Sequence[Any]) -> Any:
    """Outputs of the members, of any structure, with one more axis in front."""
    first = outputs[0]
    if isinstance(first, Tensor):
        return torch.stack(list(outputs))
    if isinstance(first, Mapping):
        return type(first)(**{key: _stacked([out[key] for out in outputs]) for key in first})
    if isinstance(first, tuple | list):
        entries = [_stacked(entry) for entry in zip(*outputs, strict=True)]
        return type(first)(*entries) if hasattr(first, "_fields") else type(first)(entries)
    return first


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the block; every module's own flag afterwards."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, flag in flags:
            module.training = flag
