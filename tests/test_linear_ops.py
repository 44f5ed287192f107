"""Every operation of the table, called in every way torch allows, against whole weights in the plain operation."""

# ruff: noqa: B008 - operands are drawn once, where their call is written
from __future__ import annotations

from collections.abc import Callable
from copy import copy
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import jacrev, vmap
from torch.nn import functional as F

import vardrop as vd
from contract import assert_close_to, assert_mean, assert_moments
from vardrop.weights.linear_ops import DESCRIBE
from vardrop.weights.random_kinds import CorrelatedWeight, IndependentWeight

pytestmark = pytest.mark.filterwarnings("ignore:.*batching rule for aten..(_tri|bi)linear:UserWarning")
SAMPLES = 3000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


_generator = torch.Generator().manual_seed(0)


def r(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=_generator)


def random_weight(*shape: int) -> IndependentWeight:
    return IndependentWeight(r(*shape), torch.rand(*shape, dtype=torch.float64))


# name -> (weight shape, call with a weight in its place, axis of examples in y or None if there is one example)
Call = Callable[[Any], Tensor]
X23, X35, B25 = r(2, 3), r(3, 5), r(2, 5)
T = torch.tensor([[0, 3], [1, 1], [2, 0]])
CALLS: dict[str, tuple[tuple[int, ...], Call, int | None]] = {
    "linear": ((5, 3), lambda w, x=r(2, 3), b=r(5): F.linear(x, w, b), 0),
    "linear keywords": ((5, 3), lambda w, x=r(2, 3), b=r(5): F.linear(input=x, weight=w, bias=b), 0),
    "linear one example": ((5, 3), lambda w, x=r(3): F.linear(x, w), None),
    "linear 4d": ((4, 3), lambda w, x=r(2, 1, 2, 3): F.linear(x, w), 0),
    "conv1d": ((2, 2, 2), lambda w, x=r(2, 2, 4), b=r(2): F.conv1d(x, w, b), 0),
    "conv1d one example": ((2, 2, 2), lambda w, x=r(2, 4), b=r(2): F.conv1d(x, w, b), None),
    "conv1d same": ((2, 2, 3), lambda w, x=r(2, 2, 4): F.conv1d(x, w, padding="same"), 0),
    "conv2d everything": (
        (4, 1, 2, 2),
        lambda w, x=r(2, 2, 4, 5), b=r(4): F.conv2d(x, w, b, (1, 2), (1, 0), (2, 1), 2),
        0,
    ),
    "conv2d keywords": (
        (2, 2, 2, 1),
        lambda w, x=r(2, 2, 3, 2), b=r(2): F.conv2d(x, weight=w, bias=b, stride=2, padding=1),
        0,
    ),
    "conv3d": ((2, 1, 1, 2, 2), lambda w, x=r(2, 2, 2, 2, 3), b=r(2): F.conv3d(x, w, b, groups=2), 0),
    "conv_transpose1d": (
        (2, 2, 3),
        lambda w, x=r(2, 2, 2), b=r(2): F.conv_transpose1d(x, w, b, stride=2, padding=1, output_padding=1),
        0,
    ),
    "conv_transpose2d": (
        (4, 1, 2, 2),
        lambda w, x=r(2, 4, 2, 1), b=r(2): F.conv_transpose2d(x, w, b, 1, 0, 0, 2, (2, 1)),
        0,
    ),
    "conv_transpose3d": ((2, 1, 2, 1, 2), lambda w, x=r(2, 2, 1, 2, 1): F.conv_transpose3d(x, w, stride=(1, 2, 1)), 0),
    "embedding": ((4, 3), lambda w: F.embedding(T, w), 0),
    "embedding padding": ((4, 3), lambda w: F.embedding(T, w, padding_idx=1), 0),
    "embedding padding from the end": ((4, 3), lambda w: F.embedding(T, w, padding_idx=-4), 0),
    "embedding one index": ((4, 3), lambda w: F.embedding(torch.tensor(2), w), None),
    "rows": ((4, 3), lambda w: w[T], 0),
    "rows from the end": ((4, 3), lambda w: w[torch.tensor([-1, 0, -4])], 0),
    "bilinear": ((3, 2, 4), lambda w, x=r(2, 2), y=r(2, 4), b=r(3): F.bilinear(x, y, w, b), 0),
    "bilinear one example": ((3, 2, 4), lambda w, x=r(2), y=r(4): F.bilinear(x, y, w), None),
    "matmul": ((3, 5), lambda w: torch.matmul(X23, w), 0),
    "matmul keyword": ((3, 5), lambda w: torch.matmul(X23, other=w), 0),
    "@": ((3, 5), lambda w: X23 @ w, 0),
    "vector @": ((3, 5), lambda w, x=r(3): x @ w, None),
    "batch @": ((3, 4), lambda w, x=r(2, 2, 3): x @ w, 0),
    "left @": ((2, 3), lambda w: w @ X35, 1),
    "left @ vector": ((2, 3), lambda w, x=r(3): w @ x, None),
    "left @ batch": ((2, 3), lambda w, x=r(2, 3, 2): w @ x, 0),
    "batched weight @": ((2, 3, 2), lambda w, x=r(2, 2, 3): x @ w, None),
    "batched weight, examples in front": ((2, 3, 2), lambda w, x=r(3, 2, 1, 3): x @ w, 0),
    "left batched weight": ((2, 2, 3), lambda w, x=r(2, 3, 2): w @ x, None),
    "left batched weight, examples in front": ((2, 2, 3), lambda w, x=r(3, 2, 3, 1): w @ x, 0),
    "batched weight @ matrix": ((2, 2, 3), lambda w, x=r(3, 2): w @ x, None),
    "Tensor.matmul": ((3, 5), lambda w: X23.matmul(w), 0),
    "mm": ((3, 5), lambda w: torch.mm(X23, w), 0),
    "mm keyword": ((3, 5), lambda w: torch.mm(X23, mat2=w), 0),
    "mm left": ((2, 3), lambda w: torch.mm(w, X35), 1),
    "mm out": ((3, 5), lambda w: torch.mm(X23, w, out=X23.new_empty(0)), None),
    "Tensor.mm": ((3, 5), lambda w: X23.mm(w), 0),
    "w.mm": ((2, 3), lambda w: w.mm(X35), 1),
    "bmm": ((2, 3, 2), lambda w, x=r(2, 2, 3): torch.bmm(x, w), None),
    "bmm keyword": ((2, 3, 2), lambda w, x=r(2, 2, 3): torch.bmm(x, mat2=w), None),
    "Tensor.bmm": ((2, 3, 2), lambda w, x=r(2, 2, 3): x.bmm(w), None),
    "addmm": ((3, 5), lambda w, b=r(5): torch.addmm(b, X23, w), 0),
    "addmm scaled": ((3, 5), lambda w: torch.addmm(B25, X23, w, beta=0.5, alpha=-2), 0),
    "addmm keywords": ((3, 5), lambda w: torch.addmm(B25, mat1=X23, mat2=w, alpha=3), 0),
    "addmm left": ((2, 3), lambda w: torch.addmm(B25, w, X35, beta=2), 1),
    "Tensor.addmm": ((3, 5), lambda w: B25.addmm(X23, w, beta=2, alpha=0.5), 0),
    "baddbmm": (
        (2, 3, 2),
        lambda w, b=r(2, 2, 2), x=r(2, 2, 3): torch.baddbmm(b, x, w, beta=-1, alpha=0.5),
        None,
    ),
    "baddbmm keywords": (
        (2, 3, 2),
        lambda w, b=r(2, 2, 2), x=r(2, 2, 3): torch.baddbmm(b, batch1=x, batch2=w),
        None,
    ),
    "Tensor.baddbmm": ((2, 3, 2), lambda w, b=r(2, 2, 2), x=r(2, 2, 3): b.baddbmm(x, w), None),
    "einsum": ((3, 4), lambda w: torch.einsum("bi,io->bo", X23, w), 0),
    "einsum list": ((3, 4), lambda w: torch.einsum("bi,io->bo", [X23, w]), 0),
    "einsum implicit": ((3, 4), lambda w: torch.einsum("bi,io", X23, w), 0),
    "einsum weight first": ((4, 3), lambda w: torch.einsum("o i, b i -> o b", w, X23), 1),
    "einsum heads": ((2, 3, 4), lambda w, x=r(2, 2, 3): torch.einsum("bhi,hio->bho", x, w), 0),
    "einsum two inputs": ((3, 2, 4), lambda w, x=r(2, 3), y=r(2, 2): torch.einsum("bi,bj,ijo->bo", x, y, w), 0),
    "einsum an input without examples": (
        (3, 2, 4),
        lambda w, x=r(2, 3), y=r(2): torch.einsum("bi,j,ijo->bo", x, y, w),
        0,
    ),
    "einsum summed letter of the weight's own": ((3, 2, 4), lambda w: torch.einsum("bi,iko->bo", X23, w), 0),
}
NOT_LINEAR: dict[str, tuple[tuple[int, ...], Call]] = {
    # t is summed over and not the weight's: sum_t x_t w is one product, and its variance not a sum over t
    "einsum sums an input first": ((3, 2), lambda w, x=r(2, 4, 3): torch.einsum("bti,io->bo", x, w)),
    "einsum diagonal": ((3, 3), lambda w: torch.einsum("bi,ii->bi", X23, w)),
    "einsum ellipsis": ((3, 2), lambda w: torch.einsum("...i,io->...o", X23, w)),
    "einsum weight twice": ((2, 3), lambda w: torch.einsum("bi,bi->b", w, w)),
    "weight times itself": ((3, 3), lambda w: w @ w),
    "weight as addend": ((2, 5), lambda w: torch.addmm(w, X23, X35)),
    "elementwise": ((2, 3), lambda w: w * X23),
    "tensordot": ((3, 2), lambda w: torch.tensordot(X23, w, dims=1)),
    "mv": ((2, 3), lambda w, x=r(3): torch.mv(w, x)),
}


