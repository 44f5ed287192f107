"""LSTM, GRU and RNN under vmap, which has no rule for them: the passes become sequences of one larger batch.

torch carries out all layers and the dropout between them as one operation. Here noise enters between two calls of it,
so that what stands before the first mask still runs once for all passes.

Legend: T passes, N sequences, L steps, C features; D directions.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import TransformType

from vardrop.functional import drop
from vardrop.prediction.chunks import is_batched

Tensors = tuple[Tensor, ...]
_COMMON = ("hx", "params", "has_biases", "num_layers", "dropout", "train", "bidirectional")
_PADDED = ("input", *_COMMON, "batch_first")
_PACKED = ("data", "batch_sizes", *_COMMON)


def recurrent(func: Callable[..., Tensors], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensors:
    """What ``torch.lstm``, ``gru``, ``rnn_tanh`` and ``rnn_relu`` return, with masks of its own for every pass.

    Its law is that of the function in a loop over the passes, and without dropout so are the numbers. Gradients go
    through torch's own operation. Packed sequences keep their form.

    Args:
        func: one of the four.
        args: what it was called with, padded or packed ...
        kwargs: ... and by name.

    Returns:
        The output, and the last state of every layer and direction (LSTM: two).

    Raises:
        RuntimeError: if the weights differ from pass to pass, or if there is dropout inside of another transform of
            torch.func than vmap.

    Example:
        >>> import torch
        >>> from vardrop.prediction.recurrent import recurrent
        >>> net = torch.nn.GRU(3, 4, 2, dropout=0.5)
        >>> x, state = torch.randn(7, 1, 3), torch.zeros(2, 1, 4)
        >>> def one(_: torch.Tensor) -> torch.Tensor:
        ...     return recurrent(torch.gru, (x, state, net._flat_weights, True, 2, 0.5, True, False, False), {})[0]
        >>> passes = torch.vmap(one, randomness="different")(torch.empty(5))
        >>> passes.shape, bool((passes.std(0) > 0).all())
        (torch.Size([5, 7, 1, 4]), True)
    """
    packed = "batch_sizes" in kwargs or (len(args) > 1 and _is_integer(args[1]))
    given = {**dict(zip(_PACKED if packed else _PADDED, args, strict=False)), **kwargs}
    x, hx, layers = given["data" if packed else "input"], given["hx"], given["num_layers"]
    states = (hx,) if isinstance(hx, Tensor) else tuple(hx)
    rate = given["dropout"] if given["train"] and layers > 1 else 0.0
    if not _is_vmap():
        if rate > 0:
            raise RuntimeError(
                f"vardrop.stochastic: the dropout inside of {func.__name__} must be used under vmap or under no "
                f"transform of torch.func, got p = {rate:g} under another one; run the passes one by one"
            )
        return func(*args, **kwargs)
    about = (given["has_biases"], layers, 0.0, given["train"], given["bidirectional"])
    weights, batch_sizes = tuple(given["params"]), given.get("batch_sizes")
    if rate == 0:
        return _run(_Operation(func, *about, given.get("batch_first")), x, batch_sizes, states, weights)
    operation = _Operation(func, about[0], 1, *about[2:], given.get("batch_first"))
    each, directions = len(weights) // layers, 1 + given["bidirectional"]
    ends = []
    for layer in range(layers):
        own = slice(layer * directions, (layer + 1) * directions)
        if layer:
            x = drop(x, rate)
        part = weights[layer * each : (layer + 1) * each]
        x, *end = _run(operation, x, batch_sizes, tuple(state[own] for state in states), part)
        ends.append(end)
    return (x, *(torch.cat(state) for state in zip(*ends, strict=True)))


@dataclass(frozen=True)
class _Operation:
    """One of torch's functions, and all that it is told beside tensors."""

    func: Callable[..., Tensors]
    has_biases: bool
    layers: int
    dropout: float
    train: bool
    bidirectional: bool
    batch_first: bool | None  # None: packed

    def __call__(self, x: Tensor, batch_sizes: Tensor | None, states: Tensors, weights: Tensors) -> Tensors:
        hx = states if self.func is torch.lstm else states[0]
        about = (weights, self.has_biases, self.layers, self.dropout, self.train, self.bidirectional)
        with warnings.catch_warnings():  # on an accelerator the weights of one layer are no buffer of their own
            warnings.filterwarnings("ignore", "RNN module weights are not part of single contiguous chunk")
            if batch_sizes is not None:
                return self.func(x, batch_sizes, hx, *about)
            return self.func(x, hx, *about, self.batch_first)


