"""Products by oneDNN against torch's own: values, gradients of every order, and all that has to stay with torch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import vardrop as vd
from vardrop import products
from vardrop.products import linear, product

has_onednn = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch has no oneDNN")


class Calls:
    """oneDNN's products, counted."""

    def __init__(self) -> None:
        self.count = 0


@pytest.fixture
def onednn(monkeypatch: pytest.MonkeyPatch) -> Calls:
    """oneDNN for products of every size, on any processor; and how often it was called."""
    calls, plain = Calls(), torch.ops.mkldnn._linear_pointwise

    def counted(*args: object) -> Tensor:
        calls.count += 1
        return plain(*args)

    monkeypatch.setattr(products, "_WORTH", 0)
    monkeypatch.setattr(products, "_is_known", lambda: True)
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", counted)
    return calls


def operands(*sizes: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """x [..., in], W [out, in] and b [out] that ask for gradients; out is 5."""
    x, weight, bias = (
        torch.randn(*sizes, dtype=dtype),
        torch.randn(5, sizes[-1], dtype=dtype),
        torch.randn(5, dtype=dtype),
    )
    return x.requires_grad_(), weight.requires_grad_(), bias.requires_grad_()


@has_onednn
@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 5), min_size=0, max_size=3),
    inner=st.integers(1, 9),
    outer=st.integers(1, 9),
    biased=st.booleans(),
    turned=st.booleans(),
)
def test_values_of_any_shape(sizes: list[int], inner: int, outer: int, biased: bool, turned: bool) -> None:
    x = torch.randn(*sizes, inner)
    weight = torch.randn(inner, outer).t() if turned else torch.randn(outer, inner)
    bias = torch.randn(outer) if biased else None
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(products, "_WORTH", 0)
        patch.setattr(products, "_is_known", lambda: True)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
        torch.testing.assert_close(product(x, weight, bias), F.linear(x, weight, bias))


@has_onednn
@pytest.mark.parametrize("sizes", [(7,), (4, 7), (2, 3, 7)], ids=str)
@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 1), (0, 1, 2)], ids=str)
def test_gradients(onednn: Calls, sizes: tuple[int, ...], wanted: tuple[int, ...]) -> None:
    inputs = operands(*sizes)
    fixed = [tensor if index in wanted else tensor.detach() for index, tensor in enumerate(inputs)]
    into = [inputs[index] for index in wanted]
    ours, theirs = linear(*fixed), F.linear(*fixed)
    by = torch.randn_like(ours)
    for one, other in zip(torch.autograd.grad(ours, into, by), torch.autograd.grad(theirs, into, by), strict=True):
        torch.testing.assert_close(one, other)
    assert onednn.count > 0


