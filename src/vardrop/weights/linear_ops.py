"""The operations that are linear in a weight, each described in the same few words.

Legend: x input, w weight, y output. Axes of x and y are counted from the end where the operation does so.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from vardrop.products import linear
from vardrop.weights.noise import square

Examples = tuple[int | None, ...]
Run = Callable[[tuple[Tensor, ...], Tensor, bool], Tensor]


@dataclass(frozen=True)
class LinearOp:
    """One call of an operation that is linear in its weight, with the weight's place left open.

    Args:
        weight: the operand in the weight's place.
        inputs: every operand but weight and bias; the first is the x that input noise is put on.
        run: ``run(inputs, w, biased)`` carries the operation out, with its bias or without.
        bias: what the bias adds to y, shaped to broadcast with it; None if there is none.
        x_axes: weight axis -> axis of the first input that it is contracted with.
        y_axes: weight axis -> axis of y that it makes.
        examples: for each input its axis of independent examples (None: it has none), and last that of y;
            None if x is a single example.
        indexed: whether x holds indices into the weight instead of values.
        function: the torch function itself, where somebody has a faster way for it.
        each: like ``run`` without a bias, but w has one more axis in front, an entry for every example.
    """

    weight: Any
    inputs: tuple[Tensor, ...]
    run: Run
    bias: Tensor | None = None
    x_axes: Mapping[int, int] = field(default_factory=dict)
    y_axes: Mapping[int, int] = field(default_factory=dict)
    examples: Examples | None = None
    indexed: bool = False
    function: Any = None
    each: Callable[[tuple[Tensor, ...], Tensor], Tensor] | None = None

    def mean(self, w: Tensor) -> Tensor:
        return self.run(self.inputs, w, True)

    def plus_bias(self, y: Tensor) -> Tensor:
        """y and the bias, of y's type: under autocast the bias may be of a wider one."""
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def variance(self, v: Tensor) -> Tensor:
        """The operation on squared inputs and the weights' variances, without the bias: Var y (eq. 6)."""
        inputs = self.inputs if self.indexed else tuple(square(x) for x in self.inputs)
        return self.run(inputs, v, False)


def _examples(x: Tensor, plain_ndim: int, inputs: int = 1) -> Examples | None:
    """Axis 0 of everything, if x has one more axis than a single example would."""
    return (0,) * (inputs + 1) if x.ndim > plain_ndim else None


def _linear(input: Tensor, weight: Any, bias: Tensor | None = None) -> LinearOp | None:
    def run(inputs: tuple[Tensor, ...], w: Tensor, biased: bool) -> Tensor:
        return linear(inputs[0], w, bias if biased else None)

    if weight.ndim != 2:
        return None
    return LinearOp(weight, (input,), run, bias, {1: -1}, {0: -1}, _examples(input, 1), function=F.linear)


def _conv(function: Callable[..., Tensor], dims: int, transposed: bool) -> Callable[..., LinearOp]:
    def describe(input: Tensor, weight: Any, bias: Tensor | None = None, *args: Any, **kwargs: Any) -> LinearOp:
        def run(inputs: tuple[Tensor, ...], w: Tensor, biased: bool) -> Tensor:
            return function(inputs[0], w, bias if biased else None, *args, **kwargs)

        channels = -(dims + 1)
        x_axis, y_axis = (0, 1) if transposed else (1, 0)
        shaped = None if bias is None else bias.view(-1, *[1] * dims)
        examples = _examples(input, dims + 1)
        return LinearOp(weight, (input,), run, shaped, {x_axis: channels}, {y_axis: channels}, examples)

    return describe


