"""Networks of transformers, timm and torchvision, built from configuration with rates above 0."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import vmap

import vardrop as vd
from tests import architectures  # makes torchvision, and so the others, importable

Build = Callable[[], tuple[nn.Module, tuple[Any, ...]]]
_SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_IMAGE = {**_SMALL, "image_size": 16, "patch_size": 8}
_SEQ2SEQ = {
    "vocab_size": 50, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 2,
    "decoder_attention_heads": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16, "pad_token_id": 1, "bos_token_id": 0,
    "eos_token_id": 2, "decoder_start_token_id": 2, "max_position_embeddings": 20,
}  # fmt: skip
assert architectures.ALL


def tokens() -> Tensor:
    return torch.randint(3, 50, (2, 6))


def hugging_face(name: str, inputs: Callable[[], tuple[Any, ...]] = lambda: (tokens(),), **config: Any) -> Build:
    """A model by the name of its class, with a config of its own."""

    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        import transformers

        kind = getattr(transformers, name)
        return kind(kind.config_class(**config)), inputs()

    return build


def image(size: int) -> Callable[[], tuple[Any, ...]]:
    return lambda: (torch.randn(2, 3, size, size),)


def of_timm(name: str, size: int = 32, **options: Any) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        import timm

        return timm.create_model(name, pretrained=False, num_classes=5, **options), image(size)()

    return build


def of_torchvision(name: str, size: int = 32, **options: Any) -> Build:
    def build() -> tuple[nn.Module, tuple[Any, ...]]:
        import torchvision

        return torchvision.models.get_model(name, weights=None, **options), image(size)()

    return build


_BERT = {"vocab_size": 50, **_SMALL, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.3}
_GPT2 = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 2, "n_head": 2, "bos_token_id": 1,
         "eos_token_id": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0}  # fmt: skip
_VIT = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 3, "num_heads": 2}
_VIT_RATES = {"drop_path_rate": 0.2, "attn_drop_rate": 0.2, "proj_drop_rate": 0.2, "pos_drop_rate": 0.2}
_WAV2VEC2 = {
    **_SMALL, "vocab_size": 20, "hidden_dropout": 0.1, "layerdrop": 0.1, "conv_dim": (8, 8), "conv_stride": (5, 2),
    "conv_kernel": (10, 3), "num_conv_pos_embeddings": 4, "num_conv_pos_embedding_groups": 2,
    "num_feat_extract_layers": 2,
}  # fmt: skip
NETWORKS: dict[str, Build] = {
    "bert": hugging_face("BertForSequenceClassification", vocab_size=50, **_SMALL),
    "bert-attention": hugging_face("BertModel", **_BERT, attn_implementation="sdpa"),
    "bert-attention-eager": hugging_face("BertModel", **_BERT, attn_implementation="eager"),
    "gpt2": hugging_face("GPT2LMHeadModel", **{**_GPT2, "resid_pdrop": 0.1}),
    "gpt2-attention": hugging_face("GPT2LMHeadModel", **_GPT2, attn_pdrop=0.3),
    "vit": hugging_face("ViTForImageClassification", image(16), **_IMAGE, attention_probs_dropout_prob=0.3),
    "t5": hugging_face(
        "T5ForConditionalGeneration", lambda: (tokens(), None, tokens()), vocab_size=50, d_model=16, d_kv=8, d_ff=24,
        num_layers=2, num_heads=2, decoder_start_token_id=0,
    ),
    "bart": hugging_face("BartModel", **_SEQ2SEQ, dropout=0.1),
    "bart-attention": hugging_face("BartModel", **_SEQ2SEQ, dropout=0.0, attention_dropout=0.3),
    "bart-layerdrop": hugging_face(
        "BartModel", **_SEQ2SEQ, dropout=0.0, encoder_layerdrop=0.5, decoder_layerdrop=0.5
    ),
    "deberta": hugging_face("DebertaV2Model", vocab_size=50, **_SMALL),
    "llama": hugging_face("LlamaForCausalLM", vocab_size=50, **_SMALL, attention_dropout=0.3),
    "wav2vec2": hugging_face("Wav2Vec2Model", lambda: (torch.randn(2, 400),), **_WAV2VEC2),
    "beit": hugging_face("BeitModel", image(16), **_IMAGE, drop_path_rate=0.3, layer_scale_init_value=1.0),
    "timm-vit": of_timm("vit_tiny_patch16_224", 16, **_VIT, **_VIT_RATES),
    "timm-convnext": of_timm("convnext_atto", dims=(8, 8, 8, 8), depths=(1, 1, 1, 1), drop_path_rate=0.5),
    "timm-swin": of_timm(
        "swin_tiny_patch4_window7_224", 28, img_size=28, embed_dim=8, depths=(1, 1, 1, 1), num_heads=(1, 1, 2, 2),
        drop_path_rate=0.3, attn_drop_rate=0.2,
    ),
    "timm-densenet": of_timm("densenet121", block_config=(2, 2), drop_rate=0.3),
    "timm-efficientnet": of_timm("efficientnet_b0", drop_rate=0.3, drop_path_rate=0.3),
    "timm-resnet": of_timm("resnet18", 64, drop_block_rate=0.3, channels=(8, 8, 8, 8), drop_rate=0.1),
    "torchvision-mobilenet": of_torchvision("mobilenet_v3_small"),
    "torchvision-vit": lambda: (_torchvision_vit(), image(16)()),
}  # fmt: skip
ONE_BY_ONE = {
    "bart-layerdrop",
    "wav2vec2",
    "torchvision-mobilenet",
}  # vmap refuses: Python decides, or dropout in place


def _torchvision_vit() -> nn.Module:
    import torchvision

    model = torchvision.models.VisionTransformer(16, 8, 2, 2, 16, 24, dropout=0.1, attention_dropout=0.3, num_classes=5)
    nn.init.normal_(model.heads.head.weight)  # which is 0 at first
    return model


def result(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("name", NETWORKS)
def test_passes_vary_and_nothing_else_changes(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    model.eval()
    flags = {key: module.training for key, module in model.named_modules()}
    buffers = {key: buffer.clone() for key, buffer in model.named_buffers()}
    with torch.inference_mode():
        plain = result(model(*inputs))
        with vd.stochastic(model) as noise:
            passes = [result(model(*inputs)) for _ in range(6 if "layerdrop" in name else 2)]
        assert torch.equal(result(model(*inputs)), plain)
    assert noise.sources
    assert any(not torch.equal(one, passes[0]) for one in passes)
    assert all(one.shape == plain.shape for one in passes)
    assert noise.put_back == []
    assert set(noise.left_off) == ({"Wav2Vec2Model"} if name == "wav2vec2" else set())
    assert flags == {key: module.training for key, module in model.named_modules()}
    for key, buffer in model.named_buffers():
        assert torch.equal(buffer, buffers[key]), key


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", sorted(set(NETWORKS) - ONE_BY_ONE))
def test_all_passes_at_once_have_noise_of_their_own(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    with torch.no_grad(), vd.stochastic(model.eval()):
        y = vmap(lambda _: result(model(*inputs)), randomness="different")(torch.arange(3))
    assert not torch.equal(y[0], y[1])
    assert not torch.equal(y[1], y[2])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["bert", "bert-attention", "gpt2-attention", "bart", "timm-vit", "timm-densenet"])
def test_the_variance_is_that_of_training(name: str) -> None:
    """Where no batch norm stands in the way, or its statistics are frozen, all of training is noise."""
    torch.manual_seed(0)
    model, inputs = NETWORKS[name]()
    count = 150
    with torch.no_grad():
        model.train()
        for module in model.modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()
        trained = torch.stack([result(model(*inputs)) for _ in range(count)]).double().flatten(1)
        with vd.stochastic(model.eval()):
            ours = torch.stack([result(model(*inputs)) for _ in range(count)]).double().flatten(1)
    error = ((trained.var(0) + ours.var(0)) / count).sqrt()
    assert ((trained.mean(0) - ours.mean(0)).abs() <= 5 * error + 1e-6).all()
    spread, other = ((x - x.mean(0)).square().sum(1) for x in (trained, ours))  # one number a pass
    error = ((spread.var() + other.var()) / count).sqrt()
    assert (spread.mean() - other.mean()).abs() <= 4 * error


def test_outputs_and_shapes_of_training_stay_away() -> None:
    for name, options in (
        ("inception_v3", {"aux_logits": True, "init_weights": False}),
        ("googlenet", {"aux_logits": True, "init_weights": False}),
    ):
        model, inputs = of_torchvision(name, 96, **options)()
        with torch.no_grad(), vd.stochastic(model.eval()) as noise:
            assert isinstance(model(*inputs), Tensor)
        assert [source.kind for source in noise.sources][-1] == "Dropout"
        assert not model.training
    model, inputs = of_timm("vit_tiny_patch16_224", 16, **_VIT, patch_drop_rate=0.5, drop_rate=0.1)()
    with torch.no_grad(), vd.stochastic(model.eval()) as noise:
        assert model(*inputs).shape == (2, 5)
    assert noise.left_off == {"patch_drop": "it drops tokens, and shapes would change"}
    model, inputs = of_timm("deit_tiny_distilled_patch16_224", 16, **_VIT, drop_path_rate=0.3)()
    model.set_distilled_training(True)
    with torch.no_grad(), vd.stochastic(model.eval()):
        assert isinstance(model(*inputs), Tensor)
