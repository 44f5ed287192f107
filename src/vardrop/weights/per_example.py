"""A weight of its own for every example: the estimator that the local trick is measured against.

The examples are walked over in chunks. Nothing of a chunk is kept for the backward pass, which draws the same weights
again: 1000 examples of a 1000 x 1000 layer would be 4 GB of weights.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vardrop.second_order import graph_wanted
from vardrop.weights.linear_ops import Examples, LinearOp
from vardrop.weights.noise import add_noise

_AT_ONCE = 1 << 20  # entries of sampled weights held at once: about what the cache of a CPU holds

Inputs = tuple[Tensor, ...]


def per_example(
    op: LinearOp,
    examples: Examples,
    loc: Tensor,
    variance: Tensor,
    generator: torch.Generator | None,
    chunk: int | None,
) -> Tensor:
    """y for a fresh weight of N(loc, variance) for every example; ``chunk`` examples at once, None to choose."""
    walk = _Walk(op, examples, chunk or max(1, _AT_ONCE // max(1, loc.numel())))
    if walk.in_one or not torch.is_grad_enabled() or _cannot_recompute():
        y = walk.run(op.inputs, loc, variance, generator)
    else:
        where = torch.device("cpu") if generator is None else generator.device
        seed = int(torch.randint(2**62, (), generator=generator, device=where))
        y = _Recomputed.apply(walk, seed, loc, variance, *op.inputs)
    return op.plus_bias(y)


def _cannot_recompute() -> bool:
    """Compilers decide by themselves what to keep, and torch.func transforms must see every operation."""
    return torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None


class _Walk:
    """The chunks of an operation's examples, and what is done with one."""

    def __init__(self, op: LinearOp, examples: Examples, chunk: int) -> None:
        self.op, self.chunk = op, chunk
        *self.axes, y_axis = examples
        self.y_axis = y_axis or 0
        self.first = next(axis for axis in self.axes if axis is not None)
        self.total = op.inputs[0].shape[self.first]

    @property
    def in_one(self) -> bool:
        return self.total <= self.chunk

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for start in range(0, max(self.total, 1), self.chunk):
            yield start, min(self.chunk, self.total - start)

    def cut(self, inputs: Inputs, start: int, length: int) -> Inputs:
        return tuple(
            x if axis is None else x.narrow(axis, start, length) for x, axis in zip(inputs, self.axes, strict=True)
        )

    def part(self, inputs: Inputs, loc: Tensor, variance: Tensor, generator: torch.Generator | None) -> Tensor:
        """The operation on the examples of one chunk, each with a weight of its own."""
        count = inputs[0].shape[self.first]
        if count <= 1:
            return self.op.run(inputs, add_noise(loc, variance, generator), False)
        shape = (count, *loc.shape)
        w = add_noise(loc.expand(shape), variance.expand(shape), generator)
        if self.op.each is not None:
            return self.op.each(inputs, w)
        one = torch.vmap(lambda x, w: self.op.run(x, w, False), in_dims=(tuple(self.axes), 0), out_dims=self.y_axis)
        return one(inputs, w)

    def run(self, inputs: Inputs, loc: Tensor, variance: Tensor, generator: torch.Generator | None) -> Tensor:
        """The operation on all examples."""
        parts = (self.part(self.cut(inputs, *piece), loc, variance, generator) for piece in self)
        if self.in_one:
            return next(parts)
        if torch.is_grad_enabled() or _cannot_recompute():
            return torch.cat(list(parts), self.y_axis)
        y: Tensor | None = None  # filled in place: small results between large blocks would leave a heap full of holes
        for (start, length), part in zip(self, parts, strict=True):
            if y is None:
                y = part.new_empty(
                    [self.total if i == self.y_axis % part.ndim else n for i, n in enumerate(part.shape)]
                )
            y.narrow(self.y_axis, start, length).copy_(part)
        return y if y is not None else next(parts)


class _Recomputed(torch.autograd.Function):
    """A walk that keeps its seed and nothing else; gradients are added up in place, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, walk: _Walk, seed: int, loc: Tensor, variance: Tensor, *inputs: Tensor) -> Tensor:
        ctx.walk, ctx.seed = walk, seed
        ctx.save_for_backward(loc, variance, *inputs)
        ctx.autocast = torch.is_autocast_enabled(loc.device.type), torch.get_autocast_dtype(loc.device.type)
        return walk.run(inputs, loc, variance, torch.Generator(loc.device).manual_seed(seed))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        walk: _Walk = ctx.walk
        loc, variance, *inputs = ctx.saved_tensors
        wanted = ctx.needs_input_grad[2:]
        if graph_wanted():
            return None, None, *_with_a_graph(ctx, grad, wanted)
        sums = [torch.zeros_like(x) if need else None for x, need in zip((loc, variance, *inputs), wanted, strict=True)]
        generator = torch.Generator(loc.device).manual_seed(ctx.seed)
        enabled, dtype = ctx.autocast
        axes = (None, None, *walk.axes)
        for start, length in walk:
            cut = (loc, variance, *walk.cut(tuple(inputs), start, length))
            with torch.enable_grad(), torch.autocast(loc.device.type, dtype=dtype, enabled=enabled):
                leaves = [x.detach().requires_grad_(need) for x, need in zip(cut, wanted, strict=True)]
                y = walk.part(tuple(leaves[2:]), leaves[0], leaves[1], generator)
            into = [leaf for leaf, need in zip(leaves, wanted, strict=True) if need]
            found = iter(torch.autograd.grad(y, into, grad.narrow(walk.y_axis, start, length)))
            for total, axis in zip(sums, axes, strict=True):
                if total is not None:
                    (total if axis is None else total.narrow(axis, start, length)).add_(next(found))
        return None, None, *sums


def _with_a_graph(ctx: Any, grad: Tensor, wanted: tuple[bool, ...]) -> list[Tensor | None]:
    """The gradients of a walk that keeps everything, so that they can be differentiated again."""
    walk: _Walk = ctx.walk
    loc, variance, *inputs = ctx.saved_tensors
    enabled, dtype = ctx.autocast
    with torch.autocast(loc.device.type, dtype=dtype, enabled=enabled):
        y = walk.run(tuple(inputs), loc, variance, torch.Generator(loc.device).manual_seed(ctx.seed))
    into = [x for x, need in zip((loc, variance, *inputs), wanted, strict=True) if need]
    found = iter(torch.autograd.grad(y, into, grad, create_graph=True))
    return [next(found) if need else None for need in wanted]
