"""The diagnosis of whole architectures that know nothing of it (timm, transformers): it runs, and leaves them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import architectures
import vardrop as vd

IMAGES = (
    "resnet18", "vit_tiny_patch16_224", "deit_tiny_patch16_224", "efficientnet_b0", "mobilenetv3_small_050",
    "convnext_atto", "regnetx_002", "densenet121", "gmixer_12_224", "edgenext_xx_small",
)  # fmt: skip
ARGUMENTS = {
    "bert": ("input_ids",),
    "gpt2": ("input_ids",),
    "vit": ("pixel_values",),
    "t5": ("input_ids", "attention_mask", "decoder_input_ids"),
    "llama": ("input_ids",),
}


def with_noise(name: str) -> tuple[nn.Module, dict[str, Any] | torch.Tensor]:
    """A network with its dropouts at 0.1, and a batch for it."""
    model, inputs = architectures.ALL[name]()
    vd.set_rates_(model, attention=0.1, residual=0.1, hidden=0.1, embedding=0.1, head=0.1, path=0.1)
    if name not in ARGUMENTS:
        return model, inputs[0]
    return model, {key: x for key, x in zip(ARGUMENTS[name], inputs, strict=True) if x is not None}


@pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours to fail on
@pytest.mark.parametrize("name", [*IMAGES, *ARGUMENTS])
def test_any_architecture_is_diagnosed(name: str) -> None:
    torch.manual_seed(0)
    model, batch = with_noise(name)
    before = {key: x.clone() for key, x in model.state_dict().items()}
    found = vd.diagnose(model, batch, max_batches=1)
    assert not any("stopped" in entry.reason or "traced" in entry.reason for entry in found.unjudged), str(found)
    assert found.findings == (), "they were built by people who know"
    norms = {key for key, module in model.named_modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)}
    assert {shift.name for shift in found.batchnorms} | {entry.where for entry in found.unjudged} >= norms
    assert all(torch.equal(before[key], x) for key, x in model.state_dict().items())


def test_the_sources_of_a_batchnorm_of_timms_are_those_that_run_before_it() -> None:
    model, batch = with_noise("efficientnet_b0")
    found = {shift.name: shift.sources for shift in vd.diagnose(model, batch, max_batches=1).batchnorms}
    assert found["bn1"] == ()
    assert found["blocks.1.1.bn3"] == ()  # its own branch is dropped behind it
    assert found["blocks.2.0.bn1"] == ("blocks.1.1.drop_path",)
