"""Networks of other people, from their configurations, tiny: conversion has to work on what it has never heard of."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

IMAGE_NETWORKS = {  # of timm, with the size of image that they are fed here
    "resnet18": 32,
    "vit_tiny_patch16_224": 32,
    "deit_tiny_patch16_224": 32,
    "efficientnet_b0": 32,
    "mobilenetv3_small_050": 32,
    "convnext_atto": 32,
    "regnetx_002": 32,
    "densenet121": 32,
    "gmixer_12_224": 32,
    "edgenext_xx_small": 64,
    "swin_tiny_patch4_window7_224": 28,
    "mobilevit_xxs": 64,
}
_TOLD_THEIR_SIZE = ("vit", "deit", "gmixer", "swin")


def _make_torchvision_importable() -> None:
    """Declare the operators whose absence stops torchvision, and so timm and transformers, on some CPU builds."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ImportError):
        try:
            import torchvision  # noqa: F401
        except RuntimeError:  # operator torchvision::nms does not exist
            for name in ("nms", "qnms"):
                _TORCHVISION.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


_TORCHVISION = torch.library.Library("torchvision", "FRAGMENT")  # at module level: its definitions go when it does
_make_torchvision_importable()


def image_network(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    import timm

    size = IMAGE_NETWORKS[name]
    sized = {"img_size": size} if name.startswith(_TOLD_THEIR_SIZE) else {}
    model = timm.create_model(name, pretrained=False, num_classes=5, drop_rate=0.0, **sized)
    return model, (torch.randn(2, 3, size, size),)


def _tokens() -> Tensor:
    return torch.randint(1, 50, (2, 6))


def bert() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=50, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return BertForSequenceClassification(config), (_tokens(),)


def gpt2() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import GPT2Config, GPT2LMHeadModel

    rates = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    config = GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=2, n_head=2, **rates)
    return GPT2LMHeadModel(config), (_tokens(),)


def vit() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    return ViTForImageClassification(config), (torch.randn(2, 3, 16, 16),)


def t5() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=50,
        d_model=16,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        dropout_rate=0.0,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config), (_tokens(), None, _tokens())


def llama() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    return LlamaForCausalLM(config), (_tokens(),)


def transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Transformer(8, 2, 2, 2, 16, dropout=0.0, batch_first=True), (torch.randn(2, 3, 8), torch.randn(2, 4, 8))


Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
ALL: dict[str, Build] = {build.__name__: build for build in (transformer, bert, gpt2, vit, t5, llama)}
ALL |= {name: lambda name=name: image_network(name) for name in IMAGE_NETWORKS}  # type: ignore[misc]


def logits(output: Any) -> Tensor:
    """The tensor that a network's answer is about."""
    if isinstance(output, Tensor):
        return output
    return output[0] if isinstance(output, tuple) else output.logits
