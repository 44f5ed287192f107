"""How many passes at once: for the cache, and within the memory that is allowed."""

from __future__ import annotations

import gc
import math
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.prediction import chunks
from vardrop.prediction.chunks import Peak
from vardrop.prediction.engine import Engine

X = torch.randn(50, 20)


def noisy_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 400), nn.Dropout(0.5), nn.Linear(400, 400), nn.ReLU(), nn.Linear(400, 3))


def long_prefix() -> nn.Module:
    return nn.Sequential(nn.Linear(20, 4000), nn.ReLU(), nn.Linear(4000, 10), nn.Dropout(0.5), nn.Linear(10, 3))


def test_peak_counts_what_lives_at_one_time() -> None:
    with Peak(before=5) as peak:
        a = torch.ones(1000)
        b = a + 1
        view = b.view(10, 100)[1:]
        del a
        c = view * 2
        c.add_(1)
    assert peak.now == 5 + 4 * (1000 + 900)
    assert peak.most == 5 + 4 * 2000
    del b, view, c
    assert peak.now == 5
    with Peak() as peak:
        torch.ones(1000)
        peak.mark()
        torch.ones(10)
    assert (peak.most, peak.most_since) == (4000, 40)


def test_the_chunk_depends_on_sizes_alone() -> None:
    cpu = torch.device("cpu")
    assert chunks.for_cache(400_000, cpu) == 10
    assert chunks.for_cache(1 << 40, cpu) == 1
    assert chunks.for_cache(0, cpu) > 1000
    assert chunks.for_cache(400_000, torch.device("cuda")) > 100
    assert chunks.for_memory(1000, 100, 300, 2) == 8  # 0.9 · 900 / 100
    assert chunks.for_memory(1000, 990, 1190, 2) == 1


@given(st.integers(1, 300), st.integers(1, 300))
def test_chunks_are_even_and_not_larger(left: int, size: int) -> None:
    made = []
    count = math.ceil(left / size)
    while left:
        made.append(chunks.even(left, size))
        left -= made[-1]
    assert max(made) <= size
    assert max(made) - min(made) <= 1
    assert len(made) == count


class Grows(nn.Module):
    """A small input, a large tensor inside; what it does about errors differs."""

    def __init__(self, errors: str) -> None:
        super().__init__()
        self.errors, self.counts = errors, []
        self.wide, self.last = nn.Linear(3, 100_000), nn.Linear(100_000, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = F.dropout(x, 0.5, self.training)
        try:
            return self.last(self.wide(h))
        except Exception as error:
            if self.errors == "are kept":
                return h[:, :2]
            if self.errors == "are wrapped":
                raise RuntimeError("the model has failed") from error
            raise


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    counts: list[int] = []
    at_once = Engine._at_once
    monkeypatch.setattr(Engine, "_at_once", lambda self, *args: counts.append(args[0]) or at_once(self, *args))
    return counts


def test_a_small_batch_is_one_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted(monkeypatch)
    assert vd.mc_predict(noisy_mlp(), X[:1], 100).chunk == 100
    assert counts == [100]


@pytest.mark.parametrize("errors", ["pass", "are kept", "are wrapped"])
def test_a_small_batch_that_grows_begins_again(errors: str, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = counted(monkeypatch)
    net = Grows(errors)
    found = vd.mc_predict(net, X[:1, :3], 60)  # 400 kB in a pass: ten passes at once
    assert (found.engine, found.chunk, found.samples.shape) == ("vmap", 10, (60, 1, 2))
    assert counts == [60, 1, *[10] * 5, 9]
    net.eval()
    with torch.no_grad():
        assert ((found.mean - net(X[:1, :3])) / found.std * 60**0.5).abs().max() < 5
    again = vd.mc_predict(net, [X[:1, :3], X[1:2, :3]], 60)
    assert again.chunk == 10
    assert counts[8:] == [60, 1, *[10] * 5, 9, *[10] * 6]  # the second batch of one shape knows


@pytest.mark.parametrize("make", [noisy_mlp, long_prefix])
@pytest.mark.parametrize("keep", [True, False])
def test_memory_stays_within_the_bound(make: Callable[[], nn.Module], keep: bool) -> None:
    """Measured by another count around the whole call; results are beside the bound."""
    net, samples = make(), 200
    results = 50 * 3 * 4 * (samples if keep else 0) * 2 + 50 * 3 * 8 * 8  # kept passes are put together at the end
    chosen = []
    for allowed in (2_000_000, 6_000_000, 20_000_000):
        with Peak() as peak:
            found = vd.mc_predict(net, X, samples, max_memory=allowed, keep=keep)
        assert peak.most <= allowed + results
        chosen.append(found.chunk)
    assert chosen[0] < chosen[1] <= chosen[2] or make is long_prefix
    if make is noisy_mlp:
        assert chosen[0] >= 2
    else:
        assert chosen[0] == samples - 3  # a long prefix takes no room from the passes behind it


def test_too_small_a_bound_is_refused_with_the_figures() -> None:
    words = r"room for one pass over a batch of 50 examples, which take [\d,]+ bytes, got 100,000; give more, or"
    for engine in ("vmap", "loop"):
        with pytest.raises(ValueError, match=words):
            vd.mc_predict(noisy_mlp(), X, 10, max_memory=100_000, engine=engine)
    with pytest.raises(ValueError, match="must have room for chunk=50 passes"):
        vd.mc_predict(noisy_mlp(), X, 50, max_memory=1_000_000, chunk=50)


class Nested(nn.Module):
    """Takes a list, and gives one number for an example."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(64, 64), nn.Linear(64, 1)

    def forward(self, xs: list[Tensor]) -> Tensor:
        return self.last(F.dropout(self.hidden(xs[0]), 0.5, self.training).sin().cos())


@pytest.mark.parametrize("sizes", [(4, 2000), (2000, 4), (2000, 2001)])
def test_memory_stays_within_the_bound_for_batches_of_any_structure_and_size(sizes: tuple[int, int]) -> None:
    batches = [([torch.randn(size, 64)], 0) for size in sizes]
    with Peak() as peak:
        vd.mc_predict(Nested(), batches, 50, max_memory=8_000_000, keep=False)
    assert peak.most <= 8_000_000 + 2000 * 8 * 12


@pytest.mark.parametrize("engine", ["vmap", "loop"])
def test_notes_of_one_batch_are_gone_before_the_next_one(engine: str) -> None:
    """At once, not when garbage happens to be collected."""
    held = []

    def batches() -> Iterator[tuple[list[Tensor], int]]:
        for _ in range(4):
            held.append(peak.now)
            yield [torch.randn(2000, 64)], 0

    gc.collect()
    gc.disable()
    try:
        with Peak() as peak:
            vd.mc_predict(Nested(), batches(), 50, engine=engine, keep=False)
    finally:
        gc.enable()
    result = 2 * 4 * 2000  # mean and variance
    assert held[3] - held[2] <= 2 * result < 4 * 2000 * 64


def test_a_chunk_that_turns_out_too_large_is_made_again_in_smaller_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunks, "for_memory", lambda *_: 40)  # an estimate that is wrong
    found = vd.mc_predict(noisy_mlp(), X, 50, max_memory=2_000_000, engine="vmap")
    assert 1 <= found.chunk < 40
    assert found.samples is not None
    assert len(found.samples) == 50
