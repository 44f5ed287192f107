"""Attention head by head says what the fused kernel says, and stands back where it must."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from vardrop.sparsity.mixing import mix


def parts(batch: int = 64, keys: int = 28, queries: int = 28, heads: int = 2, width: int = 8) -> list[Tensor]:
    """Query, key and value as one product gives them: strided."""
    generator = torch.Generator().manual_seed(0)

    def apart(positions: int) -> tuple[Tensor, ...]:
        x = torch.randn(batch, positions, 3 * heads * width, generator=generator)
        return x.unflatten(-1, (3, heads, width)).permute(2, 0, 3, 1, 4).unbind()

    return [apart(queries)[0], *apart(keys)[1:]]


def reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The formula, in float64."""
    q, k, v = q.double(), k.double(), v.double()
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), v).flatten(2)


@pytest.fixture
def wide_vectors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A list that grows with every call of torch's attention."""
    calls: list[int] = []
    original = F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a: calls.append(1) or original(*a))
    return calls


@given(
    batch=st.integers(1, 80),
    keys=st.integers(1, 70),
    queries=st.integers(1, 40),
    heads=st.integers(1, 3),
    width=st.integers(1, 40),
)
def test_says_the_formula_for_every_shape(batch: int, keys: int, queries: int, heads: int, width: int) -> None:
    q, k, v = parts(batch, keys, queries, heads, width)
    with torch.no_grad():
        y = mix(q, k, v)
    assert y.shape == (batch, queries, heads * width)
    torch.testing.assert_close(y.double(), reference(q, k, v), atol=1e-5, rtol=1e-4)


def test_short_sequences_go_head_by_head(wide_vectors: None, fused: list[int]) -> None:
    q, k, v = parts()
    with torch.no_grad():
        y = mix(q, k, v)
    assert not fused
    torch.testing.assert_close(y.double(), reference(q, k, v), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("keys", [8, 16, 17, 23, 32, 48, 64, 77])
def test_sequences_that_fill_vectors_and_long_ones_are_fused(wide_vectors: None, fused: list[int], keys: int) -> None:
    with torch.no_grad():
        mix(*parts(keys=keys))
    assert fused


@pytest.mark.parametrize("shape", [{"batch": 8}, {"width": 40}], ids=str)
def test_few_examples_and_wide_heads_are_fused(wide_vectors: None, fused: list[int], shape: dict[str, int]) -> None:
    with torch.no_grad():
        mix(*parts(**shape))
    assert fused


def test_other_processors_are_fused(monkeypatch: pytest.MonkeyPatch, fused: list[int]) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with torch.no_grad():
        mix(*parts())
    assert fused


def test_masks_dropout_other_types_and_gradients_are_fused(wide_vectors: None, fused: list[int]) -> None:
    q, k, v = parts()
    with torch.no_grad():
        mix(q, k, v, torch.zeros(28, 28))
        mix(q, k, v, None, 0.5)
        mix(q.double(), k.double(), v.double())
    q.requires_grad_()
    mix(q, k, v).sum().backward()
    assert len(fused) == 4
    assert q.grad is not None


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # torch's kernel has no rule for vmap
def test_under_vmap_it_is_fused_and_right(wide_vectors: None, fused: list[int]) -> None:
    several = [torch.stack([part, 2 * part]) for part in parts()]
    with torch.no_grad():
        y = torch.func.vmap(mix)(*several)
    assert fused
    torch.testing.assert_close(y[1].double(), reference(*(part[1] for part in several)), atol=1e-5, rtol=1e-4)


def test_an_exported_program_takes_other_sizes(wide_vectors: None) -> None:
    class Mix(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return mix(q, k, v)

    size = torch.export.Dim("batch", min=2, max=1024)
    with torch.no_grad():
        program = torch.export.export(Mix(), tuple(parts()), dynamic_shapes=({0: size},) * 3)
        few = parts(batch=3)
        torch.testing.assert_close(program.module()(*few).double(), reference(*few), atol=1e-5, rtol=1e-4)


def test_the_gain_is_not_at_the_cost_of_extreme_scores(wide_vectors: None) -> None:
    q, k, v = parts()  # scores of some 10,000 have errors of 1e-3 in float32, and so has their softmax
    with torch.no_grad():
        y = mix(100 * q, 100 * k, v)
    torch.testing.assert_close(y.double(), reference(100 * q, 100 * k, v), atol=1e-2, rtol=1e-2)