def samples(call: Call, weight: Any) -> Tensor:
    """Many calls, each with a random weight of its own, as a layer hands them out."""
    return vmap(lambda _: call(copy(weight)), randomness="different")(torch.arange(SAMPLES)).flatten(1)


def moments(call: Call, weight: IndependentWeight, estimator: str, axis: int | None) -> tuple[Tensor, Tensor]:
    """Mean and covariance of the flat output from the Jacobian of the plain operation."""
    y = call(weight.loc)
    jacobian = jacrev(call)(weight.loc).reshape(y.numel(), -1)
    covariance = jacobian * weight.variance.flatten() @ jacobian.T
    if estimator == "local":
        covariance = torch.diag(covariance.diagonal())
    elif estimator != "per_minibatch" and axis is not None:
        example = torch.arange(y.shape[axis]).view([-1 if i == axis else 1 for i in range(y.ndim)]).expand(y.shape)
        example = example.flatten()
        covariance = covariance * (example == example.unsqueeze(1))
    return y.flatten(), covariance


@pytest.mark.parametrize("estimator", ["local", "per_example", "per_minibatch", "flipout"])
@pytest.mark.parametrize("name", [name for name in CALLS if name != "mm out"])
def test_mean_and_covariance(name: str, estimator: str) -> None:
    shape, call, axis = CALLS[name]
    weight = random_weight(*shape)
    mean, covariance = moments(call, weight, estimator, axis)
    with vd.estimator(estimator):
        assert_moments(samples(call, weight), mean, covariance, f"{name}, {estimator}")
        assert call(weight).shape == call(weight.loc).shape
    with vd.estimator("none"):
        torch.testing.assert_close(call(weight), call(weight.loc))


