"""What becomes of torch's functions while noise is on: each by its handler, and all others as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch._C import _functorch as functorch
from torch._C._functorch import CVmapInterpreterPtr, RandomnessType, TransformType
from torch.nn import functional as F

from vardrop.functional import drop, times
from vardrop.masks import bernoulli
from vardrop.prediction.recurrent import packing, recurrent
from vardrop.products import linear
from vardrop.weights.random_weight import _run_body

Args = tuple[Any, ...]
Kwargs = dict[str, Any]
_MHA = F.multi_head_attention_forward
_MHA_ARGUMENTS = list(inspect.signature(_MHA).parameters)
_mha_body = _run_body(_MHA)


class Block(Protocol):
    """What the mode asks of a block that is open."""

    def has(self, module: nn.Module) -> bool:
        """Whether the module belongs to the block's model."""

    def is_on(self, module: nn.Module) -> bool:
        """Whether the block has switched the module on."""

    def saw_attention_without_dropout(self, module: nn.Module) -> None:
        """Fused attention has run without dropout for a module of the model."""


class Mode(Protocol):
    """What a handler asks of the mode that has caught a call; inside of a ``with`` it catches calls again."""

    def caller(self) -> tuple[Block, nn.Module] | None:
        """The innermost module of a block whose code is running, and its block."""

    def turns_on(self) -> bool:
        """Whether noise that is off is to be on."""

    def __enter__(self) -> Any: ...

    def __exit__(self, *exception: Any) -> None: ...