def _run(operation: _Operation, x: Tensor, batch_sizes: Tensor | None, states: Tensors, weights: Tensors) -> Tensors:
    """The operation; once if nothing differs from pass to pass."""
    if _is_vmap() and any(map(is_batched, (x, *states, *weights))):
        return _Folded.apply(operation, x, batch_sizes, states, weights)
    return operation(x, batch_sizes, states, weights)


class _Folded(torch.autograd.Function):
    """The operation with a rule for vmap. Without vmap it is never called, so it needs no backward."""

    @staticmethod
    def forward(*operands: Any) -> Tensors:
        operation, *tensors = operands
        return operation(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, operation: _Operation, *operands: Any) -> tuple[Tensors, tuple[int, ...]]:
        """T passes of N sequences as one of T·N; packed, where rows of a step stand together, of N·T."""
        (x, batch_sizes, states, weights), (_, x_dim, _, state_dims, weight_dims) = operands, in_dims
        if any(dim is not None for dim in weight_dims):
            raise RuntimeError(
                f"vardrop.stochastic: the weights of {operation.func.__name__} must be the same in all passes under "
                f"vmap, got {sum(dim is not None for dim in weight_dims)} of {len(weights)} that differ; run the "
                "passes one by one"
            )
        passes, packed = info.batch_size, batch_sizes is not None
        axis = 0 if packed or operation.batch_first else 1  # of the sequences in x; in a state it is 1
        lengths = batch_sizes * passes if packed else None
        folded = tuple(
            _fold(state, dim, passes, 1, packed).contiguous() for state, dim in zip(states, state_dims, strict=True)
        )
        found = _run(operation, _fold(x, x_dim, passes, axis, packed), lengths, folded, weights)
        axes = (axis, *(1 for _ in states))
        unfolded = tuple(_unfold(y, passes, at, packed) for y, at in zip(found, axes, strict=True))
        return unfolded, tuple(at + packed for at in axes)


def packing(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What ``torch._pack_padded_sequence`` and its inverse return, which have no rule for vmap either.

    Args:
        func: one of the two.
        args: padded ``[L, N, ...]`` or ``[N, L, ...]``, or packed ``[rows, ...]``, and what torch wants beside it ...
        kwargs: ... and by name.

    Returns:
        What ``func`` returns.

    Example:
        >>> import torch
        >>> from vardrop.prediction.recurrent import packing
        >>> lengths = torch.tensor([3, 1])
        >>> def pack(x: torch.Tensor) -> torch.Tensor:
        ...     return packing(torch._pack_padded_sequence, (x, lengths, True), {})[0]
        >>> torch.vmap(pack)(torch.zeros(5, 2, 3, 4)).shape
        torch.Size([5, 4, 4])
    """
    if kwargs or not (_is_vmap() and is_batched(args[0])):
        return func(*args, **kwargs)
    return _Packing.apply(func, *args)


class _Packing(torch.autograd.Function):
    """Packing moves whole rows, so that the passes can be a part of them."""

    @staticmethod
    def forward(func: Callable[..., Any], *args: Any) -> Any:
        return func(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        """Nothing is kept."""

    @staticmethod
    def vmap(info: Any, in_dims: Any, func: Callable[..., Any], x: Tensor, *rest: Any) -> tuple[Any, Any]:
        packs = func is torch._pack_padded_sequence
        found = packing(func, (x.movedim(in_dims[1], 2 if packs else 1), *rest), {})
        return found, ((1, None) if packs else (2, None))


def _fold(x: Tensor, dim: int | None, passes: int, axis: int, after: bool) -> Tensor:
    """The passes, in ``dim`` or the same for all, made a part of an axis: its outer one, or its inner one ``after``."""
    at = axis + after
    x = x.unsqueeze(at).expand(*x.shape[:at], passes, *x.shape[at:]) if dim is None else x.movedim(dim, at)
    return x.flatten(axis, axis + 1)


def _unfold(x: Tensor, passes: int, axis: int, after: bool) -> Tensor:
    """The passes as an axis of their own again, where :func:`_fold` had put them."""
    own = x.shape[axis] // passes
    return x.unflatten(axis, (own, passes) if after else (passes, own))


def _is_vmap() -> bool:
    """Whether the innermost transform of torch.func is vmap."""
    transform = torch._C._functorch.peek_interpreter_stack()
    return transform is not None and transform.key() == TransformType.Vmap


def _is_integer(x: Any) -> bool:
    return isinstance(x, Tensor) and not x.is_floating_point()
