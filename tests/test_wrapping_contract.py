"""What holds for every layer of noise that has another layer inside: one list of them, a line each."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap
from torch.utils.checkpoint import checkpoint

import vardrop as vd
from contract import assert_mean
from layer_contract import copies
from vardrop import layers, rates

Make = Callable[[rates.Rate], nn.Module]

# name -> rate -> layer, and the shape of its input
WRAPPING: dict[str, tuple[Make, tuple[int, ...]]] = {
    "concrete-linear": (lambda p: layers.ConcreteDropout(p, nn.Linear(5, 4)), (6, 5)),
    "concrete-conv1d": (lambda p: layers.ConcreteDropout(p, nn.Conv1d(5, 4, 2)), (6, 5, 7)),
    "concrete-conv2d": (lambda p: layers.ConcreteDropout(p, nn.Conv2d(5, 4, 3, padding=1)), (6, 5, 4, 3)),
    "dropconnect-linear": (lambda p: layers.DropConnect(p, nn.Linear(5, 4)), (6, 5)),
    "dropconnect-conv2d": (lambda p: layers.DropConnect(p, nn.Conv2d(5, 4, 3, padding=1)), (6, 5, 4, 3)),
    "dropconnect-transposed": (lambda p: layers.DropConnect(p, nn.ConvTranspose1d(5, 4, 3)), (6, 5, 4)),
    "fast": (lambda p: layers.FastDropout(p, nn.Linear(5, 4)), (6, 5)),
    "fast-tokens": (lambda p: layers.FastDropout(p, nn.Linear(5, 4)), (6, 3, 5)),
}
every_layer = pytest.mark.parametrize(("make", "shape"), WRAPPING.values(), ids=list(WRAPPING))


def given(layer: nn.Module, x: Tensor, seed: int) -> Tensor:
    out: Tensor = layer(x, generator=torch.Generator().manual_seed(seed))
    return out


def test_the_list_has_every_layer_that_wraps_a_linear_one() -> None:
    kinds = {type(make(0.1)) for make, _ in WRAPPING.values()}
    assert kinds == {layers.ConcreteDropout, layers.DropConnect, layers.FastDropout}


@every_layer
def test_generators(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make(0.4), torch.randn(shape)
    before = torch.get_rng_state()
    assert torch.equal(given(layer, x, 1), given(layer, x, 1))
    assert not torch.equal(given(layer, x, 1), given(layer, x, 2))
    with vd.estimator("local", generator=torch.Generator().manual_seed(1)):
        assert torch.equal(layer(x), given(layer, x, 1))
    assert torch.equal(before, torch.get_rng_state())


@every_layer
def test_copies_and_files(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make(0.4), torch.randn(shape)
    for other in copies(layer, make(0.1)):
        assert torch.equal(given(other, x, 1), given(layer, x, 1))


@every_layer
def test_evaluation_and_rate_zero_are_the_plain_layer(make: Make, shape: tuple[int, ...]) -> None:
    layer, still, x = make(0.4), make(0.0), torch.randn(shape)
    still.layer = layer.layer
    plain: Any = layer.layer
    assert torch.equal(layer.eval()(x), plain(x))
    torch.testing.assert_close(still(x), plain(x))


@every_layer
def test_the_mean_is_the_plain_layer(make: Make, shape: tuple[int, ...]) -> None:
    """For the concrete relaxation nearly: its mask is no coin, and is divided by 1 - p nonetheless."""
    torch.manual_seed(0)
    layer, x = make(0.5), torch.randn(shape, dtype=torch.float64)
    layer = layer.double()
    with torch.no_grad():
        samples = torch.stack([layer(x) for _ in range(1500)]).flatten(1)
        assert_mean(samples, layer.eval()(x).flatten(), "mean")


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature:UserWarning")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.complex64], ids=str)
@every_layer
def test_types(make: Make, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    layer = make(0.3)
    if dtype == torch.complex64 and isinstance(layer, layers.FastDropout):
        with pytest.raises(TypeError, match=r"must be real, as the squares of torch\.complex64 are no variances"):
            layer(torch.ones(shape, dtype=dtype))
        return
    if dtype == torch.float16 and isinstance(layer.layer, nn.ConvTranspose1d):
        pytest.skip("torch has no transposed convolution in float16 on a CPU")
    layer.layer = layer.layer.to(dtype)
    x = torch.randn(shape).to(dtype).requires_grad_()
    y = layer(x)
    assert y.dtype == dtype
    y.abs().sum().backward()
    assert x.grad.dtype == layer.layer.weight.grad.dtype == dtype
    assert x.grad.abs().isfinite().all()
    assert not torch.equal(layer(x), y)


@every_layer
def test_empty_batches(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make(0.4), torch.ones(0, *shape[1:], requires_grad=True)
    y = layer(x)
    assert y.shape == layer.eval()(x).shape
    y.sum().backward()
    assert not layer.layer.weight.grad.any()


@pytest.mark.parametrize("name", [name for name, (_, shape) in WRAPPING.items() if len(shape) == 4])
def test_channels_last_is_kept(name: str) -> None:
    make, shape = WRAPPING[name]
    layer = make(0.4).to(memory_format=torch.channels_last)
    x = torch.randn(shape).to(memory_format=torch.channels_last)
    assert layer.layer(x).is_contiguous(memory_format=torch.channels_last)
    assert layer(x).is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("reentrant", [False, True])
@every_layer
def test_checkpointing_replays_the_noise(make: Make, shape: tuple[int, ...], reentrant: bool) -> None:
    layer = make(0.5)
    gradients = []
    for through in (lambda x: checkpoint(layer, x, use_reentrant=reentrant), layer):
        torch.manual_seed(1)
        x = torch.linspace(1, 2, torch.Size(shape).numel()).view(shape).requires_grad_()
        through(x).square().sum().backward()
        gradients.append((x.grad, layer.layer.weight.grad.clone()))
        layer.zero_grad()
    for got, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(got, wanted)


@every_layer
def test_vmap(make: Make, shape: tuple[int, ...]) -> None:
    layer, x = make(0.5), torch.randn(shape)
    with torch.no_grad():
        y = vmap(lambda _: layer(x), randomness="different")(torch.arange(1500)).double().flatten(1)
        assert_mean(y, layer.eval()(x).double().flatten(), "mean")
        layer.train()
        same = vmap(lambda x: layer(x), randomness="same")(x.expand(3, *shape))
    torch.testing.assert_close(same, same[:1].expand_as(same))


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # dynamo's own
@every_layer
def test_one_graph_for_a_whole_schedule(make: Make, shape: tuple[int, ...]) -> None:
    torch._dynamo.reset()
    layer, x = make(rates.linear(0.0, 0.5, steps=3)), torch.randn(shape)
    scheduler = rates.RateScheduler(layer)
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(layer, fullgraph=True, backend="eager")
        for _ in range(4):
            assert torch.allclose(compiled(x), compiled(x)) == (layer.p == 0)
            scheduler.step()
