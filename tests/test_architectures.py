"""Conversion of whole architectures that know nothing of it (transformers, timm)."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import architectures
import vardrop as vd

TYPES = {
    "A": vd.VariationalDropout(type="A"),
    "B": vd.VariationalDropout(type="B", sharing="weight"),
}


def _unblock(model: nn.Module) -> nn.Module:
    """Away from initialisations at zero (residual branches, heads), behind which no gradient arrives."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model


def _run(model: nn.Module, inputs: tuple[object, ...]) -> Tensor:
    return architectures.logits(model(*inputs))


@pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours to fail on
@pytest.mark.parametrize("type_", ["A", "B"])
@pytest.mark.parametrize("name", architectures.ALL)
def test_any_architecture_converts_trains_and_comes_back(name: str, type_: str) -> None:
    torch.manual_seed(0)
    model, inputs = architectures.ALL[name]()
    _unblock(model).eval()
    classes = {path: type(module) for path, module in model.named_modules()}
    state = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        before = _run(model, inputs)

    report = vd.convert_(model, TYPES[type_])
    with torch.no_grad():
        assert torch.equal(_run(model, inputs), before), "evaluation is not what it was"

    model.train()
    first, second = _run(model, inputs), _run(model, inputs)
    assert not torch.equal(first, second), "training is deterministic"
    first.square().mean().backward()
    names = {id(p): path for path, p in model.named_parameters()}
    assert len(report.new_parameters) == len(set(map(id, report.new_parameters)) & set(names))
    untold = [names[id(p)] for p in report.new_parameters if p.grad is None or not p.grad.any()]
    assert untold == [], "no gradient from the data"
    assert all(p.grad.isfinite().all() for p in report.new_parameters if p.grad is not None)
    assert vd.kl_divergence(model).isfinite()

    vd.restore_(model.eval())
    assert {path: type(module) for path, module in model.named_modules()} == classes
    assert list(model.state_dict()) == list(state)
    model.load_state_dict(state)  # two training passes have moved the running statistics of BatchNorm
    with torch.no_grad():
        assert torch.equal(_run(model, inputs), before), "restored, it answers otherwise"


def test_transformers_are_converted_everywhere() -> None:
    """What is left alone is known by name, and has no weight matrix."""
    left: dict[str, str] = {}
    for name in ("bert", "gpt2", "vit", "t5", "llama"):
        model, _ = architectures.ALL[name]()
        report = vd.convert_(model, TYPES["A"])
        left |= {f"{name}.{path}": why for path, why in report.skipped.items() if "no weight matrix" not in why}
    assert list(left) == ["vit.vit.embeddings"]  # class token and position embeddings, which are no layer's weight