@has_onednn
def test_gradients_of_gradients(onednn: Calls) -> None:
    x, weight, bias = operands(4, 7)
    found = []
    for function in (linear, F.linear):
        y = function(x, weight, bias).pow(3).sum()
        first = torch.autograd.grad(y, (x, weight), create_graph=True)
        second = torch.autograd.grad(sum(part.pow(2).sum() for part in first), (x, weight, bias), create_graph=True)
        found.append((*first, *second, *torch.autograd.grad(second[0].sum(), (x, weight))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)


@has_onednn
@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # torch itself, when dual numbers begin
@pytest.mark.parametrize("moving", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
def test_forward_mode(onednn: Calls, moving: tuple[int, ...]) -> None:
    inputs = operands(3, 7)
    tangents = [torch.randn_like(tensor) for tensor in inputs]
    found = []
    for function in (linear, F.linear):
        with torch.autograd.forward_ad.dual_level():
            duals = [
                torch.autograd.forward_ad.make_dual(tensor, tangent) if index in moving else tensor
                for index, (tensor, tangent) in enumerate(zip(inputs, tangents, strict=True))
            ]
            found.append(torch.autograd.forward_ad.unpack_dual(function(*duals)).tangent)
    torch.testing.assert_close(*found)


@has_onednn
def test_what_is_written_to_after_the_product_is_found_out(onednn: Calls) -> None:
    x, weight, bias = operands(4, 7)
    y = linear(x.clone(), inner := weight.clone(), bias)
    with torch.no_grad():
        inner.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_numbers_go_where_they_are_known_to_be_faster(onednn: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight, bias = (tensor.detach() for tensor in operands(4, 7))

    def stays(*args: Tensor | None, with_gradients: bool = False) -> bool:
        before = onednn.count
        with torch.set_grad_enabled(with_gradients):
            torch.testing.assert_close(linear(*args), F.linear(*args))
        return onednn.count == before

    if torch.backends.mkldnn.is_available():
        assert not stays(x, weight, bias)
        assert not stays(x, weight, None, with_gradients=True)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", False)
        assert stays(x, weight, bias)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", True)
    assert stays(x.double(), weight.double(), bias.double())
    assert stays(x.bfloat16(), weight.bfloat16(), bias.bfloat16())
    with torch.autocast("cpu"):
        assert stays(x, weight, bias)
    with FlopCounterMode(display=False) as counter:  # it counts what it knows
        assert stays(x, weight, bias)
    assert counter.get_total_flops() == 2 * (2 * 4 * 7 * 5)
    monkeypatch.setattr(products, "_WORTH", 4 * 7 * 5 + 1)
    assert stays(x, weight, bias)
    monkeypatch.setattr(products, "_WORTH", 0)
    monkeypatch.setattr(products, "_is_known", lambda: False)
    assert stays(x, weight, bias)


@pytest.mark.parametrize(
    ("maker", "capability", "known"),
    [("AuthenticAMD", "AVX512", True), ("AuthenticAMD", "AVX2", False), ("GenuineIntel", "AVX512", False)],
)
@pytest.mark.parametrize("linux", [True, False])
def test_processors(monkeypatch: pytest.MonkeyPatch, maker: str, capability: str, known: bool, linux: bool) -> None:
    def read_text(path: Path) -> str:
        if not linux:
            raise FileNotFoundError
        return f"vendor_id : {maker}"

    monkeypatch.setattr(Path, "read_text", read_text)
    monkeypatch.setattr(products.platform, "processor", lambda: "" if linux else f"AMD64 Family 25, {maker}")
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    assert products._is_known.__wrapped__() is known


@has_onednn
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(
    ("x", "weight", "bias"),
    [
        ((4, 7), (5, 6), None),
        ((4, 7), (5, 7), (6,)),
        ((4, 7), (2, 5, 7), None),
        ((), (5, 7), None),
        ((4, 7), (5, 7), (3, 4, 5)),
    ],
)
def test_shapes_that_do_not_fit_meet_torchs_words(
    onednn: Calls, x: tuple[int, ...], weight: tuple[int, ...], bias: tuple[int, ...] | None, grad: bool
) -> None:
    """oneDNN has an obscure message for some, and ends the process for others."""
    operands = torch.randn(x), torch.randn(weight), None if bias is None else torch.randn(bias)
    words = []
    for function in (linear, F.linear):
        with torch.set_grad_enabled(grad), pytest.raises(RuntimeError) as error:
            function(*operands)
        words.append(str(error.value))
    assert words[0] == words[1]
    assert onednn.count == 0


@has_onednn
@pytest.mark.parametrize(("weight", "bias"), [((7,), None), ((5, 7), (1,)), ((5, 7), (4, 5))])
def test_shapes_that_torch_alone_knows(onednn: Calls, weight: tuple[int, ...], bias: tuple[int, ...] | None) -> None:
    x, w, b = torch.randn(4, 7), torch.randn(weight), None if bias is None else torch.randn(bias)
    torch.testing.assert_close(linear(x, w, b), F.linear(x, w, b))
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(lambda rows: linear(rows, w, b))(x[None]), F.linear(x, w, b)[None])
    assert onednn.count == 0


@has_onednn
def test_symbols_of_a_trace_stay_symbols(onednn: Calls) -> None:
    class Net(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return linear(x, torch.ones(5, 7))

    with torch.no_grad():
        graph = torch.fx.symbolic_trace(Net()).graph
    assert [node.target for node in graph.nodes if node.op == "call_function"] == [F.linear]


@has_onednn
@pytest.mark.filterwarnings("ignore:`torch.jit.trace` is deprecated")
def test_compiled_and_traced_code_has_torchs_own(onednn: Calls) -> None:
    x, weight, bias = (tensor.detach() for tensor in operands(4, 7))
    torch._dynamo.reset()
    compiled = torch.compile(lambda rows: linear(rows, weight, bias), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), F.linear(x, weight, bias))
    traced = torch.jit.trace(lambda rows: linear(rows, weight, bias), x, check_trace=False)
    assert onednn.count == 0
    assert "mkldnn" not in str(traced.graph)


class Seen(Tensor):
    """A tensor of a class of its own, which sees the functions it comes to."""

    functions: list[str]

    @classmethod
    def __torch_function__(cls, func: object, types: object, args: tuple = (), kwargs: dict | None = None) -> object:
        cls.functions.append(getattr(func, "__name__", ""))
        return super().__torch_function__(func, types, args, kwargs)


@has_onednn
def test_tensors_of_special_classes_see_the_function(onednn: Calls) -> None:
    Seen.functions = []
    x, weight, _ = (tensor.detach() for tensor in operands(4, 7))
    linear(x, weight.as_subclass(Seen))
    assert "linear" in Seen.functions
    assert onednn.count == 0


@has_onednn
@pytest.mark.parametrize("axis", [0, 1], ids=str)
def test_passes_that_share_a_weight_are_one_product(onednn: Calls, axis: int) -> None:
    x, weight, bias = (tensor.detach() for tensor in operands(6, 4, 7))
    with torch.no_grad():
        found = torch.vmap(lambda rows: linear(rows, weight, bias), in_dims=axis)(x)
        assert onednn.count == 1
        torch.testing.assert_close(found, F.linear(x.movedim(axis, 0), weight, bias))


@has_onednn
def test_what_vmap_does_otherwise(onednn: Calls) -> None:
    """Weights or biases of every pass, passes of passes, and gradients."""
    x, weight, bias = (tensor.detach() for tensor in operands(6, 4, 7))
    weights, biases = torch.randn(6, 5, 7), torch.randn(6, 5)
    with torch.no_grad():
        each = torch.stack([F.linear(*one) for one in zip(x, weights, biases, strict=True)])
        torch.testing.assert_close(torch.vmap(linear)(x, weights, biases), each)
        torch.testing.assert_close(
            torch.vmap(lambda rows, b: linear(rows, weight, b))(x, biases),
            torch.stack([F.linear(rows, weight, b) for rows, b in zip(x, biases, strict=True)]),
        )
        torch.testing.assert_close(torch.vmap(lambda w: linear(x, w))(weights), x @ weights.mT[:, None])
        deep = torch.randn(2, 6, 4, 7)
        twice = torch.vmap(torch.vmap(lambda rows: linear(rows, weight, bias)))(deep)
        torch.testing.assert_close(twice, F.linear(deep, weight, bias))
        scalar = torch.vmap(lambda row: linear(row, weight, bias))(x[0])
        torch.testing.assert_close(scalar, F.linear(x[0], weight, bias))
    by_x = torch.func.vmap(torch.func.grad(lambda rows: linear(rows, weight, bias).sum()))(x)
    torch.testing.assert_close(by_x, weight.sum(0).expand_as(x))


@has_onednn
def test_a_prediction_is_the_same_by_either_kernel(onednn: Calls, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also of random weights, whose noise must stay their own in every pass."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 3))
    noisy = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    vd.convert_(noisy, vd.VariationalDropout(type="B", sharing="weight"))
    x = torch.randn(4, 6)
    for model in (net, noisy):
        for name in ("local", "per_minibatch"):
            with vd.estimator(name):
                before = onednn.count
                fast = vd.mc_predict(model, x, 20, generator=torch.Generator().manual_seed(1))
                assert onednn.count > before or name == "per_minibatch"  # there every pass has weights of its own
                with monkeypatch.context() as patch:
                    patch.setattr(torch.backends.mkldnn, "enabled", False)
                    plain = vd.mc_predict(model, x, 20, generator=torch.Generator().manual_seed(1))
            assert fast.samples is not None
            torch.testing.assert_close(fast.samples, plain.samples, rtol=1e-4, atol=1e-5)
            assert len(fast.samples.unique(dim=0)) == 20


@has_onednn
@pytest.mark.parametrize(
    "method", [vd.VariationalDropout("A"), vd.VariationalDropout("B"), vd.SparseVariationalDropout()]
)
@pytest.mark.parametrize("name", ["local", "per_minibatch", "flipout", "none"])
def test_a_training_step_is_the_same_by_either_kernel(
    onednn: Calls, monkeypatch: pytest.MonkeyPatch, method: object, name: str
) -> None:
    x, y = torch.randn(9, 6), torch.randint(3, (9,))
    found = []
    for enabled in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
        vd.convert_(net, method)
        monkeypatch.setattr(torch.backends.mkldnn, "enabled", enabled)
        with vd.estimator(name):
            F.cross_entropy(net(x), y).backward()
        found.append([p.grad for p in net.parameters() if p.grad is not None])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
    assert onednn.count > 0
