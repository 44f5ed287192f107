"""What code may do to a weight that is a random variable: views, descriptions, refusals, samples."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.nn import functional as F

import vardrop as vd
from contract import assert_mean, assert_moments
from vardrop.weights.random_kinds import CorrelatedWeight, IndependentWeight
from vardrop.weights.random_weight import RandomWeight

SAMPLES = 3000


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def independent(*shape: int) -> IndependentWeight:
    return IndependentWeight(torch.randn(*shape, dtype=torch.float64), torch.rand(*shape, dtype=torch.float64))


def correlated(*shape: int, axis: int = 1) -> CorrelatedWeight:
    return CorrelatedWeight(
        torch.randn(*shape, dtype=torch.float64), torch.rand(shape[axis], dtype=torch.float64), axis
    )


def draws(weight: RandomWeight) -> Tensor:
    return vmap(lambda _: weight.sample(), randomness="different")(torch.arange(SAMPLES)).flatten(1)


def assert_same_distribution(view: RandomWeight, samples_of_whole: Tensor, what: str) -> None:
    """Means, variances and covariances of a view's samples and of the same view of the whole weight's samples."""
    got, truth = draws(view), samples_of_whole.flatten(1)
    assert_mean(got - truth, torch.zeros_like(truth[0]), f"{what}, mean")
    got, truth = got - view.loc.flatten(), truth - view.loc.flatten()
    products, true_products = (y.unsqueeze(2) * y.unsqueeze(1) for y in (got, truth))
    assert_mean(products - true_products, torch.zeros_like(products[0]), f"{what}, covariance")


VIEWS = {
    "t": lambda w: w.t(),
    "torch.t": torch.t,
    "T": lambda w: w.T,
    "mT": lambda w: w.mT,
    "transpose": lambda w: w.transpose(0, 1),
    "transpose from the end": lambda w: torch.transpose(w, -1, 0),
    "swapaxes": lambda w: w.swapaxes(axis0=0, axis1=1),
    "adjoint": lambda w: w.adjoint(),
    "slice": lambda w: w[1:3],
    "slices": lambda w: w[:, 1:],
    "both": lambda w: w[::2, :2],
    "chunk": lambda w: w.chunk(2)[1],
    "chunk 1": lambda w: w.chunk(2, dim=1)[0],
    "split": lambda w: torch.split(w, 3)[0],
    "split -1": lambda w: w.split([1, 2], -1)[1],
    "narrow": lambda w: w.narrow(0, 1, 2),
    "contiguous": lambda w: w.contiguous(),
    "clone": lambda w: w.clone(),
    "double": lambda w: w.double(),
}
ONLY_INDEPENDENT = {
    "view": lambda w: w.view(2, 6),
    "reshape": lambda w: w.reshape(-1),
    "flatten": lambda w: w.flatten(),
    "permute": lambda w: w.permute(1, 0),
    "unsqueeze": lambda w: w.unsqueeze(0),
    "unbind": lambda w: w.unbind(1)[2],
    "iteration": lambda w: list(w)[1],
    "select": lambda w: w.select(0, 3),
    "unflatten": lambda w: w.unflatten(0, (2, 2)),
}


@pytest.mark.parametrize("name", [*VIEWS, *ONLY_INDEPENDENT])
def test_views_of_independent_weights(name: str) -> None:
    weight, view = independent(4, 3), {**VIEWS, **ONLY_INDEPENDENT}[name]
    seen = view(weight)
    assert isinstance(seen, IndependentWeight)
    assert torch.equal(seen.loc, view(weight.loc))
    assert torch.equal(seen.variance, view(weight.variance))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("name", VIEWS)
def test_views_of_correlated_weights(name: str, axis: int) -> None:
    """The rows of the view share the factors that they shared in the whole; a cut through the units is one sample."""
    weight, view = correlated(4, 3, axis=axis), VIEWS[name]
    seen = view(weight)
    if isinstance(seen, Tensor):
        assert name.split()[0] in ("chunk", "split", "narrow")  # they cut the axis of the units
        return
    assert torch.equal(seen.loc, view(weight.loc))
    whole = torch.stack([view(w) for w in draws(weight).view(SAMPLES, 4, 3)])
    assert_same_distribution(seen, whole, f"{name}, axis {axis}")


@pytest.mark.parametrize("name", ONLY_INDEPENDENT)
def test_other_views_of_correlated_weights_are_samples(name: str) -> None:
    weight, view = correlated(4, 3), ONLY_INDEPENDENT[name]
    seen = vmap(lambda _: view(copy(weight)), randomness="different")(torch.arange(SAMPLES)).flatten(1)
    whole = torch.stack([view(w).flatten() for w in draws(weight).view(SAMPLES, 4, 3)])
    assert_mean(seen - whole, torch.zeros_like(whole[0]), "mean")
    assert_mean(seen.square() - whole.square(), torch.zeros_like(whole[0]), "square")


@pytest.mark.parametrize("make", [independent, correlated])
@pytest.mark.parametrize("name", [*VIEWS, *ONLY_INDEPENDENT])
def test_a_view_is_a_view_of_the_one_sample(name: str, make: Callable[..., RandomWeight]) -> None:
    """Whichever is drawn first: the weight, the view, or a view of the view."""
    view = {**VIEWS, **ONLY_INDEPENDENT}[name]
    for first in (lambda w, v: w.drawn(), lambda w, v: v + 0, lambda w, v: v.clone() * 1):
        weight = make(4, 3)
        seen = view(weight)
        first(weight, seen)
        assert torch.equal(seen + 0, view(weight.drawn()))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("estimator", ["per_minibatch", "none"])
def test_one_weight_for_the_whole_batch_however_it_is_used(estimator: str, axis: int) -> None:
    x = torch.randn(5, 3, dtype=torch.float64)
    with vd.estimator(estimator):
        for weight in (independent(4, 3), correlated(4, 3, axis=axis)):
            y = F.linear(x, weight)
            assert torch.equal(y, F.linear(x, weight))
            torch.testing.assert_close(y, F.linear(x, weight.t().t()))
            torch.testing.assert_close(y, x @ weight.t())
            torch.testing.assert_close(y, x @ (weight * 1).T)  # the sample
            torch.testing.assert_close(y, torch.cat([F.linear(x, part) for part in weight.chunk(2)], 1))
    words = torch.tensor([[0, 2], [3, 0]])
    with vd.estimator(estimator):
        table = correlated(4, 3, axis=axis)
        torch.testing.assert_close(F.embedding(words, table), (table * 1)[words])
    a, b = correlated(4, 3), correlated(4, 3)
    with vd.estimator("per_minibatch"):
        assert not torch.allclose(F.linear(x, a) / F.linear(x, a.loc), F.linear(x, b) / F.linear(x, b.loc))


@pytest.mark.parametrize("dims", [(0, 1), (1, 2), (-1, -3)])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_transposing_three_axes(dims: tuple[int, int], axis: int) -> None:
    weight = correlated(2, 3, 4, axis=axis)
    view = weight.transpose(*dims)
    assert view.loc.shape[view.axis] == len(weight.std)
    assert torch.equal(view.loc, weight.loc.transpose(*dims))
    turned = weight.adjoint()  # the last two axes
    assert turned.loc.shape[turned.axis] == len(weight.std)


def test_correlated_structure() -> None:
    """Entries of one unit share a factor; those of others are independent: the covariance of eq. 11."""
    weight = correlated(4, 3)
    unit = torch.arange(3).repeat(4)
    theta = weight.loc.flatten()
    covariance = theta.unsqueeze(0) * theta.unsqueeze(1) * (unit == unit.unsqueeze(1)) * weight.std[unit].square()
    assert_moments(draws(weight), theta, covariance, "correlated")


def test_tied_to_the_output() -> None:
    """An embedding [words, features] whose rows are scaled, used again as the last layer: units are its outputs."""
    weight, x = correlated(5, 3, axis=0), torch.randn(2, 3, dtype=torch.float64)
    logits = x @ weight.loc.T
    bias = torch.randn(5, dtype=torch.float64)
    for estimator in ("local", "per_example", "flipout", "per_minibatch"):
        with vd.estimator(estimator):
            one = lambda _: F.linear(x, copy(weight), bias)  # noqa: E731
            y = vmap(one, randomness="different")(torch.arange(SAMPLES)).flatten(1)
        directions = torch.diag_embed(logits * weight.std)  # [2, 5, 5]
        covariance = torch.block_diag(*(d @ d.T for d in directions))
        if estimator == "per_minibatch":
            flat = directions.flatten(0, 1)
            covariance = flat @ flat.T
        assert_moments(y, (logits + bias).flatten(), covariance, estimator)


def test_casts_keep_the_variance() -> None:
    """To float16 the mean is cast; its variance, which float16 has no room for, stays as wide as it was."""
    weight = IndependentWeight(torch.ones(2, 3), torch.full((2, 3), 1e-10))
    for half in (weight.half(), weight.to(torch.float16), weight.type_as(torch.ones(1, dtype=torch.float16))):
        assert half.dtype == torch.float16
        assert half.variance.dtype == torch.float32
        assert half.variance.min() > 0
    assert weight.double().variance.dtype == torch.float64
    assert weight.bfloat16().variance.dtype == torch.bfloat16
    assert correlated(2, 3).half().loc.dtype == torch.float16
    y = F.linear(torch.full((4, 3), 300.0, dtype=torch.float16), weight.half())
    assert y.dtype == torch.float16
    assert y.isfinite().all()


def test_descriptions() -> None:
    for weight in (independent(4, 3), correlated(4, 3)):
        assert weight.shape == (4, 3)
        assert weight.size(0) == len(weight) == 4
        assert weight.ndim == weight.dim() == 2
        assert weight.numel() == 12
        assert weight.dtype == torch.float64
        assert weight.device == torch.device("cpu")
        assert not weight.is_cuda
        assert not weight.requires_grad
        assert repr(weight).endswith("(shape=(4, 3), dtype=torch.float64, device=cpu)")


def test_arithmetic_is_on_samples() -> None:
    weight, one = independent(3, 3), torch.ones(3, 3, dtype=torch.float64)
    results = {
        "+": weight + 1 - weight.loc, "1 +": 1 + weight, "-": weight - one, "1 -": 1 - weight, "*": weight * 2,
        "2 *": 2 * weight, "/": weight / 2, "1 /": 1 / weight, "**": weight**2, "-w": -weight, "abs": abs(weight),
        "tensor *": one * weight, "sum": weight.sum(), "norm": torch.linalg.norm(weight), "<": weight < one,
        "==": weight == one, "mask": weight[weight.loc > 0], "none": weight[None], "one row": weight[0],
    }  # fmt: skip
    for name, result in results.items():
        assert isinstance(result, Tensor | IndependentWeight), name
    assert not torch.equal(weight + 0, weight.sample())
    with vd.estimator("none"):
        assert torch.equal(weight + 0, weight.loc)
        assert torch.equal(weight.exp(), weight.loc.exp())


def test_all_operations_on_a_weight_see_one_sample() -> None:
    """An expression such as weight standardisation sees one weight; the next read of the layer gives another."""
    for estimator in ("local", "per_example", "per_minibatch", "flipout"):
        weight = independent(3, 3)
        with vd.estimator(estimator):
            sample = weight + 0
            torch.testing.assert_close(weight - weight.mean(), sample - sample.mean())
            torch.testing.assert_close(torch.linalg.norm(weight), torch.linalg.norm(sample))
            assert not (weight - weight).count_nonzero()
            assert not torch.sub(*[weight, weight]).count_nonzero()
            assert torch.equal(*torch.stack([weight, weight]))


REFUSED = {
    "normal_": nn.init.normal_,
    "uniform_": nn.init.uniform_,
    "constant_": lambda w: nn.init.constant_(w, 1.0),
    "zero_": nn.init.zeros_,
    "xavier": nn.init.xavier_uniform_,
    "kaiming_uniform_": nn.init.kaiming_uniform_,
    "kaiming_normal_": nn.init.kaiming_normal_,
    "trunc_normal": nn.init.trunc_normal_,
    "orthogonal": nn.init.orthogonal_,
    "copy_": lambda w: w.copy_(w.loc),
    "mul_": lambda w: w.mul_(2),
    "clamp_": lambda w: torch.clamp_(w, 0, 1),
    "fill_": lambda w: w.fill_(1.0),
    "out=": lambda w: torch.add(w.loc, w.loc, out=w),
    "out= of a linear one": lambda w: torch.mm(w.loc, w.loc.T, out=w),
}


@pytest.mark.parametrize("make", [independent, correlated])
@pytest.mark.parametrize("name", REFUSED)
def test_changes_in_place_are_refused(name: str, make: object) -> None:
    with pytest.raises(
        TypeError, match="would change a random weight in place, but there is only a sample to change; "
    ):
        REFUSED[name](make(4, 3))  # type: ignore[operator]


def test_what_a_random_weight_has_not_got() -> None:
    weight = independent(4, 3)
    for name in ("data", "grad", "grad_fn", "nonsense"):
        with pytest.raises(AttributeError, match=f"a random weight has no '{name}'; while its layer is in training"):
            getattr(weight, name)
    with pytest.raises(TypeError, match="item assignment"):
        weight[0] = 1  # type: ignore[index]


def test_inside_packed_attention() -> None:
    """Its body runs, and meets the random weight in three chunks: each with noise of its own for every example."""
    attention = nn.MultiheadAttention(4, 2, batch_first=True).double()
    vd.convert_(attention, vd.VariationalDropout(type="B", rate=0.5))
    x = torch.randn(1, 3, 4, dtype=torch.float64).expand(2, 3, 4)
    with torch.no_grad():
        y = attention(x, x, x)[0]
        assert not torch.allclose(y[0], y[1])
        with vd.estimator("per_minibatch"):
            y = attention(x, x, x)[0]
        torch.testing.assert_close(y[0], y[1])


@pytest.mark.parametrize("config", [vd.VariationalDropout(type="A"), vd.VariationalDropout(type="B")])
@pytest.mark.parametrize("estimator", ["local", "per_example", "per_minibatch", "flipout"])
def test_integer_inputs_are_refused(config: vd.VariationalDropout, estimator: str) -> None:
    layer = nn.Linear(4, 3)
    vd.convert_(layer, config)
    with (
        vd.estimator(estimator),
        pytest.raises(
            TypeError, match=r"linear with a random weight needs floating-point inputs, got torch.int64; conv"
        ),
    ):
        layer(torch.ones(2, 4, dtype=torch.int64))
