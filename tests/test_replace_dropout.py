"""`replace_dropout_`: what is swapped starts at the same rate, learns, and leaves the rest of the model alone."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

import architectures
import vardrop as vd
from vardrop import layers, rates

KINDS = ["gaussian", "variational", "concrete"]


def net(p: float = 0.2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Dropout(p), nn.Linear(64, 8), nn.Dropout(p), nn.Linear(8, 2))


# --- what is swapped --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_dropout_starts_at_its_old_rate(kind: str) -> None:
    model = net()
    model[4].p = 0.4
    keys = [key for key in model.state_dict() if "rate" not in key]
    x = torch.randn(5, 4)
    expected = copy.deepcopy(model).eval()(x)
    report = vd.replace_dropout_(model, kind)
    assert report.replaced == {"2": 0.2, "4": 0.4}
    assert [model[i].p for i in (2, 4)] == pytest.approx([0.2, 0.4])
    assert [key for key in model.state_dict() if "rate" not in key] == keys
    assert torch.equal(model.eval()(x), expected)
    model.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize(("kind", "ratio"), [("gaussian", 1.0), ("variational", 1.0), ("concrete", 0.9)])
def test_the_noise_has_mean_one_and_the_variance_of_the_dropout(kind: str, ratio: float) -> None:
    model = net(0.2)
    vd.replace_dropout_(model, kind)
    torch.manual_seed(1)
    noise = model[2](torch.ones(2000, 64))
    count = noise.numel()
    variance = 0.25  # p / (1 - p)
    assert noise.mean().item() == pytest.approx(1, abs=4 * (variance / count) ** 0.5 + 0.002)
    assert noise.var().item() == pytest.approx(ratio * variance, rel=0.04)  # the relaxed mask has a tenth less


@pytest.mark.parametrize("kind", ["variational", "concrete"])
def test_learned_rates_get_gradients_from_data_and_divergence(kind: str) -> None:
    model = net()
    report = vd.replace_dropout_(model, kind)
    names = {id(p): name for name, p in model.named_parameters()}
    assert [names[id(p)] for p in report.new_parameters] == ["2.rate_logit", "4.rate_logit"]
    elbo = vd.ELBO(model, num_data=100)
    elbo(model(torch.randn(16, 4)).square().mean()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in report.new_parameters)


def test_the_divergence_of_variational_counts_the_units_behind_it() -> None:
    model = net()
    vd.replace_dropout_(model, "variational")
    each = vd.kl.log_uniform(torch.tensor(0.25).log())
    assert vd.kl_divergence(model).item() == pytest.approx((64 + 8) * each.item(), rel=1e-5)


def test_the_divergence_of_concrete_is_that_of_the_layer_that_wraps() -> None:
    model = net(0.3)
    vd.replace_dropout_(model, "concrete")
    wrapped = [layers.ConcreteDropout(rates.learned(0.3), model[i]) for i in (3, 5)]
    expected = sum(layer.kl() for layer in wrapped)
    torch.testing.assert_close(vd.kl_divergence(model), expected)


def test_concrete_drops_channels_before_a_convolution() -> None:
    model = nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(3, 4, 3), nn.Dropout(0.5), nn.Conv2d(4, 4, 3))
    report = vd.replace_dropout_(model, "concrete")
    assert report.replaced == {"0": 0.5}
    assert "right before" in report.skipped["2"]
    y = model[0](torch.ones(2, 3, 5, 5))
    assert torch.equal(y, y[..., :1, :1].expand_as(y))


CHANNELS = [(nn.Dropout1d, nn.Conv1d, 1), (nn.Dropout2d, nn.Conv2d, 2), (nn.Dropout3d, nn.Conv3d, 3)]


@pytest.mark.parametrize(("dropout", "conv", "spatial"), CHANNELS)
@pytest.mark.parametrize("kind", ["gaussian", "variational"])
def test_channels_that_shared_a_coin_share_a_draw(
    kind: str, dropout: type[nn.Module], conv: type[nn.Module], spatial: int
) -> None:
    model = nn.Sequential(dropout(0.2), conv(6, 2, 1), nn.ReLU(), dropout(0.3))
    report = vd.replace_dropout_(model, kind, features=9)
    assert report.replaced == {"0": 0.2, "3": 0.3}
    torch.manual_seed(0)
    y = model[0](torch.ones(500, 6, *[2] * spatial)).flatten(2)
    assert torch.equal(y, y[..., :1].expand_as(y))
    assert y[..., 0].var().item() == pytest.approx(0.25, rel=4 * (2 / 3000) ** 0.5)
    assert (model[0].features, model[3].features) == ((6, 9) if kind == "variational" else (None, None))


def test_channels_that_the_model_does_not_tell_are_asked_for() -> None:
    model = nn.Sequential(nn.Dropout2d(0.1), nn.Conv2d(2, 2, 1), nn.Dropout2d(0.1), nn.Flatten(), nn.Linear(8, 2))
    report = vd.replace_dropout_(model, "variational")
    assert list(report.replaced) == ["0"]  # the inputs of the linear layer are no channels
    assert "number of channels that the model does not tell" in report.skipped["2"]


def test_three_dimensions_are_a_batch_of_sequences_to_dropout2d_and_refused_by_what_replaces_it() -> None:
    model = nn.Sequential(nn.Dropout2d(0.5), nn.Conv2d(2, 2, 1))
    vd.replace_dropout_(model)
    with pytest.raises(IndexError, match=r"shared must name dimensions of x, got 3 for shape \(4, 2, 5\)"):
        model[0](torch.ones(4, 2, 5))


def test_the_representation_shows_what_concrete_noise_stands_before() -> None:
    model = net()
    vd.replace_dropout_(model, "concrete")
    assert repr(model[2]) == (
        "ConcreteDropout(p=0.2, learned, before=Linear(in_features=64, out_features=8, bias=True))"
    )


def test_concrete_noise_before_random_weights_is_refused() -> None:
    model = net()
    vd.convert_(model, vd.VariationalDropout(), where="3", replace_dropout=False)
    report = vd.replace_dropout_(model, "concrete")
    assert list(report.replaced) == ["4"]
    assert "noise upon noise" in report.skipped["2"]


def test_a_copy_reads_its_own_weights() -> None:
    model = net()
    vd.replace_dropout_(model, "concrete")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        before = vd.kl_divergence(other).item()
        with torch.no_grad():
            other[3].weight.mul_(100)
        assert vd.kl_divergence(other).item() > before
        assert other[2].layer is other[3]
    assert model[2].layer is model[3]


def test_a_function_makes_any_module() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.AlphaDropout(0.2), nn.Dropout2d(0.3))
    report = vd.replace_dropout_(model, lambda p: layers.LockedDropout(p))
    assert report.replaced == {"0": 0.1, "1": 0.2, "2": 0.3}
    assert all(type(module) is layers.LockedDropout for module in model)


def test_a_shared_dropout_stays_shared() -> None:
    shared = nn.Dropout(0.1)
    model = nn.ModuleDict(
        {"a": nn.Sequential(shared, nn.Linear(2, 2)), "b": nn.ModuleList([shared, nn.Linear(2, 2)]), "c": shared}
    )
    report = vd.replace_dropout_(model)
    assert list(report.replaced) == ["a.0"]
    assert model["a"][0] is model["b"][0] is model["c"]
    assert isinstance(model["c"], layers.GaussianDropout)


def test_mode_is_kept_and_where_selects() -> None:
    model = net().eval()
    report = vd.replace_dropout_(model, where=["4"])
    assert report.replaced == {"4": 0.2}
    assert report.skipped == {"2": "is not selected by where"}
    assert not model[4].training
    assert list(vd.replace_dropout_(model, where=lambda module, name: name == "2").replaced) == ["2"]


def test_a_plain_checkpoint_loads() -> None:
    state = net().state_dict()
    model = net()
    vd.replace_dropout_(model, "variational")
    model.load_state_dict(state)
    assert model[2].p == pytest.approx(0.2)


# --- what is not ------------------------------------------------------------------------------------------------


def test_what_is_not_swapped_has_a_reason() -> None:
    class Mine(nn.Dropout):
        pass

    class Fused(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            return nn.functional.dropout(x, self.drop.p, self.training)

    hooked = nn.Dropout(0.1)
    hooked.register_forward_hook(lambda module, inputs, output: None)
    model = nn.ModuleDict(
        {
            "zero": nn.Dropout(0.0),
            "one": nn.Dropout(1.0),
            "mine": Mine(0.1),
            "alpha": nn.AlphaDropout(0.1),
            "ours": layers.Dropout(0.1),
            "hooked": hooked,
            "fused": Fused(),
            "attention": nn.MultiheadAttention(4, 2, dropout=0.1),
            "high": nn.Sequential(nn.Dropout(0.6), nn.Linear(2, 2), nn.Dropout(0.1)),
            "off": nn.Sequential(nn.Dropout(0.3), nn.Linear(2, 2)),
        }
    )
    vd.convert_(model["off"], vd.VariationalDropout())
    model["plain"] = nn.Dropout(0.2)
    report = vd.replace_dropout_(model, "variational", features=7)
    assert report.replaced == {"high.2": 0.1, "plain": 0.2}
    assert model["plain"].features == 7
    words = {
        "zero": "p = 0",
        "one": "no noise but zero",
        "mine": "class Mine is a subclass",
        "alpha": "other noise than independent units",
        "ours": "class Dropout is not a plain dropout",
        "hooked": "has hooks",
        "fused.drop": "Fused reads its p",
        "attention.dropout": "MultiheadAttention hands the number 0.1 on",
        "high.0": "alpha of variational dropout goes up to 1",
        "off.0": "switched off",
    }
    assert all(part in report.skipped[name] for name, part in words.items()), report
    assert set(report.skipped) == set(words)
    assert "left alone: fused.drop" in str(report)
    assert "plain: p = 0.2" in str(report)


def test_units_that_are_not_known_are_asked_for() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Dropout(0.1), nn.Linear(3, 3)), "b": nn.Dropout(0.1)})
    report = vd.replace_dropout_(model, "variational")
    assert report.replaced == {"a.0": 0.1}
    assert "pass features=" in report.skipped["b"]


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "vit", "vit_tiny_patch16_224", "transformer"])
def test_other_peoples_models_run_and_their_functional_dropouts_are_named(name: str) -> None:
    torch.manual_seed(0)
    model, inputs = architectures.ALL[name]()
    vd.set_rates_(model, attention=0.1, residual=0.1, embedding=0.1)
    report = vd.replace_dropout_(model)
    functional = [key for key, why in report.skipped.items() if "functional" in why]
    assert functional, "attention drops inside of a function in all of them"
    assert not any("attn_drop" in key or "attention.self" in key for key in report.replaced)
    vd.set_rates_(model, attention=0.0)
    model.train()
    first, second = (architectures.logits(model(*inputs)) for _ in range(2))
    assert not torch.equal(first, second) or name == "vit_tiny_patch16_224"  # which begins with a head of zeros
    vd.set_rates_(model, preset="large-model")
    first, second = (architectures.logits(model(*inputs)) for _ in range(2))
    assert torch.equal(first, second), "the new modules have the roles of the old ones"


# --- errors -----------------------------------------------------------------------------------------------------


def test_nothing_to_swap_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"must have a plain dropout to swap. 0: has p = 0: there is no rate"):
        vd.replace_dropout_(nn.Sequential(nn.Dropout(0.0)))
    with pytest.raises(ValueError, match=r"must have a plain dropout to swap. It has none"):
        vd.replace_dropout_(nn.Linear(2, 2))
    with pytest.raises(ValueError, match=r"must have a plain dropout to swap. Dropout: is the model itself"):
        vd.replace_dropout_(nn.Dropout(0.1))


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match=r"replace_dropout_: model must be a torch.nn.Module, got list"):
        vd.replace_dropout_([])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"kind must be 'gaussian', 'variational', 'concrete', or a function"):
        vd.replace_dropout_(net(), "gauss")
    with pytest.raises(ValueError, match=r"vardrop.replace_dropout_: where must match the name of a module"):
        vd.replace_dropout_(net(), where="encoder.*")
    with pytest.raises(TypeError, match=r"kind must give a torch.nn.Module for p = 0.2, got float"):
        vd.replace_dropout_(net(), lambda p: p)  # type: ignore[arg-type, return-value]