@pytest.mark.parametrize("name", [name for name, (_, _, axis) in CALLS.items() if axis is not None])
def test_per_example_in_chunks(name: str) -> None:
    """One example at a time, two at a time, all at once: the same distribution, the same shape."""
    shape, call, axis = CALLS[name]
    weight = random_weight(*shape)
    mean, covariance = moments(call, weight, "per_example", axis)
    for chunk in (1, 2):
        with vd.estimator("per_example", chunk=chunk):
            assert_moments(samples(call, weight), mean, covariance, f"{name}, chunks of {chunk}")


def test_out_gets_a_sample() -> None:
    shape, call, _ = CALLS["mm out"]
    weight = random_weight(*shape)
    with torch.no_grad():
        y = torch.stack([call(copy(weight)).flatten() for _ in range(SAMPLES)])
    assert_moments(y, *moments(CALLS["mm"][1], weight, "per_minibatch", None), "mm with out=")


@pytest.mark.parametrize("estimator", ["local", "per_example", "flipout"])
@pytest.mark.parametrize("name", NOT_LINEAR)
def test_what_is_not_linear_gets_one_sample(name: str, estimator: str) -> None:
    """Against brute force: many whole weights through the plain operation."""
    shape, call = NOT_LINEAR[name]
    weight = random_weight(*shape)
    with vd.estimator(estimator):
        got = samples(call, weight)
    whole = weight.loc + weight.variance.sqrt() * torch.randn(SAMPLES, *shape, dtype=torch.float64)
    truth = vmap(call)(whole).flatten(1)
    assert_mean(got - truth, torch.zeros_like(truth[0]), f"{name}, mean")  # independent, so the variances add
    assert_mean(got.square() - truth.square(), torch.zeros_like(truth[0]), f"{name}, square")
    products, true_products = ((y.unsqueeze(2) * y.unsqueeze(1)) for y in (got, truth))
    assert_mean(products - true_products, torch.zeros_like(products[0]), f"{name}, products")


