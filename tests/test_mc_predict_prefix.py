"""What stands before the first noise runs once for all passes, and never when that would be wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

import vardrop as vd
from vardrop.prediction.prefix import Prefix


class Carried(TorchFunctionMode):
    """Counts the calls of one function that are carried out."""

    def __init__(self, func: Any) -> None:
        super().__init__()
        self.func, self.count, self.batched = func, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is self.func:
            self.count += 1
            self.batched += torch._C._functorch.is_batchedtensor(args[0])
        return func(*args, **(kwargs or {}))


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    body = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Conv2d(4, 4, 3), nn.Flatten()]
    return nn.Sequential(*body, nn.Dropout(0.5), nn.Linear(64, 3))


IMAGES = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def predicted(net: nn.Module, x: Any = IMAGES, **about: Any) -> vd.Prediction:
    return vd.mc_predict(net, x, 20, generator=torch.Generator().manual_seed(1), **about)


def in_full(net: nn.Module, monkeypatch: pytest.MonkeyPatch, **about: Any) -> vd.Prediction:
    """The same without anything kept."""
    with monkeypatch.context() as patch:
        patch.setattr(Prefix, "__enter__", lambda self: self)
        patch.setattr(Prefix, "__exit__", lambda *_: None)
        return predicted(net, **about)


@pytest.mark.parametrize(("engine", "chunk"), [("vmap", 3), ("vmap", 20), ("vmap", None), ("loop", None)])
def test_convolutions_before_the_noise_run_once(
    engine: str, chunk: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = conv_net()
    with Carried(torch.conv2d) as seen:
        found = predicted(net, engine=engine, chunk=chunk)
    assert (seen.count, seen.batched) == (2, 0)
    torch.testing.assert_close(found.samples, in_full(net, monkeypatch, engine=engine, chunk=chunk).samples)


def test_once_for_every_batch() -> None:
    with Carried(torch.conv2d) as seen:
        predicted(conv_net(), [IMAGES, IMAGES + 1, IMAGES[:1]], chunk=6)
    assert seen.count == 6


def test_what_follows_the_noise_is_never_kept() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 3))
    with Carried(torch.conv2d) as seen:
        predicted(net, chunk=5)
    assert (seen.count, seen.batched) == (1 + 4, 4)


class Tricky(nn.Module):
    """A first layer, some code, and noise."""

    def __init__(self, code: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.code, self.calls = nn.Conv2d(3, 4, 3), code, 0
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return self.code(self, self.conv(x))


def noisy(h: Tensor) -> Tensor:
    return F.dropout(h, 0.5, training=True)


def skip_written_to_after_the_noise(net: nn.Module, h: Tensor) -> Tensor:
    out = noisy(h)
    h.add_(1)  # the next pass must not see this
    return out + h


def chain_of_in_place(net: nn.Module, h: Tensor) -> Tensor:
    h.add_(1).mul_(h)
    h[:, 0] = 2
    h += h.mean()
    return noisy(h)


def no_grad_inside(net: nn.Module, h: Tensor) -> Tensor:
    with torch.enable_grad():
        h = h * 2
    assert not torch.is_grad_enabled()
    return noisy(h)


def asks_about_dead_tensors(net: nn.Module, h: Tensor) -> Tensor:
    a = h + 1
    b = a * 2
    if a.shape[0] > 100 or a.ndim != 4 or a.dtype != torch.float32 or float(a.max()) > 1e9:
        raise AssertionError
    del a
    first, second = b.chunk(2, dim=1)
    return noisy(torch.cat([second, first], 1))


def other_noise_in_every_call(net: nn.Module, h: Tensor) -> Tensor:
    return noisy(h * net.calls)


def other_function_in_every_call(net: nn.Module, h: Tensor) -> Tensor:
    return noisy(h.sin() if net.calls % 2 else h.cos())


def fewer_calls_later(net: nn.Module, h: Tensor) -> Tensor:
    return noisy(h) if net.calls == 1 else noisy(net.conv.weight[0, 0, 0, 0] * torch.ones(2, 4, 6, 6))


CODES = [skip_written_to_after_the_noise, chain_of_in_place, no_grad_inside, asks_about_dead_tensors]
CHANGING = [other_noise_in_every_call, other_function_in_every_call, fewer_calls_later]


@pytest.mark.parametrize("engine", ["vmap", "loop"])
@pytest.mark.parametrize("code", CODES, ids=lambda code: code.__name__)
def test_answers_are_those_of_the_whole_model(engine: str, code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    net = Tricky(code)
    found = predicted(net, engine=engine, chunk=4)
    assert found.engine == engine
    torch.testing.assert_close(found.samples, in_full(net, monkeypatch, engine=engine, chunk=4).samples)


@pytest.mark.parametrize("code", CHANGING, ids=lambda code: code.__name__)
def test_a_model_that_changes_its_mind_is_run_in_full(code: Any) -> None:
    net = Tricky(code)
    found = predicted(net, engine="loop")
    with torch.no_grad():
        first, later = net.conv(IMAGES), None
    if code is other_noise_in_every_call:
        assert found.samples is not None
        kept = found.samples[-1] != 0
        later = found.samples[-1] / (2 * first)
        scale = later[kept].unique().round(decimals=3).unique()
        assert len(scale) == 1
        assert scale.item() >= 20  # the number of its last call
    assert (found.std > 0).any()


def test_only_what_is_needed_is_held() -> None:
    net = nn.Sequential(nn.Linear(10, 1000), nn.ReLU(), nn.Linear(1000, 5), nn.Dropout(0.5)).train()
    x = torch.randn(100, 10)
    prefix = Prefix()
    with torch.no_grad():
        for _ in range(2):
            with prefix:
                net(x)
    assert not prefix.deviated
    assert prefix.answered == 3
    inputs = sum(t.numel() for t in (x, *net.parameters())) * 4
    assert prefix.held() <= inputs + 2 * 100 * 5 * 4  # none of the 400,000 bytes of hidden units


def test_noise_from_a_generator_of_its_own_ends_the_prefix() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.generator = nn.Dropout(0.5), torch.Generator()

        def forward(self, x: Tensor) -> Tensor:
            h = x + torch.randn(x.shape, generator=self.generator)
            return h + 0 * self.dropout(x)

    for engine in ("vmap", "loop"):
        found = predicted(Own(), engine=engine)
        assert abs(found.std.mean().item() - 1) < 0.1
