"""What holds for every layer of activation noise: `layer_contract.py` has the list."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounter
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import vardrop as vd
from contract import assert_mean
from layer_contract import LAYERS, Layer, copies
from vardrop import rates
from vardrop.testing import check_noise

every_layer = pytest.mark.parametrize("layer", LAYERS, ids=repr)


class Called(nn.Module):
    """A layer with whatever else it needs in a call, as a module of one input."""

    def __init__(self, layer: Layer, p: rates.Rate) -> None:
        super().__init__()
        self.layer = layer
        self.module = layer.make(p)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer.run(self.module, x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
@every_layer
def test_mean_variance_and_what_is_independent_of_what(layer: Layer, p: float) -> None:
    torch.manual_seed(0)
    axes = {str(axis): axis for axis in range(len(layer.shape))}
    x = torch.linspace(1, 2, math.prod(layer.shape), dtype=torch.float64).view(layer.shape)
    check_noise(
        Called(layer, p),
        x,
        variance=p / (1 - p) * x**2,
        independent={name: axis for name, axis in axes.items() if axis not in layer.shared + layer.dependent},
        shared={name: axis for name, axis in axes.items() if axis in layer.shared},
        samples=1000,
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@every_layer
def test_the_law_and_the_generator_of_a_cuda_device(layer: Layer) -> None:
    p, axes = 0.3, range(len(layer.shape))
    x = torch.linspace(1, 2, math.prod(layer.shape), dtype=torch.float64, device="cuda").view(layer.shape)
    module = Called(layer, p).to("cuda")
    assert module.module.rate.device == x.device
    check_noise(
        module,
        x,
        variance=p / (1 - p) * x**2,
        independent={str(axis): axis for axis in axes if axis not in layer.shared + layer.dependent},
        shared={str(axis): axis for axis in layer.shared},
        samples=400,
    )
    first, second = (layer.run(module.module, x, torch.Generator("cuda").manual_seed(3)) for _ in range(2))
    assert torch.equal(first, second)
    half = torch.ones(layer.shape, dtype=torch.float16, device="cuda", requires_grad=True)
    y = layer.run(module.module, half)
    y.sum().backward()
    assert y.dtype == half.grad.dtype == torch.float16
    torch.testing.assert_close(half.grad, y.detach())


@every_layer
def test_evaluation_is_the_identity(layer: Layer) -> None:
    x = torch.randn(layer.shape)
    assert torch.equal(layer.run(layer.make(0.7).eval(), x), x)


@every_layer
def test_rate_zero_is_the_identity(layer: Layer) -> None:
    x, before = torch.randn(layer.shape), torch.get_rng_state()
    assert torch.equal(layer.run(layer.make(0.0), x), x)
    assert not layer.silent or torch.equal(before, torch.get_rng_state())


@every_layer
def test_the_bounds_of_the_rate(layer: Layer) -> None:
    for p in (-0.1, 1.1):
        with pytest.raises(ValueError, match="p must be a dropout rate in"):
            layer.make(p)
    if layer.gaussian:
        with pytest.raises(ValueError, match=r"p must be a dropout rate in \[0, 1\), got 1"):
            layer.make(1.0)
    else:
        assert not layer.run(layer.make(1.0), torch.randn(layer.shape)).any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@every_layer
def test_types(layer: Layer, dtype: torch.dtype) -> None:
    module = layer.make(0.3)
    if not dtype.is_complex:
        module = module.to(dtype)
    assert module.p == pytest.approx(0.3)  # in all its digits
    x = torch.ones(layer.shape, dtype=dtype, requires_grad=True)
    y = layer.run(module, x)
    assert y.dtype == dtype
    y.abs().sum().backward()
    assert x.grad.dtype == dtype
    torch.testing.assert_close(x.grad.abs(), y.detach().abs())


@every_layer
def test_the_gradient_is_the_noise(layer: Layer) -> None:
    x = torch.rand(layer.shape).add(1).requires_grad_()
    y = layer.run(layer.make(0.5), x)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient * x, y)


@every_layer
def test_generators(layer: Layer) -> None:
    x, module, before = torch.ones(layer.shape), layer.make(0.5), torch.get_rng_state()

    def given(seed: int) -> Tensor:
        return layer.run(module, x, torch.Generator().manual_seed(seed))

    def of_the_estimator(seed: int) -> Tensor:
        with vd.estimator("local", generator=torch.Generator().manual_seed(seed)):
            return layer.run(module, x)

    for run in (given, of_the_estimator):
        assert torch.equal(run(1), run(1))
        assert not torch.equal(run(1), run(2))
    assert torch.equal(given(3), of_the_estimator(3))
    assert torch.equal(before, torch.get_rng_state())


@every_layer
def test_copies_and_files(layer: Layer) -> None:
    module, x = layer.make(rates.linear(0.1, 0.5, steps=4)), torch.ones(layer.shape)
    module.p = 0.4
    for other in copies(module, layer.make(0.1)):
        torch.manual_seed(1)
        expected = layer.run(module, x)
        torch.manual_seed(1)
        assert torch.equal(layer.run(other, x), expected)
        other.p = 0.2
        assert module.p == pytest.approx(0.4)


@every_layer
def test_one_graph_for_a_whole_schedule(layer: Layer) -> None:
    torch._dynamo.reset()
    module = Called(layer, rates.linear(0.0, 0.5, steps=4))
    scheduler = vd.rates.RateScheduler(module)
    x = torch.ones(layer.shape)
    graphs = SimpleNamespace(count=0)

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.count += 1
        return graph.forward

    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for step in range(6):
        y = torch.stack([compiled(x).flatten() for _ in range(60)]).double()
        p = module.module.p
        assert p == pytest.approx(min(0.5, step / 8))
        groups = y.mean(1)  # calls are independent, entries are not
        assert_mean(groups, torch.ones(()), "mean")
        assert (p == 0) == bool((y == 1).all())
        scheduler.step()
    assert graphs.count == 1


@every_layer
def test_one_graph_for_batches_of_any_size(layer: Layer) -> None:
    torch._dynamo.reset()
    module = Called(layer, 0.5)
    graphs = CompileCounter()
    compiled = torch.compile(module, fullgraph=True, backend=graphs)
    for size in (7, 5, 9):
        x = torch.ones(size, *layer.shape[1:])
        torch._dynamo.mark_dynamic(x, 0)
        y = compiled(x)
        assert y.shape == x.shape
        assert not torch.equal(y, x)
    assert graphs.frame_count == 1


@every_layer
def test_vmap(layer: Layer) -> None:
    module, x = layer.make(0.5), torch.ones(layer.shape)
    y = vmap(lambda _: layer.run(module, x), randomness="different")(torch.arange(500)).flatten(1).double()
    assert_mean(y.mean(1), torch.ones(()), "mean")
    assert_mean((y - 1).square().mean(1), torch.ones(()), "variance")
    assert_mean(((y[1:] - 1) * (y[:-1] - 1)).mean(1), torch.zeros(()), "covariance of samples")
    same = vmap(lambda x: layer.run(module, x), randomness="same")(torch.ones(3, *layer.shape))
    assert torch.equal(same, same[:1].expand_as(same))


@every_layer
def test_empty_inputs(layer: Layer) -> None:
    for axis in range(len(layer.shape)):
        shape = tuple(0 if i == axis else size for i, size in enumerate(layer.shape))
        x = torch.ones(shape, requires_grad=True)
        y = layer.run(layer.make(0.5), x)
        assert y.shape == shape
        y.sum().backward()


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if len(layer.shape) == 4], ids=repr)
def test_channels_last_is_kept(layer: Layer) -> None:
    x = torch.ones(layer.shape).to(memory_format=torch.channels_last)
    assert layer.run(layer.make(0.5), x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reentrant", [False, True])
@every_layer
def test_checkpointing_replays_the_noise(layer: Layer, reentrant: bool) -> None:
    module = layer.make(0.5)
    x = torch.rand(layer.shape).add(1).requires_grad_()
    y = checkpoint(lambda x: layer.run(module, x * x), x, use_reentrant=reentrant)
    (gradient,) = torch.autograd.grad(y.sum(), x) if not reentrant else (None,)
    if reentrant:
        y.sum().backward()
        gradient = x.grad
    torch.testing.assert_close(gradient * x, 2 * y)


@every_layer
def test_the_plain_checkpoint_of_a_network_loads(layer: Layer) -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    ours = nn.Sequential(nn.Linear(2, 2), layer.make(0.25))
    ours.load_state_dict(plain.state_dict())
    assert ours[1].p == 0.25


def test_the_list_has_every_layer() -> None:
    listed = {type(layer.make(0.1)) for layer in LAYERS}
    have_truths_of_their_own = {  # in `test_wrapping_contract.py` and `test_droppath.py`: they have a layer inside
        *(vd.layers.ConcreteDropout, vd.layers.DropConnect, vd.layers.FastDropout),
        *(vd.layers.LayerDrop, vd.layers.StochasticDepth),
    }
    named = {thing for thing in map(vars(vd.layers).get, vd.layers.__all__) if isinstance(thing, type)}
    assert named - {vd.layers.Drop} == listed | have_truths_of_their_own
    page = (Path(__file__).resolve().parents[1] / "docs" / "layers.md").read_text(encoding="utf-8")
    table = "".join(re.findall(r"^\| (`\w+`.*?) \|", page, re.M))
    assert {kind.__name__ for kind in named} - {"Drop"} <= set(re.findall(r"`(\w+)`", table))
