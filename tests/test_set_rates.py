"""`set_rates_`: every role acts where it says, in the models of three libraries, and what is not set is told."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import architectures
import vardrop as vd
from vardrop import layers, rates, roles
from vardrop.presets import PRESETS

pytestmark = pytest.mark.filterwarnings("default")  # what other libraries warn of is not ours to fail on

ALL = dict.fromkeys(roles.ROLES, 0.0)


def encoder_layer() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), (torch.randn(2, 3, 8),)


def lstm() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.LSTM(4, 8, num_layers=2), (torch.randn(5, 2, 4),)


def mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    return nn.Sequential(nn.Linear(4, 16), nn.Dropout(0.0), nn.Linear(16, 2)), (torch.randn(3, 4),)


def bart() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import BartConfig, BartForConditionalGeneration

    config = BartConfig(
        vocab_size=50, d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=2, dropout=0.0,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, max_position_embeddings=16,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=2,
    )  # fmt: skip
    return BartForConditionalGeneration(config), (torch.randint(3, 50, (2, 6)),)


def beit() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import BeitConfig, BeitForImageClassification

    config = BeitConfig(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=24, image_size=16, patch_size=8,
        drop_path_rate=0.3,
    )  # fmt: skip
    return BeitForImageClassification(config), (torch.randn(2, 3, 16, 16),)


def dinov2() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import Dinov2Config, Dinov2ForImageClassification

    config = Dinov2Config(
        hidden_size=16, num_hidden_layers=3, num_attention_heads=2, image_size=28, patch_size=14, mlp_ratio=2
    )
    return Dinov2ForImageClassification(config), (torch.randn(2, 3, 28, 28),)


def bloom() -> tuple[nn.Module, tuple[Any, ...]]:
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(vocab_size=50, hidden_size=16, n_layer=2, n_head=2)
    return BloomForCausalLM(config), (torch.randint(3, 50, (2, 6)),)


BUILD: dict[str, Callable[[], tuple[nn.Module, tuple[Any, ...]]]] = {
    build.__name__: build for build in (encoder_layer, lstm, mlp, bart, beit, dinov2, bloom)
}
TRANSFORMERS = ["bert", "gpt2", "vit", "t5", "llama", "bart", "beit", "dinov2", "bloom"]
IMAGES = ["vit_tiny_patch16_224", "convnext_atto", "efficientnet_b0", "densenet121", "swin_tiny_patch4_window7_224"]
BUILD |= {name: architectures.ALL[name] for name in ["transformer", *TRANSFORMERS[:5], *IMAGES]}
HAS = {
    "encoder_layer": "attention residual hidden",
    "lstm": "hidden",
    "mlp": "hidden",
    "transformer": "attention residual hidden",
    "bert": "attention residual embedding head",
    "gpt2": "attention residual embedding",
    "vit": "attention residual embedding",
    "t5": "attention residual embedding hidden",
    "llama": "attention",
    "bart": "attention residual embedding hidden path",
    "beit": "attention residual embedding path",
    "bloom": "attention residual",
    "vit_tiny_patch16_224": "attention residual embedding hidden head path",
    "convnext_atto": "residual hidden head path",
    "efficientnet_b0": "head path",
    "densenet121": "hidden head",
    "swin_tiny_patch4_window7_224": "attention residual hidden head path",
}


def build(name: str) -> tuple[nn.Module, tuple[Any, ...]]:
    torch.manual_seed(0)
    model, inputs = BUILD[name]()
    with torch.no_grad():  # away from branches that are initialised at zero
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train(), inputs


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        return architectures.logits(model(*inputs))


def rates_of(model: nn.Module) -> dict[str, float]:
    return {site.name: site.rate for site in roles.sites(model) if site.owner is not None}


# --- every role acts --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HAS)
def test_every_role_is_found_and_makes_the_outputs_vary(name: str) -> None:
    model, inputs = build(name)
    for role in HAS[name].split():
        rate = 0.5 if role == "path" else 0.9  # at 0.9 all branches are often dropped, time after time
        report = vd.set_rates_(model, **{**ALL, role: rate})
        assert any(new == rate for _, new in report.set.values()), role
        assert role not in report.missing
        first = run(model, inputs)
        assert any(not torch.equal(run(model, inputs), first) for _ in range(3)), f"{role} changes nothing"
    assert set(HAS[name].split()) == {site.role for site in roles.sites(model) if site.role and site.owner is not None}

    vd.set_rates_(model, preset="large-model")
    assert torch.equal(run(model, inputs), run(model, inputs)), "some dropout was not switched off"
    assert not any(rates_of(model).values())


def test_roles_are_told_apart_in_bert() -> None:
    model, _ = build("bert")
    vd.set_rates_(model, attention=0.1, residual=0.2, embedding=0.3, head=0.4)
    assert rates_of(model) == {
        "bert.embeddings.dropout": pytest.approx(0.3),
        **{f"bert.encoder.layer.{i}.attention.self.dropout": 0.1 for i in range(2)},
        **{f"bert.encoder.layer.{i}.attention.output.dropout": 0.2 for i in range(2)},
        **{f"bert.encoder.layer.{i}.output.dropout": 0.2 for i in range(2)},
        "dropout": 0.4,
    }


def test_roles_are_told_apart_in_torchvision() -> None:
    from torchvision.models import SwinTransformer, VisionTransformer

    vit = VisionTransformer(image_size=16, patch_size=8, num_layers=1, num_heads=2, hidden_dim=16, mlp_dim=24)
    by_role = {"attention": 0.1, "residual": 0.2, "embedding": 0.3, "hidden": 0.4}
    vd.set_rates_(vit, **by_role)
    layer = "encoder.layers.encoder_layer_0"
    expected = {"encoder.dropout": 0.3, f"{layer}.self_attention.dropout": 0.1, f"{layer}.dropout": 0.2}
    expected |= {f"{layer}.mlp.2": 0.4, f"{layer}.mlp.4": 0.2}
    assert expected.items() <= rates_of(vit).items()

    swin = SwinTransformer([4, 4], 8, [2], [2], [2, 2])
    vd.set_rates_(swin, **by_role, path=0.5)
    part = {"attn.attention_dropout": 0.1, "attn.dropout": 0.2, "stochastic_depth": 0.5, "mlp.2": 0.4, "mlp.4": 0.2}
    assert rates_of(swin) == {f"features.1.{i}.{name}": rate for i in range(2) for name, rate in part.items()}


def test_block_sets_dropblock() -> None:
    import timm

    torch.manual_seed(0)
    model = timm.create_model("resnet18", num_classes=3, drop_block_rate=0.1, zero_init_last=False)
    report = vd.set_rates_(model, block=0.2)
    assert report.set["layer4.0.drop_block"] == (0.1, 0.2)
    assert report.set["layer1.0.drop_block"] == (0.0, 0.2)
    assert type(model.layer1[0].drop_block) is layers.DropBlock2d
    model.train()
    x = torch.randn(2, 3, 64, 64)
    assert not torch.equal(run(model, (x,)), run(model, (x,)))


def test_empty_places_for_dropblock_are_filled() -> None:
    model, inputs = architectures.ALL["resnet18"]()
    state = model.state_dict()
    report = vd.set_rates_(model, block=lambda index, depth: 0.1 if index >= depth // 2 else 0.0)
    assert sorted(report.set) == [f"layer{stage}.{i}.drop_block" for stage in (3, 4) for i in range(2)]
    assert repr(model.layer4[1].drop_block) == "DropBlock2d(p=0.1, block_size=7)"
    assert type(model.layer1[0].drop_block) is nn.Identity
    model.load_state_dict(state)
    model.train()
    assert architectures.logits(model(*inputs)).isfinite().all()
    assert vd.set_rates_(model, block=0.0).set["layer4.0.drop_block"] == (pytest.approx(0.1), 0.0)


def test_places_for_dropblock_without_a_convolution_beside_them_are_left_empty() -> None:
    class Block(nn.Module):
        def __init__(self, *convolutions: nn.Module) -> None:
            super().__init__()
            self.drop_block = nn.Identity()
            self.convolutions = nn.ModuleList(convolutions)
            for index, convolution in enumerate(convolutions):
                setattr(self, f"conv{index}", convolution)

    model = nn.ModuleList([Block(), Block(nn.Conv1d(1, 1, 1)), Block(nn.Conv1d(1, 1, 1), nn.Conv2d(1, 1, 1))])
    report = vd.set_rates_(model, block=0.1)
    assert list(report.set) == ["1.drop_block"]
    assert type(model[1].drop_block) is layers.DropBlock1d
    assert all(report.skipped[f"{i}.drop_block"].startswith("was built without this dropout") for i in (0, 2))


def test_our_own_layers_have_roles() -> None:
    model = nn.ModuleDict(
        {
            "a": layers.AttentionDropout(0.0),
            "b": layers.ResidualDropout(0.0),
            "c": layers.TokenDropout(0.0),
            "d": layers.DropPath(0.0),
            "e": layers.DropBlock2d(0.0),
        }
    )
    report = vd.set_rates_(model, attention=0.1, residual=0.2, embedding=0.3, path=0.4, block=0.5)
    assert {name: new for name, (_, new) in report.set.items()} == {"a": 0.1, "b": 0.2, "c": 0.3, "d": 0.4, "e": 0.5}
    assert [round(module.p, 6) for module in model.values()] == [0.1, 0.2, 0.3, 0.4, 0.5]


def test_an_unknown_dropout_is_listed_and_keeps_its_rate() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.dropout, self.mystery, self.strange_drop_share = nn.Dropout(0.1), nn.Dropout(0.2), 0.3

    class NoRateDropout(nn.Module):
        pass

    model = nn.ModuleDict({"odd": Odd(), "own": NoRateDropout()})
    report = vd.set_rates_(model, hidden=0.5)
    assert report.set == {"odd.dropout": (0.1, 0.5)}
    assert set(report.not_judged) == {"odd.mystery", "odd.strange_drop_share", "own"}
    assert (model["odd"].mystery.p, model["odd"].strange_drop_share) == (0.2, 0.3)
    assert "not judged: odd.mystery" in str(report)


# --- by layer ---------------------------------------------------------------------------------------------------


def test_a_function_gets_index_and_depth() -> None:
    seen = []

    def rate(index: int, depth: int) -> float:
        seen.append((index, depth))
        return index / 10

    model, _ = build("t5")
    vd.set_rates_(model, attention=rate)
    assert set(seen) == {(i, 4) for i in range(4)}  # two blocks of the encoder, two of the decoder
    assert model.encoder.block[1].layer[0].SelfAttention.dropout == 0.1
    assert model.decoder.block[1].layer[1].EncDecAttention.dropout == 0.3


@pytest.mark.parametrize("built", [0.0, 0.3])
@pytest.mark.parametrize("name", ["deit_tiny_patch16_224", "swin_tiny_patch4_window7_224", "convnext_atto", "resnet18"])
def test_deit_gives_the_rates_that_timm_gives(name: str, built: float) -> None:
    import timm

    model = timm.create_model(name, drop_path_rate=built)
    vd.set_rates_(model, preset="deit")
    theirs = timm.create_model(name, drop_path_rate=0.1)

    def path(model: nn.Module) -> dict[str, float]:
        return {site.name: site.rate for site in roles.sites(model) if site.role == "path" and site.rate > 0}

    assert len(path(theirs)) > 5
    assert path(model) == pytest.approx(path(theirs), abs=1e-6)
    assert not any(site.rate for site in roles.sites(model) if site.role != "path")


def test_presets_and_what_replaces_them() -> None:
    model, _ = build("gpt2")
    report = vd.set_rates_(model, preset="gpt-2", residual=0.3)
    assert {round(rate, 3) for name, rate in rates_of(model).items() if "resid" in name or "mlp" in name} == {0.3}
    assert rates_of(model)["transformer.drop"] == rates_of(model)["transformer.h.0.attn.attn_dropout"] == 0.1
    assert report.missing == {}
    for preset in PRESETS:
        assert f'``"{preset}"``' in (vd.set_rates_.__doc__ or "")


def test_what_a_preset_wants_of_the_optimiser_is_told() -> None:
    report = vd.set_rates_(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)), preset="large-model", hidden=0.0, head=0.0)
    assert report.optimizer == {"weight_decay": 0.1, "clip_norm": 1.0}
    assert str(report).endswith("yours to set: weight_decay=0.1\nyours to set: clip_norm=1")
    assert vd.set_rates_(nn.TransformerEncoderLayer(8, 2, 16), preset="bert").optimizer == {}


def test_the_table_of_presets_has_them_all_with_their_sources() -> None:
    page = (Path(__file__).resolve().parents[1] / "docs" / "layers.md").read_text(encoding="utf-8")
    for name, preset in PRESETS.items():
        assert f'| `"{name}"` | {preset.about} | {preset.source} |' in page


# --- configs ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_a_model_built_from_the_saved_config_has_the_same_rates(name: str) -> None:
    model, _ = build(name)
    rate = dict.fromkeys(["residual", "embedding", "hidden", "head"], 0.25)
    linear = (lambda i, n: 0.2 * i / (n - 1)) if name == "beit" else 0.15
    report = vd.set_rates_(model, **rate, attention=0.25 if name == "t5" else 0.35, path=linear)
    assert any("config" in key for key in report.set)
    assert report.skipped == {}
    assert report.not_judged == []
    again = type(model)(type(model.config).from_dict(model.config.to_dict()))
    ours, theirs = rates_of(model), rates_of(again)
    assert {key: rate for key, rate in ours.items() if rate} == pytest.approx(
        {key: rate for key, rate in theirs.items() if rate}, abs=1e-6
    )


def test_a_field_without_one_rate_is_left_and_told() -> None:
    model, _ = build("bert")
    report = vd.set_rates_(model, residual=0.2, attention=lambda i, n: i / 10)
    assert report.skipped["config.hidden_dropout_prob"] == "stands for rates that now differ (0, 0.2)"
    assert report.skipped["config.attention_probs_dropout_prob"] == "stands for rates that now differ (0, 0.1)"
    assert model.config.hidden_dropout_prob == 0.0
    model, _ = build("beit")
    report = vd.set_rates_(model, path=0.2)
    assert "grow linearly" in report.skipped["config.drop_path_rate"]
    model, _ = build("gpt2")
    report = vd.set_rates_(model, attention=0.1, head=lambda i, n: 0.1)
    assert "a function of the layer" in report.skipped["config.summary_first_dropout"]


def test_a_field_that_is_not_understood_is_listed() -> None:
    model, _ = build("bert")
    model.config.some_drop_share = 0.1
    report = vd.set_rates_(model, residual=0.2)
    assert report.not_judged == ["config.some_drop_share"]
    assert model.config.some_drop_share == 0.1


# --- what is left alone, and errors -----------------------------------------------------------------------------


def test_what_cannot_be_set_has_a_reason() -> None:
    model = nn.ModuleDict(
        {
            "lstm": nn.LSTM(4, 4),
            "mlp": nn.Sequential(
                layers.GaussianDropout(rates.learned(0.1), features=4),
                layers.Dropout(rates.linear(0.0, 0.1, steps=3)),
                nn.Dropout(0.5),
                nn.Linear(4, 4),
                nn.Dropout(0.1),
            ),
        }
    )
    vd.convert_(model, vd.VariationalDropout(), where="mlp.3")
    report = vd.set_rates_(model, hidden=0.3, path=0.1)
    assert report.set == {"mlp.4": (0.1, 0.3)}
    words = {"lstm.dropout": "one layer", "mlp.0": "learned rate", "mlp.1": "a schedule", "mlp.2": "switched off"}
    assert all(part in report.skipped[name] for name, part in words.items())
    assert set(report.skipped) == set(words)
    assert report.missing == {"path": "the model has no dropout of this role"}
    assert "left alone: lstm.dropout: has one layer" in str(report)
    assert "not found: path" in str(report)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["Deberta", "DebertaV2"])
@pytest.mark.parametrize("asked", [{"head": 0.3}, {"residual": 0.2, "embedding": 0.2, "hidden": 0.2}])
def test_a_head_that_follows_another_field_gets_one_of_its_own(name: str, asked: dict[str, float]) -> None:
    import transformers

    sizes = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    kind = getattr(transformers, f"{name}ForSequenceClassification")
    model = kind(getattr(transformers, f"{name}Config")(**sizes, intermediate_size=8, pooler_hidden_size=8))
    report = vd.set_rates_(model, **asked)
    assert report.set["config.cls_dropout"][1] == model.dropout.p == asked.get("head", 0.1)
    again = kind(type(model.config).from_dict(model.config.to_dict()))
    assert rates_of(again) == rates_of(model)


def test_missing_says_why() -> None:
    model, _ = architectures.ALL["resnet18"]()
    scheduled = layers.DropBlock2d(vd.rates.linear(0.0, 0.1, steps=2))
    for module in model.modules():
        if hasattr(module, "drop_block"):
            module.drop_block = scheduled
    report = vd.set_rates_(model, head=0.1, block=0.1, path=0.0)
    assert report.missing == {
        "block": "all that the model has are left alone",
        "path": "the model has empty places for it only, which is a rate of 0",
    }


def test_a_new_drop_path_lies_where_the_model_does_and_takes_old_checkpoints() -> None:
    model, _ = build("vit_tiny_patch16_224")
    state = model.state_dict()
    model.to(torch.float64).eval()
    vd.set_rates_(model, path=0.2)
    made = model.blocks[0].drop_path1
    assert isinstance(made, layers.DropPath)
    assert not made.training
    model.load_state_dict(state)
    assert made.p == pytest.approx(0.2)


def test_set_twice_is_set_once() -> None:
    model, _ = build("vit_tiny_patch16_224")
    vd.set_rates_(model, attention=0.1, path=0.2)
    before = rates_of(model)
    report = vd.set_rates_(model, attention=0.1, path=0.2)
    assert rates_of(model) == before
    assert all(old == pytest.approx(new) for old, new in report.set.values())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, r"a rate must be given for some role \(attention, .*\), or a preset, got none"),
        ({"preset": "resnet"}, r"preset must be one of bert, gpt-2, deit, large-model, got 'resnet'"),
        ({"hidden": 1.5}, r"vardrop.set_rates_\(hidden=\): p must be a dropout rate in \[0, 1\], got 1.5"),
        ({"hidden": lambda i, n: -1.0}, r"p must be a dropout rate in \[0, 1\], got -1.0"),
        ({"path": 0.1}, r"must have a dropout for one of path, got none that could be set. 0: its role is not known"),
    ],
)
def test_errors_leave_the_model_as_it_was(arguments: dict[str, Any], words: str) -> None:
    model = nn.ModuleDict({"0": nn.Sequential(nn.Dropout(0.1), nn.Dropout(0.2)), "own": nn.Dropout(0.3)})
    if "path" in arguments:
        model = nn.ModuleDict({"0": type("OddDropout", (nn.Module,), {})()})
    before = rates_of(model)
    with pytest.raises(ValueError, match=words):
        vd.set_rates_(model, **arguments)
    assert rates_of(model) == before


def test_a_rate_that_a_layer_refuses_changes_nothing() -> None:
    model = nn.Sequential(nn.Dropout(0.1), layers.GaussianDropout(0.2))
    with pytest.raises(ValueError, match=r"p must be a dropout rate in \[0, 1\), got 1.0"):
        vd.set_rates_(model, hidden=1.0)
    assert model[0].p == 0.1


def test_a_model_is_needed() -> None:
    with pytest.raises(TypeError, match=r"set_rates_: model must be a torch.nn.Module, got dict"):
        vd.set_rates_({}, hidden=0.1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"got none that could be set. It has no dropout at all"):
        vd.set_rates_(nn.Linear(2, 2), hidden=0.1)


def test_a_dropout_alone_is_hidden() -> None:
    model = nn.Dropout(0.1)
    assert vd.set_rates_(model, hidden=0.2).set == {"Dropout": (0.1, 0.2)}
    assert model.p == 0.2


def test_configs_inside_of_a_config_are_looked_at_too() -> None:
    """MPT keeps the rate of its attention in a part of the config that no module has, and that takes whole numbers."""
    from transformers import MptConfig, MptForCausalLM

    model = MptForCausalLM(MptConfig(vocab_size=50, d_model=16, n_layers=2, n_heads=2))
    report = vd.set_rates_(model, attention=0.3)
    assert report.set["transformer.blocks.0.attn.attn_dropout_p"] == (0.0, 0.3)
    name = "config.attn_config.attn_pdrop"
    if name in report.skipped:
        assert report.skipped[name].startswith("does not take 0.3: ")
    else:
        assert model.config.attn_config.attn_pdrop == 0.3


def test_rates_of_models_on_the_meta_device() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.drop_path = nn.Linear(2, 2), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.drop_path(self.linear(x))

    with torch.device("meta"):
        model = nn.Sequential(Block(), Block())
    vd.set_rates_(model, path=0.2)
    assert vd.set_rates_(model, path=0.3).set["0.drop_path"] == (pytest.approx(0.2), 0.3)
    model.to_empty(device="cpu")
    assert model[0].drop_path.p == pytest.approx(0.3)  # type: ignore[union-attr]