def test_brute_force_agrees_with_the_jacobian() -> None:
    """The truth of this file against the other truth of this file."""
    shape, call, _ = CALLS["conv2d everything"]
    weight = random_weight(*shape)
    whole = weight.loc + weight.variance.sqrt() * torch.randn(SAMPLES, *shape, dtype=torch.float64)
    assert_moments(vmap(call)(whole).flatten(1), *moments(call, weight, "per_minibatch", 0), "brute force")


def test_every_operation_of_the_table_is_called() -> None:
    called = {"linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"}
    called |= {"embedding", "bilinear", "matmul", "mm", "bmm", "addmm", "baddbmm", "einsum"}
    assert {function.__name__ for function in DESCRIBE} == called


def test_the_bias_is_never_in_the_variance() -> None:
    huge = torch.full((5,), 1e6, dtype=torch.float64)
    weight = IndependentWeight(torch.zeros(5, 3, dtype=torch.float64), torch.full((5, 3), 1e-4, dtype=torch.float64))
    for estimator in ("local", "per_example", "per_minibatch", "flipout"):
        with vd.estimator(estimator):
            assert (F.linear(X23, weight, huge) - huge).abs().max() < 1


def test_an_embedding_that_rewrites_its_weight_is_refused() -> None:
    with pytest.raises(ValueError, match=r"max_norm=1.0 rewrites its weight in place .* set max_norm=None"):
        F.embedding(T, random_weight(4, 3), max_norm=1.0)


def test_padding_row_is_exactly_its_mean_and_has_no_gradient() -> None:
    for estimator in ("local", "per_example", "per_minibatch", "flipout"):
        for make in ("independent", "correlated"):
            loc = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
            noise = torch.rand(4, 3, dtype=torch.float64).requires_grad_()
            weight = IndependentWeight(loc, noise) if make == "independent" else CorrelatedWeight(loc, noise[:, 0], 0)
            with vd.estimator(estimator):
                y = F.embedding(torch.tensor([[1, 2], [0, 1]]), weight, padding_idx=1)
            assert torch.equal(y[0, 0], loc[1])
            assert torch.equal(y[1, 1], loc[1])
            y.square().sum().backward()
            assert loc.grad[1].count_nonzero() == 0
            assert noise.grad[1].count_nonzero() == 0
            assert loc.grad[2].count_nonzero() == 3