def _dropout(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The functional dropouts of torch.nn, which all arrive in the same form."""
    x, p = args[0], kwargs["p"]
    if not kwargs["training"]:
        if p == 0 or not mode.turns_on():
            return func(*args, **kwargs)
        kwargs = {**kwargs, "training": True}
    dimensions = _DIMENSIONS.get(func)
    if dimensions is None or kwargs["inplace"] or not 0 < p < 1 or not _is_plain(x):
        return func(*args, **kwargs)
    if dimensions not in (0, x.ndim) or (not torch.compiler.is_compiling() and _passes() * x.numel() < _SMALL):
        return func(*args, **kwargs)
    return _drop(x, p, range(2, dimensions))


def _drop(x: Tensor, p: float, shared: range) -> Tensor:
    """:func:`vardrop.functional.drop`; where one vmap is going on, outside of it for all samples: fewer calls."""
    transform = _transform()
    if transform is None or torch.compiler.is_compiling() or torch.is_grad_enabled() or transform.level() != 1:
        return drop(x, p, shared)
    if transform.key() != TransformType.Vmap or _randomness(transform) != RandomnessType.Different:
        return drop(x, p, shared)
    if not functorch.is_batchedtensor(x) and not x.is_contiguous():
        return drop(x, p, shared)
    stack = functorch.pop_dynamic_layer_stack()
    try:
        if functorch.is_batchedtensor(x):
            samples = functorch.get_unwrapped(x).movedim(functorch.maybe_get_bdim(x), 0)
            found = drop(samples, p, [axis + 1 for axis in shared])
        else:  # the noise makes samples of it
            sizes = [1 if axis in shared else size for axis, size in enumerate(x.shape)]
            found = times(x, *bernoulli([CVmapInterpreterPtr(transform).batchSize(), *sizes], p, x, None))
    finally:
        functorch.push_dynamic_layer_stack(stack)
    return functorch._add_batch_dim(found, 0, 1)


def _randomness(transform: Any) -> Any:
    return CVmapInterpreterPtr(transform).randomness()


_SMALL = 2048  # units, below which torch's masks cost less
_DIMENSIONS = {F.dropout: 0, F.dropout1d: 3, F.dropout2d: 4, F.dropout3d: 5}  # dimensions of a batch; 0: any


def _torch_dropout(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """torch.dropout and its relatives, (x, p, train)."""
    x, p, train = (*args, *(kwargs[name] for name in ("input", "p", "train")[len(args) :]))
    return func(x, p, bool(train) or (p > 0 and mode.turns_on()))


def _attention(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The function behind nn.MultiheadAttention, whose own body runs with the mode on."""
    given = {**dict(zip(_MHA_ARGUMENTS, args, strict=False)), **kwargs}
    if not given.get("training", True) and given["dropout_p"] > 0 and mode.turns_on():
        given["training"] = True
    if torch.compiler.is_compiling():
        return func(**given)
    with mode:
        return _mha_body(**given)


def _fused_attention(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """scaled_dot_product_attention: with dropout in plain steps where that is faster, or the only way.

    torch takes the same steps on a CPU, with slower masks, and under vmap it refuses. Without dropout it is noted who
    has called.
    """
    rate = args[4] if len(args) > 4 else kwargs.get("dropout_p", 0.0)
    if torch.compiler.is_compiling():
        return func(*args, **kwargs)
    if rate == 0:
        found = mode.caller()
        if found is not None and not found[0].is_on(found[1]):
            found[0].saw_attention_without_dropout(found[1])
    elif 0 < rate < 1 and all(map(_is_plain, args[:3])) and (args[0].device.type == "cpu" or _transform() is not None):
        return attention(*args, **kwargs)
    return func(*args, **kwargs)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """What ``scaled_dot_product_attention`` computes, one operation at a time.

    Args:
        query: ``[..., heads, queries, features]``.
        key: ``[..., heads, keys, features]``; with ``enable_gqa`` a divisor of the heads.
        value: ``[..., heads, keys, values]``; as many heads as ``key``.
        attn_mask: true where a query sees a key, or numbers to add; broadcast to ``[..., heads, queries, keys]``.
        dropout_p: rate of dropout on the attention weights.
        is_causal: whether a query sees keys up to its own place only.
        scale: of the products; 1 / √features if None.
        enable_gqa: whether several heads of queries share one of keys and values.
    """
    if enable_gqa:
        key, value = (x.repeat_interleave(query.shape[-3] // x.shape[-3], -3) for x in (key, value))
    weights = (query * (query.shape[-1] ** -0.5 if scale is None else scale)) @ key.mT
    hidden = attn_mask is not None or is_causal
    if is_causal:
        sees = torch.ones(weights.shape[-2:], dtype=torch.bool, device=weights.device).tril()
        weights = weights.masked_fill(~sees, -torch.inf)
    if attn_mask is not None:
        is_bool = attn_mask.dtype == torch.bool
        weights = weights.masked_fill(~attn_mask, -torch.inf) if is_bool else weights + attn_mask
    probabilities = torch.softmax(weights, -1)
    if hidden:  # a query that sees nothing gets nothing
        probabilities = probabilities.masked_fill((weights == -torch.inf).all(-1, keepdim=True), 0.0)
    return drop(probabilities.to(value.dtype), dropout_p) @ value


def _recurrent(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """LSTM, GRU and RNN: vmap sees one operation without anything to batch, and would draw one mask for all samples."""
    return func(*args, **kwargs) if _transform() is None else recurrent(func, args, kwargs)


def _packing(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """What stands around them where the sequences have lengths of their own."""
    return func(*args, **kwargs) if _transform() is None else packing(func, args, kwargs)


def _linear(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """The product of all passes with a weight that they share is most of the time of many models."""
    if _transform() is None or len(args) < 2 or kwargs or type(args[1]) not in (Tensor, nn.Parameter):
        return func(*args, **kwargs)
    return linear(*args)


def _fresh(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """An empty tensor under vmap, one for every sample: else a mask that is drawn in place could not be random."""
    x = func(*args, **kwargs)
    transform = _transform()
    if transform is None or transform.key() != TransformType.Vmap or not _is_plain(x):
        return x
    if _randomness(transform) != RandomnessType.Different:
        return x
    return torch.randint(1, x.shape, dtype=x.dtype, device=x.device, requires_grad=x.requires_grad)


def _passes() -> int:
    """How many passes vmap carries out at once."""
    transform = _transform()
    if transform is None or transform.key() != TransformType.Vmap:
        return 1
    return int(CVmapInterpreterPtr(transform).batchSize())


def _transform() -> Any:
    """The innermost transform of torch.func that is going on."""
    return torch._C._functorch.peek_interpreter_stack()


def _norm(mode: Mode, func: Any, args: Args, kwargs: Kwargs) -> Any:
    """Batch and instance norm keep to their running statistics where a flag is on for the sake of noise."""
    name = "training" if func is F.batch_norm else "use_input_stats"
    running = args[1] if len(args) > 1 else kwargs.get("running_mean")
    if running is not None and kwargs.get(name) and not torch.compiler.is_compiling():
        found = mode.caller()
        if found is not None and found[0].is_on(found[1]):
            kwargs = {**kwargs, name: False}
    return func(*args, **kwargs)


def _is_plain(x: Any) -> bool:
    return (
        type(x) in (Tensor, nn.Parameter)
        and (x.is_floating_point() or x.is_complex())
        and x.layout is torch.strided
        and not x.is_nested
    )


HANDLED: dict[Any, Callable[[Mode, Any, Args, Kwargs], Any]] = {
    **dict.fromkeys(
        (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout), _dropout
    ),
    **dict.fromkeys(
        (torch.dropout, torch.feature_dropout, torch.alpha_dropout, torch.feature_alpha_dropout), _torch_dropout
    ),
    _MHA: _attention,
    F.scaled_dot_product_attention: _fused_attention,
    **dict.fromkeys((torch.empty, torch.empty_like, Tensor.new_empty), _fresh),
    **dict.fromkeys((torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu), _recurrent),
    **dict.fromkeys((torch._pack_padded_sequence, torch._pad_packed_sequence), _packing),
    F.linear: _linear,
    F.batch_norm: _norm,
    F.instance_norm: _norm,
}
