"""The fused form of the local trick against the same thing from its parts, with the same noise."""

import math

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.weights import fused, multiplicative

SHARINGS = [("layer", "input"), ("neuron", "input"), ("neuron", "output"), ("weight", "input")]


def gradients(layer: nn.Linear, x: torch.Tensor, seed: int) -> list[torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    y = layer(x)
    (y.square() * torch.arange(1.0, y.numel() + 1).view(y.shape)).sum().backward()
    found = [y.detach(), x.grad, *(p.grad for p in layer.parameters())]
    layer.zero_grad()
    return found


@pytest.mark.parametrize(("sharing", "unit"), SHARINGS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4), (4,), (0, 4)])
@pytest.mark.parametrize("max_alpha", [1.0, math.inf])
def test_equals_the_sum_of_its_parts(monkeypatch, sharing, unit, bias, shape, max_alpha):
    layer = nn.Linear(4, 3, bias=bias, dtype=torch.float64)
    config = vd.VariationalDropout(type="B", sharing=sharing, unit=unit, alpha=0.7, max_alpha=max_alpha)
    vd.convert_(layer, config)
    with torch.no_grad():  # some rates beyond the bound, where the gradient is projected
        layer.weight_log_alpha.add_(
            torch.linspace(-1, 1, layer.weight_log_alpha.numel()).view_as(layer.weight_log_alpha)
        )
    x = torch.randn(shape, dtype=torch.float64)
    if x.ndim == 2 and len(x):
        x[0] = 0.0  # a row without variance, where the gradient of the root is defined as 0
    fast = gradients(layer, x, seed=3)
    monkeypatch.setattr(multiplicative, "can_fuse", lambda *_: False)
    slow = gradients(layer, x, seed=3)
    for a, b in zip(fast, slow, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_frozen_parts_get_no_gradient():
    layer = nn.Linear(4, 3)
    vd.convert_(layer, vd.VariationalDropout(type="B", sharing="weight"))
    layer.weight_log_alpha.requires_grad_(False)
    layer(torch.randn(5, 4)).sum().backward()
    assert layer.weight_log_alpha.grad is None
    assert dict(layer.named_parameters())["weight"].grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_left_alone_where_it_does_not_apply(dtype):
    theta = torch.randn(3, 4)
    assert fused.can_fuse(torch.randn(5, 4), theta, theta)
    assert not fused.can_fuse(torch.randn(5, 4, dtype=dtype), theta.to(dtype), theta.to(dtype))
    with torch.autocast("cpu", torch.bfloat16):
        assert not fused.can_fuse(torch.randn(5, 4), theta, theta)
    inside = []
    torch.vmap(lambda x: inside.append(fused.can_fuse(x, theta, theta)) or x)(torch.randn(2, 5, 4))
    assert inside == [False]