@settings(max_examples=40, deadline=None)
@given(
    batch=st.integers(0, 4),
    inputs=st.integers(1, 5),
    outputs=st.integers(1, 5),
    tokens=st.integers(0, 3),
    bias=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
    estimator=st.sampled_from(["local", "per_example", "per_minibatch", "flipout"]),
    config=st.sampled_from(["A", "B", "mean-field"]),
    rate=st.floats(0.001, 0.5),
)
def test_any_shape_type_and_rate(
    batch: int,
    inputs: int,
    outputs: int,
    tokens: int,
    bias: bool,
    dtype: torch.dtype,
    estimator: str,
    config: str,
    rate: float,
) -> None:
    layer = torch.nn.Linear(inputs, outputs, bias=bias).to(dtype)
    vd.convert_(
        layer, vd.GaussianPosterior(std=rate) if config == "mean-field" else vd.VariationalDropout(config, rate=rate)
    )
    x = torch.randn(batch, *[tokens] * (tokens > 0), inputs, dtype=dtype, requires_grad=True)
    with vd.estimator(estimator):
        y = layer(x)
    assert y.shape == (*x.shape[:-1], outputs)
    assert y.dtype == dtype
    assert y.isfinite().all()
    y.float().square().sum().backward()
    assert x.grad.shape == x.shape
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(0, 3),
    groups=st.sampled_from([1, 2]),
    size=st.integers(2, 5),
    kernel=st.integers(1, 2),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    estimator=st.sampled_from(["local", "per_example", "per_minibatch", "flipout"]),
    transposed=st.booleans(),
    config=st.sampled_from(["A", "B"]),
)
def test_any_convolution(
    batch: int,
    groups: int,
    size: int,
    kernel: int,
    stride: int,
    padding: int,
    estimator: str,
    transposed: bool,
    config: str,
) -> None:
    kind = torch.nn.ConvTranspose2d if transposed else torch.nn.Conv2d
    layer = kind(2, 4, kernel, stride=stride, padding=min(padding, kernel - 1), groups=groups)
    x = torch.randn(batch, 2, size, size + 1)
    expected = layer(x)
    vd.convert_(layer, vd.VariationalDropout(config))
    with vd.estimator(estimator):
        assert layer(x).shape == expected.shape
    with vd.estimator("none"):
        torch.testing.assert_close(layer(x), expected)


def test_zero_rows_and_dead_units_have_no_infinite_gradient() -> None:
    x = torch.zeros(3, 4, requires_grad=True)
    layer = torch.nn.Linear(4, 2)
    vd.convert_(layer, vd.VariationalDropout(type="B"))
    layer(x).sum().backward()
    assert x.grad.isfinite().all()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.weight_log_alpha.grad.count_nonzero() == 0


@pytest.mark.parametrize("estimator", ["local", "per_example", "per_minibatch", "flipout"])
def test_float16_has_no_room_for_squares(estimator: str) -> None:
    """x^2 overflows at 256 and sigma^2 vanishes below 2e-4: neither may reach the result."""
    layer = torch.nn.Linear(4, 500)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    vd.convert_(layer, vd.GaussianPosterior(std=1e-4))
    layer.half()
    std = (0.5 * layer.weight_log_variance.float()).exp()[0, 0].item()
    x = torch.full((6, 4), 300.0, dtype=torch.float16)
    with vd.estimator(estimator):
        y = layer(x)
    assert y.dtype == torch.float16
    values = y.float().flatten()
    expected = torch.tensor((300 * std) ** 2 * 4)
    if estimator in ("local", "per_example"):  # all 3000 are independent
        squares = values.square()
        assert_close_to(squares.mean(), squares.square().mean(), expected, len(values), "float16", 1e-3)
    assert values.std().item() == pytest.approx(expected.sqrt().item(), rel=0.2)
    y.float().square().sum().backward()
    assert layer.weight_log_variance.grad.isfinite().all()
    assert layer.weight_log_variance.grad.count_nonzero()