def _embedding(
    input: Tensor,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> LinearOp:
    if max_norm is not None:
        raise ValueError(
            f"vardrop: an embedding with max_norm={max_norm} rewrites its weight in place and cannot have a random "
            "one; leave it out of convert_ or set max_norm=None"
        )

    bias = None
    if padding_idx is not None:  # its row is a constant, without noise or gradient: part of the bias
        padding_idx %= weight.shape[0]
        bias = weight.loc[padding_idx].detach() * (input == padding_idx).unsqueeze(-1)

    def run(inputs: tuple[Tensor, ...], w: Tensor, biased: bool) -> Tensor:
        y = F.embedding(inputs[0], w, padding_idx, None, norm_type, scale_grad_by_freq, sparse)
        if padding_idx is None:
            return y
        y = y.masked_fill((inputs[0] == padding_idx).unsqueeze(-1), 0.0)
        return y + bias if biased and bias is not None else y

    return LinearOp(weight, (input,), run, bias, {0: 0}, {1: -1}, _examples(input, 0), indexed=True)


def _bilinear(input1: Tensor, input2: Tensor, weight: Any, bias: Tensor | None = None) -> LinearOp:
    def run(inputs: tuple[Tensor, ...], w: Tensor, biased: bool) -> Tensor:
        return F.bilinear(inputs[0], inputs[1], w, bias if biased else None)

    def each(inputs: tuple[Tensor, ...], w: Tensor) -> Tensor:  # vmap has no rule for F.bilinear
        return torch.einsum("n...i,noij,n...j->n...o", inputs[0], w, inputs[1]).to(inputs[0].dtype)

    return LinearOp(weight, (input1, input2), run, bias, {1: -1}, {0: -1}, _examples(input1, 1, inputs=2), each=each)


def _right(x: Tensor, w: Any) -> tuple[dict[int, int], dict[int, int], Examples | None]:
    """Axes of x @ w."""
    return {w.ndim - 2: -1}, {w.ndim - 1: -1}, _examples(x, 1 if w.ndim == 2 else w.ndim)


def _left(w: Any, x: Tensor) -> tuple[dict[int, int], dict[int, int], Examples | None]:
    """Axes of w @ x, where the columns of a matrix x are its examples."""
    axis = -1 if x.ndim == 1 else -2
    examples = (1, 1) if w.ndim == x.ndim == 2 else _examples(x, w.ndim)
    return {w.ndim - 1: axis}, {w.ndim - 2: axis}, examples


def _matmul(input: Any, other: Any) -> LinearOp | None:
    weight_first = not isinstance(input, Tensor)
    w, x = (input, other) if weight_first else (other, input)
    if w.ndim < 2 or not isinstance(x, Tensor):
        return None

    def run(inputs: tuple[Tensor, ...], w: Tensor, biased: bool) -> Tensor:
        return torch.matmul(w, inputs[0]) if weight_first else torch.matmul(inputs[0], w)

    return LinearOp(w, (x,), run, None, *(_left(w, x) if weight_first else _right(x, w)))


def _mm(input: Any, mat2: Any) -> LinearOp | None:
    return _matmul(input, mat2)


def _addmm(input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> LinearOp | None:
    """beta * input + alpha * (mat1 @ mat2), also for batches of matrices."""
    op = _matmul(mat1, mat2) if isinstance(input, Tensor) else None
    if op is None:
        return None
    product, bias = op.run, input if beta == 1 else input * beta

    def run(inputs: tuple[Tensor, ...], w: Tensor, biased: bool) -> Tensor:
        y = product(inputs, w, False)
        return y + bias.to(y.dtype) if biased else y

    inputs = op.inputs if alpha == 1 else (op.inputs[0] * alpha,)
    return LinearOp(op.weight, inputs, run, bias, op.x_axes, op.y_axes, op.examples)


def _baddbmm(input: Any, batch1: Any, batch2: Any, *, beta: float = 1, alpha: float = 1) -> LinearOp | None:
    return _addmm(input, batch1, batch2, beta=beta, alpha=alpha)


def _einsum(equation: Any, *operands: Any) -> LinearOp | None:
    """Linear with independent terms if the weight stands once and has every letter that is summed over.

    A letter that is summed over but not the weight's would add up inputs before they meet the weight, and the square
    of a sum is not the sum of squares.
    """
    if len(operands) == 1 and isinstance(operands[0], list | tuple):
        operands = tuple(operands[0])
    if not isinstance(equation, str) or "." in equation:
        return None
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if not arrow:
        out = "".join(sorted(c for c in set(left) - {","} if left.count(c) == 1))
    at = [i for i, operand in enumerate(operands) if not isinstance(operand, Tensor)]
    if len(at) != 1 or len(terms) != len(operands) or len(operands) < 2 or any(len(set(t)) < len(t) for t in terms):
        return None
    letters = terms.pop(at[0])
    if set("".join(terms)) - set(out) - set(letters):
        return None
    inputs = operands[: at[0]] + operands[at[0] + 1 :]

    def run(inputs: tuple[Tensor, ...], w: Tensor, biased: bool) -> Tensor:
        return torch.einsum(f"{','.join([*terms, letters])}->{out}", *inputs, w)

    def each(inputs: tuple[Tensor, ...], w: Tensor) -> Tensor:
        return torch.einsum(f"{','.join([*terms, terms[0][0] + letters])}->{out}", *inputs, w)

    example = terms[0][:1]
    free = bool(example) and example not in letters and example in out
    examples = (*(t.find(example) if example in t else None for t in terms), out.index(example)) if free else None
    x_axes = {letters.index(c): i for i, c in enumerate(terms[0]) if c in letters}
    y_axes = {letters.index(c): i for i, c in enumerate(out) if c in letters and c not in "".join(terms)}
    return LinearOp(operands[at[0]], inputs, run, None, x_axes, y_axes, examples, each=each)


DESCRIBE: dict[Callable[..., Any], Callable[..., LinearOp | None]] = {
    F.linear: _linear,
    F.conv1d: _conv(F.conv1d, 1, transposed=False),
    F.conv2d: _conv(F.conv2d, 2, transposed=False),
    F.conv3d: _conv(F.conv3d, 3, transposed=False),
    F.conv_transpose1d: _conv(F.conv_transpose1d, 1, transposed=True),
    F.conv_transpose2d: _conv(F.conv_transpose2d, 2, transposed=True),
    F.conv_transpose3d: _conv(F.conv_transpose3d, 3, transposed=True),
    F.embedding: _embedding,
    F.bilinear: _bilinear,
    torch.matmul: _matmul,
    torch.mm: _mm,
    torch.bmm: _mm,
    Tensor.matmul: _matmul,
    Tensor.mm: _mm,
    Tensor.bmm: _mm,
    torch.addmm: _addmm,
    torch.baddbmm: _baddbmm,
    Tensor.addmm: _addmm,
    Tensor.baddbmm: _baddbmm,
    torch.einsum: _einsum,
}
