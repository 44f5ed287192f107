"""What `convert_` does to a model: which modules it takes, what it leaves and why, what survives."""

from __future__ import annotations

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune

import vardrop as vd
from vardrop import layers

A = vd.VariationalDropout()
B = vd.VariationalDropout(type="B", sharing="weight")


def net() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 2))


def varies(model: nn.Module, *inputs: object) -> bool:
    return not torch.equal(model(*inputs), model(*inputs))


# --- which modules ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "converted"),
    [
        (None, ["0", "2", "4"]),
        ("*", ["0", "2", "4"]),
        ("2", ["2"]),
        ("[02]", ["0", "2"]),
        (["0", "4"], ["0", "4"]),
        (("0", "[24]"), ["0", "2", "4"]),
        ({"2"}, ["2"]),
        (lambda module, name: isinstance(module, nn.Linear) and module.out_features == 8, ["0", "2"]),
        (lambda module, name: name > "1", ["2", "4"]),
    ],
)
def test_where_selects(where: object, converted: list[str]) -> None:
    report = vd.convert_(net(), A, where=where)  # type: ignore[arg-type]
    assert report.converted == converted
    for name in {"0", "2", "4"} - set(converted):
        assert report.skipped[name] == "is not selected by where"


@pytest.mark.parametrize("where", ["encoder.*", ["0", "encoder.*"]])
def test_a_glob_that_matches_nothing_is_an_error(where: object) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"where must match the name of a module \('', '0', .*\), got 'encoder\.\*'"):
        vd.convert_(model, A, where=where)  # type: ignore[arg-type]
    assert type(model[0]) is nn.Linear


@pytest.mark.parametrize("where", [3, ["0", 4]])
def test_where_of_another_kind_is_an_error(where: object) -> None:
    with pytest.raises(TypeError, match=r"where must be a glob of module names.*got [34]"):
        vd.convert_(net(), A, where=where)  # type: ignore[arg-type]


def test_a_module_goes_by_all_of_its_names() -> None:
    shared = nn.Linear(3, 3)
    model = nn.ModuleDict({"encoder": shared, "decoder": shared})
    report = vd.convert_(model, A, where="decoder")
    assert report.converted == ["encoder"]


def test_the_root_may_be_a_layer() -> None:
    layer = nn.Linear(3, 2)
    assert vd.convert_(layer, A).converted == ["Linear"]
    assert isinstance(layer, nn.Linear)
    assert varies(layer, torch.ones(1, 3))


@pytest.mark.parametrize("model", [nn.ReLU(), nn.Sequential()])
def test_nothing_to_convert_is_an_error(model: nn.Module) -> None:
    with pytest.raises(ValueError, match=r"nothing to convert\. The model has no parameters"):
        vd.convert_(model, A)


def test_nothing_to_convert_says_why() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.LayerNorm(2), nn.EmbeddingBag(3, 2))
    with pytest.raises(
        ValueError, match=r"1: its class LayerNorm has no weight matrix; 2: its class EmbeddingBag is not known"
    ):
        vd.convert_(model, A, where=["1", "2"])
    with pytest.raises(ValueError, match=r"0: is not selected by where"):
        vd.convert_(model, A, where=lambda module, name: False)


@pytest.mark.parametrize(
    ("config", "words"),
    [(vd.VariationalDropout, r"VariationalDropout \(the class: call it\)"), (0.5, "got 0.5"), (None, "got None")],
)
def test_config_must_be_a_posterior(config: object, words: str) -> None:
    with pytest.raises(TypeError, match=f"config must be a posterior.*{words}"):
        vd.convert_(net(), config)  # type: ignore[arg-type]


def test_model_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module, got Tensor"):
        vd.convert_(torch.ones(3), A)  # type: ignore[arg-type]


# --- what is left alone, and why --------------------------------------------------------------------------------


class Doubled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.Linear(3, 2))


def _half_weight_normed() -> nn.Module:
    with pytest.warns(FutureWarning, match="weight_norm"):
        return nn.utils.weight_norm(nn.LSTM(3, 2), "weight_hh_l0")


def _int8() -> nn.Module:
    layer = nn.Linear(3, 2)
    layer.weight = nn.Parameter(torch.ones(2, 3, dtype=torch.int8), requires_grad=False)
    return layer


LEFT_ALONE = {
    "parametrised weight_norm": (lambda: parametrizations.weight_norm(nn.Linear(3, 2)), "is parametrised by"),
    "parametrised spectral_norm": (lambda: parametrizations.spectral_norm(nn.Linear(3, 2)), "is parametrised by"),
    "weight_norm": (_weight_normed, "has no parameter 'weight'"),
    "one weight of an LSTM": (_half_weight_normed, "has no parameter 'weight_hh_l0'"),
    "spectral_norm": (lambda: nn.utils.spectral_norm(nn.Linear(3, 2)), "has no parameter 'weight'"),
    "prune": (lambda: prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5), "has no parameter 'weight'"),
    "own forward": (lambda: Doubled(3, 2), r"is a subclass of Linear that may .* vd.register_layer\(Doubled, weight="),
    "lazy": (lambda: nn.LazyLinear(2), "is lazy and has no shape yet"),
    "int8": (_int8, r"has a weight of type torch\.int8"),
    "complex": (lambda: nn.Linear(3, 2, dtype=torch.complex64), r"has a weight of type torch\.complex64"),
    "empty": (lambda: nn.Embedding(0, 2), r"has a weight of shape \(0, 2\), which is empty"),
    "max_norm": (lambda: nn.Embedding(3, 2, max_norm=1.0), "has max_norm"),
    "sparse": (lambda: nn.Embedding(3, 2, sparse=True), "has sparse gradients"),
    "unknown": (lambda: nn.EmbeddingBag(3, 2), "its class EmbeddingBag is not known"),
    "no matrix": (lambda: nn.BatchNorm1d(3), "its class BatchNorm1d has no weight matrix"),
}


@pytest.mark.parametrize("case", LEFT_ALONE)
def test_left_alone_with_a_reason(case: str) -> None:
    make, reason = LEFT_ALONE[case]
    odd = make()
    kind, keys = type(odd), list(odd.state_dict())
    model = nn.ModuleDict({"plain": nn.Linear(2, 2), "odd": odd})
    report = vd.convert_(model, A)
    assert report.converted == ["plain"]
    with pytest.raises(ValueError, match=reason):
        vd.convert_(odd, A)
    assert report.skipped["odd"]
    assert type(odd) is kind
    assert list(odd.state_dict()) == keys


def test_a_sharded_weight_is_left_alone() -> None:
    class DTensor(nn.Parameter):
        """It is known by its name; a real one needs a process group."""

    layer = nn.Linear(3, 2)
    layer.weight.__class__ = DTensor
    with pytest.raises(ValueError, match="is sharded already"):
        vd.convert_(layer, A)


def test_lazy_modules_convert_once_they_have_a_shape() -> None:
    layer = nn.LazyLinear(2)
    layer(torch.ones(1, 3))
    assert vd.convert_(layer, A).converted == ["Linear"]


def test_undone_reparametrisations_convert() -> None:
    layer = prune.remove(prune.l1_unstructured(nn.Linear(3, 2), "weight", 0.5), "weight")
    assert vd.convert_(layer, B).converted == ["Linear"]


def test_converting_twice_keeps_the_first_posterior() -> None:
    model = net()
    vd.convert_(model, A, where="0")
    before = model[0].weight_log_alpha
    report = vd.convert_(model, B)
    assert report.converted == ["2", "4"]
    assert report.skipped["0"].startswith("is converted already; vd.restore_ it first")
    assert model[0].weight_log_alpha is before
    assert len(report.new_parameters) == 2
    with pytest.raises(ValueError, match=r"nothing to convert\. 0: is converted already"):
        vd.convert_(model, B)


def test_frozen_weights_stay_frozen_and_learn_their_rates() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    report = vd.convert_(layer, B)
    layer(torch.ones(5, 3)).sum().backward()
    assert layer._parameters["weight"].grad is None
    assert report.new_parameters[0].grad.any()


# --- what survives ----------------------------------------------------------------------------------------------


def test_parameters_references_and_hooks_survive() -> None:
    model = net()
    first, parameters = model[0], dict(model.named_parameters())
    calls: list[str] = []
    first.register_forward_hook(lambda *_: calls.append("forward"))
    first.register_full_backward_hook(lambda *_: calls.append("backward"))
    vd.convert_(model, A)
    assert model[0] is first
    assert all(dict(model.named_parameters())[name] is p for name, p in parameters.items())
    model(torch.ones(2, 4, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]


def test_evaluation_is_bit_identical() -> None:
    model, x = net().eval(), torch.randn(3, 4)
    before = model(x)
    vd.convert_(model, B)
    assert torch.equal(model(x), before)
    model.train()
    assert varies(model, x)


def test_an_optimiser_that_exists_goes_on() -> None:
    model = net()
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    report = vd.convert_(model, A)
    optimiser.add_param_group({"params": report.new_parameters})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    (model(torch.randn(16, 4)).square().mean() + vd.kl_divergence(model) / 100).backward()
    optimiser.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_fixed_noise_is_no_parameter() -> None:
    model = net()
    report = vd.convert_(model, vd.GaussianDropout(rate=0.5))
    assert report.new_parameters == []
    assert "weight_log_alpha" in dict(model[0].named_buffers())


def test_copies_train_apart() -> None:
    model = net()
    vd.convert_(model, A)
    copied, pickled = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    state = copy.deepcopy(model.state_dict())
    for other in (copied, pickled):
        assert varies(other, torch.ones(1, 4))
        optimiser = torch.optim.SGD(other.parameters(), lr=1.0)
        (other(torch.randn(8, 4)).square().mean() + vd.kl_divergence(other)).backward()
        optimiser.step()
        assert not torch.equal(other[0].weight_log_alpha, model[0].weight_log_alpha)
    assert all(torch.equal(model.state_dict()[key], value) for key, value in state.items())


def test_the_report_reads_well() -> None:
    model = nn.Sequential(nn.Dropout(0.3), nn.Linear(40, 30), nn.LayerNorm(30), nn.EmbeddingBag(2, 2))
    report = vd.convert_(model, B)
    assert str(report).splitlines() == [
        "converted: 1 (1,200 new parameters)",
        "  1",
        "  0: dropout of rate 0.3 replaced, now 0",
        "left alone: 2",
        "  2: its class LayerNorm has no weight matrix",
        "  3: its class EmbeddingBag is not known; vd.register_layer makes it so",
    ]
    assert "VariationalDropout(type='B', sharing='weight')" in repr(model[1])


# --- tied weights -----------------------------------------------------------------------------------------------


def tied(embedding_first: bool) -> nn.Module:
    embedding, head = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False)
    head.weight = embedding.weight
    order = [("embedding", embedding), ("head", head)]
    return nn.ModuleDict(dict(order if embedding_first else order[::-1]))


def through(model: nn.Module, tokens: Tensor) -> Tensor:
    return model["head"](model["embedding"](tokens))  # type: ignore[index]


@pytest.mark.parametrize("embedding_first", [True, False])
@pytest.mark.parametrize("config", [A, B, vd.GaussianPosterior()], ids=["A", "B", "gaussian"])
def test_tied_weights_have_one_noise_and_one_divergence(config: vd.VariationalDropout, embedding_first: bool) -> None:
    model = tied(embedding_first)
    report = vd.convert_(model, config)
    key = f"weight_{config.noise_name}"
    noise = getattr(model["embedding"], key)  # type: ignore[index]
    assert noise is getattr(model["head"], key)  # type: ignore[index]
    assert report.new_parameters == [noise]
    assert sum(p is noise for p in model.parameters()) == 1
    assert len(vd.dropout_rates(model)) == 1

    alone = nn.Embedding(10, 4) if embedding_first else nn.Linear(4, 10, bias=False)
    with torch.no_grad():
        alone.weight.copy_(model["head"]._parameters["weight"])  # type: ignore[index]
    vd.convert_(alone, config)
    torch.testing.assert_close(vd.kl_divergence(model), vd.kl_divergence(alone))

    tokens = torch.arange(10)
    assert not torch.equal(through(model, tokens), through(model, tokens))
    through(model, tokens).square().sum().backward()
    assert noise.grad.any()

    state = copy.deepcopy(model.state_dict())
    other = tied(embedding_first)
    vd.convert_(other, config)
    other.load_state_dict(state)
    model.eval(), other.eval()
    assert torch.equal(through(model, tokens), through(other, tokens))


def test_ties_survive_copies_and_dtypes() -> None:
    model = tied(True)
    vd.convert_(model, A)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double()):
        assert other["embedding"].weight_log_alpha is other["head"].weight_log_alpha
        assert vd.kl_divergence(other).item() == pytest.approx(vd.kl_divergence(model).item(), rel=1e-5)


def test_fixed_noise_of_tied_weights_survives_a_change_of_dtype() -> None:
    model = tied(True)
    vd.convert_(model, vd.GaussianDropout(rate=0.5))
    before = vd.kl_divergence(model)
    torch.testing.assert_close(vd.kl_divergence(model.double()).float(), before, rtol=1e-4, atol=0.0)  # two fits


def test_tied_weights_converted_one_after_the_other_share_the_first_posterior() -> None:
    model = tied(True)
    vd.convert_(model, A, where="embedding")
    divergence = vd.kl_divergence(model)
    report = vd.convert_(model, B, where="head")
    assert report.converted == ["head"]
    assert report.new_parameters == []
    assert model["head"].weight_log_alpha is model["embedding"].weight_log_alpha
    assert torch.equal(vd.kl_divergence(model), divergence)


def test_tying_after_conversion_is_an_error() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    vd.convert_(model, A)
    with pytest.raises(TypeError, match="cannot assign"):  # torch: in training the weight is no parameter
        model[0].weight = model[1].weight
    model.eval()
    model[0].weight = model[1].weight
    with pytest.raises(ValueError, match=r"must share its noise, got 1\.weight with noise of its own"):
        vd.kl_divergence(model)


# --- dropout that is replaced -----------------------------------------------------------------------------------


def rate_of(model: nn.Module, name: str) -> float:
    return float(vd.dropout_rates(model)[f"{name}.weight"].mean())


@pytest.mark.parametrize(
    ("between", "replaced"),
    [
        ([], True),
        ([nn.ReLU()], True),
        ([nn.GELU(), nn.Identity(), nn.Flatten()], True),
        ([nn.Sequential(nn.Tanh())], True),
        ([nn.BatchNorm1d(4)], False),
        ([nn.LayerNorm(4)], False),
    ],
)
def test_dropout_right_before_is_replaced(between: list[nn.Module], replaced: bool) -> None:
    model = nn.Sequential(nn.Dropout(0.4), *between, nn.Linear(4, 2))
    report = vd.convert_(model, A)
    assert report.replaced == ({"0": 0.4} if replaced else {})
    assert model[0].p == (0.0 if replaced else 0.4)
    assert rate_of(model, str(len(model) - 1)) == pytest.approx(0.4 if replaced else 0.2)
    vd.restore_(model)
    assert model[0].p == 0.4


@pytest.mark.parametrize("kind", [nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.AlphaDropout])
def test_every_kind_of_dropout_is_replaced(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(0.4), nn.Linear(4, 2))
    assert vd.convert_(model, A).replaced == {"0": 0.4}


def test_the_last_of_several_dropouts_counts() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.ReLU(), nn.Dropout(0.4), nn.Linear(4, 2))
    assert vd.convert_(model, A).replaced == {"2": 0.4}


def test_dropout_across_nested_sequentials() -> None:
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.4)), nn.Sequential(nn.ReLU(), nn.Linear(4, 2)))
    assert vd.convert_(model, A).replaced == {"0.1": 0.4}
    assert rate_of(model, "1.1") == pytest.approx(0.4)
    assert rate_of(model, "0.0") == pytest.approx(0.2)


def test_a_rate_of_ones_own_wins() -> None:
    model = nn.Sequential(nn.Dropout(0.4), nn.Linear(4, 2))
    report = vd.convert_(model, vd.VariationalDropout(rate=0.1))
    assert report.replaced == {"0": 0.4}
    assert rate_of(model, "1") == pytest.approx(0.1)


def test_replace_dropout_false_leaves_it() -> None:
    model = nn.Sequential(nn.Dropout(0.4), nn.Linear(4, 2))
    assert vd.convert_(model, A, replace_dropout=False).replaced == {}
    assert model[0].p == 0.4
    assert rate_of(model, "1") == pytest.approx(0.2)


def test_dropout_of_rate_0_is_none() -> None:
    model = nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 2))
    assert vd.convert_(model, A).replaced == {}
    assert rate_of(model, "1") == pytest.approx(0.2)


def shared_dropout() -> nn.Sequential:
    dropout = nn.Dropout(0.4)
    return nn.Sequential(dropout, nn.Linear(4, 4), nn.ReLU(), dropout, nn.Linear(4, 2))


def test_a_dropout_before_two_layers_gives_both_its_rate() -> None:
    model = shared_dropout()
    assert vd.convert_(model, A).replaced == {"0": 0.4}
    assert rate_of(model, "1") == pytest.approx(0.4)
    assert rate_of(model, "4") == pytest.approx(0.4)
    vd.restore_(model)
    assert model[0].p == 0.4


def test_a_dropout_that_a_plain_layer_needs_stays_on() -> None:
    model = shared_dropout()
    assert vd.convert_(model, A, where="1").replaced == {}
    assert model[0].p == 0.4
    assert vd.convert_(model, A, where="4").replaced == {"0": 0.4}  # now both are random
    assert model[0].p == 0.0


OURS = [layers.Dropout, layers.Dropout1d, layers.Dropout2d, layers.Dropout3d, layers.GaussianDropout]


@pytest.mark.parametrize("kind", OURS)
def test_fixed_dropout_of_vardrop_is_replaced_and_comes_back(kind: type[layers.Drop]) -> None:
    model = nn.Sequential(kind(0.4), nn.Linear(4, 2))
    report = vd.convert_(model, A)
    assert report.replaced == {"0": 0.4}
    assert rate_of(model, "1") == pytest.approx(0.4)
    x = torch.randn(3, 4)
    assert model[0](x) is x
    assert "off" in repr(model[0])
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other[0](x) is x
    vd.restore_(model)
    shape = (3, 4, *[2] * (getattr(kind, "spatial", 0)))
    assert not torch.equal(model[0](torch.ones(shape)), torch.ones(shape))
    assert model[0].p == pytest.approx(0.4)
    assert vd.convert_(model, A).replaced == {"0": 0.4}


def test_no_checkpoint_or_scheduler_switches_a_replaced_dropout_on() -> None:
    model = nn.Sequential(layers.Dropout(0.4), nn.Linear(4, 2))
    plain, x = copy.deepcopy(model.state_dict()), torch.ones(3, 4)
    vd.convert_(model, A)
    assert model.state_dict()["0.rate_value"] == plain["0.rate_value"]  # which a plain model then loads
    model.load_state_dict(plain)
    vd.rates.RateScheduler(model, vd.rates.linear(0.1, 0.5, steps=2)).step()
    assert model[0](x) is x


@pytest.mark.parametrize(
    ("dropout", "words"),
    [
        (layers.Dropout(vd.rates.linear(0.1, 0.5, steps=9)), "follows a schedule"),
        (layers.GaussianDropout(vd.rates.learned(0.3), features=4), "has a learned rate"),
    ],
)
def test_scheduled_and_learned_dropout_stays_and_is_reported(dropout: layers.Drop, words: str) -> None:
    model = nn.Sequential(dropout, nn.Linear(4, 2))
    report = vd.convert_(model, A)
    assert report.replaced == {}
    assert words in report.skipped["0"]
    assert "noise upon noise" in str(report)
    assert not torch.equal(model[0](torch.ones(9, 4)), torch.ones(9, 4))


@pytest.mark.parametrize(
    "wrapper",
    [
        lambda layer: layers.ConcreteDropout(vd.rates.learned(0.1), layer),
        lambda layer: layers.FastDropout(0.1, layer),
        lambda layer: layers.DropConnect(0.1, layer),
    ],
)
def test_a_layer_with_noise_of_its_own_is_not_given_random_weights_too(
    wrapper: Callable[[nn.Module], layers.Drop],
) -> None:
    model = nn.Sequential(wrapper(nn.Linear(4, 4)), nn.Linear(4, 2))
    report = vd.convert_(model, A)
    assert report.converted == ["1"]
    assert f"has the noise of {type(model[0]).__name__} already" in report.skipped["0.layer"]
    with pytest.raises(TypeError, match=r"layer must have plain weights, got a \w*Linear whose weights are random"):
        wrapper(model[1])


def test_a_layer_behind_concrete_noise_is_not_given_random_weights_too() -> None:
    model = nn.Sequential(nn.Dropout(0.1), nn.Linear(4, 4), nn.Linear(4, 2))
    vd.replace_dropout_(model, "concrete")
    report = vd.convert_(model, A)
    assert report.converted == ["2"]
    assert "has the noise of ConcreteDropout already" in report.skipped["1"]


# --- architectures of torch itself ------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize(
    "options",
    [{}, {"kdim": 6, "vdim": 5}, {"add_bias_kv": True}, {"add_zero_attn": True}, {"bias": False}],
    ids=["packed", "separate", "bias_kv", "zero_attn", "no bias"],
)
@pytest.mark.parametrize("config", [A, B], ids=["A", "B"])
def test_multihead_attention(config: vd.VariationalDropout, options: dict, batched: bool, batch_first: bool) -> None:
    plain = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options)
    shape = (3, 2) if batched else (3,)
    query, key, value = (torch.randn(*shape, size) for size in (8, options.get("kdim", 8), options.get("vdim", 8)))
    attention = copy.deepcopy(plain).eval()
    before, _ = attention(query, key, value)

    report = vd.convert_(attention, config)

    assert report.converted == ["MultiheadAttention", "out_proj"]
    assert len(report.new_parameters) == (4 if "kdim" in options else 2)
    with torch.no_grad():
        torch.testing.assert_close(attention(query, key, value)[0], before)
    attention.train()
    first, weights = attention(query, key, value)
    length = shape[0] if not (batched and batch_first) else shape[1]
    assert not torch.equal(first, attention(query, key, value)[0])
    assert weights.shape[-2:] == (length, length + ("add_bias_kv" in options) + ("add_zero_attn" in options))
    first.square().sum().backward()
    assert all(p.grad.any() for p in report.new_parameters)
    vd.restore_(attention)
    assert type(attention) is nn.MultiheadAttention
    assert torch.equal(attention.eval()(query, key, value)[0], before)


def test_encoder_layer_takes_the_fast_path_in_evaluation_only(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    calls: list[str] = []
    fused = torch._transformer_encoder_layer_fwd
    monkeypatch.setattr(torch, "_transformer_encoder_layer_fwd", lambda *args: (calls.append("fused"), fused(*args))[1])
    x = torch.randn(2, 3, 8)
    with torch.no_grad():
        before = layer(x)
        vd.convert_(layer, B)
        assert torch.equal(layer(x), before)
        assert calls == ["fused", "fused"]
        layer.train()
        assert varies(layer, x)
        layer.eval()
        for part in (layer.self_attn, layer.linear1):  # as prediction with noise has it
            part.train()
            assert varies(layer, x)
            part.eval()
    assert calls == ["fused", "fused"]


def test_encoder_with_padding_uses_nested_tensors_in_evaluation_as_before() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False, False, False]])
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):  # torch says once that nested tensors are new
        before = encoder(x, src_key_padding_mask=padding)
    report = vd.convert_(encoder, A)
    with torch.no_grad():
        assert torch.equal(encoder(x, src_key_padding_mask=padding), before)
    encoder.train()
    y = encoder(x, src_key_padding_mask=padding)
    y[~padding].square().sum().backward()
    assert all(p.grad.any() for p in report.new_parameters)


RECURRENT = {
    "LSTM": lambda: nn.LSTM(3, 4, 2, bidirectional=True),
    "LSTM with projections": lambda: nn.LSTM(3, 4, proj_size=2),
    "GRU": lambda: nn.GRU(3, 4, bidirectional=True, batch_first=True),
    "RNN": lambda: nn.RNN(3, 4, bias=False),
}


@pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")
@pytest.mark.parametrize("config", [A, B], ids=["A", "B"])
@pytest.mark.parametrize("kind", RECURRENT)
def test_recurrent(kind: str, config: vd.VariationalDropout) -> None:
    model, x = RECURRENT[kind]().eval(), torch.randn(5, 2, 3)
    plain = type(model)
    before = model(x)[0]
    report = vd.convert_(model, config)
    assert torch.equal(model(x)[0], before)
    assert len(report.new_parameters) == sum(name.startswith("weight") for name in model._flat_weights_names)
    model.train()
    first = model(x)[0]
    assert not torch.equal(first, model(x)[0])
    packed = nn.utils.rnn.pack_padded_sequence(torch.randn(5, 2, 3), [5, 3])
    first.sum().backward(), model(packed)[0].data.sum().backward()
    assert all(p.grad.any() for p in report.new_parameters)
    assert all(p.grad is not None for p in model.parameters())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        assert not torch.equal(other(x)[0], other(x)[0])
        assert torch.equal(other.eval()(x)[0], before)
    vd.restore_(model)
    assert type(model) is plain
    assert torch.equal(model(x)[0], before)
    model.double()
    assert model(x.double())[0].dtype == torch.float64


def test_a_recurrent_weight_is_one_sample_for_all_steps_and_examples() -> None:
    """With the hidden-to-hidden weights at zero, h_t = tanh(W x_t): equal inputs give equal outputs if W is shared."""
    model = nn.RNN(3, 4, bias=False)
    with torch.no_grad():
        model.weight_hh_l0.zero_()
    vd.convert_(model, B)
    x = torch.randn(3).expand(5, 2, 3)
    y, again = model(x)[0], model(x)[0]
    torch.testing.assert_close(y, y[:1, :1].expand_as(y))
    assert not torch.allclose(y, again)


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.LSTMCell, nn.GRUCell])
def test_cells(cell: type[nn.Module]) -> None:
    model = cell(3, 4)
    report = vd.convert_(model, B)
    y = model(torch.randn(2, 3))
    y = y[0] if isinstance(y, tuple) else y
    y.sum().backward()
    ih, hh = report.new_parameters
    assert ih.grad.any()
    assert hh.grad is not None  # zero: the state that it multiplies is


def test_adaptive_softmax() -> None:
    model = nn.AdaptiveLogSoftmaxWithLoss(8, 10, [3, 5], div_value=2.0)
    report = vd.convert_(model, A)
    model(torch.randn(4, 8), torch.tensor([0, 4, 6, 9])).loss.backward()
    assert all(p.grad.any() for p in report.new_parameters)


@pytest.mark.filterwarnings("ignore:.*should not be instantiated")  # torch's own, from tracing an autograd function
def test_compiled_models_convert_too() -> None:
    model = nn.Sequential(nn.Linear(3, 2))
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    compiled(torch.ones(1, 3))
    assert vd.convert_(compiled, A).converted == ["_orig_mod.0"]
    assert varies(compiled, torch.ones(1, 3))
    torch._dynamo.reset()


def test_initial_rates_are_exact() -> None:
    layer = nn.Linear(3, 2)
    vd.convert_(layer, vd.VariationalDropout(alpha=0.3))
    torch.testing.assert_close(layer.weight_log_alpha.detach(), torch.full((3,), math.log(0.3)))


def test_a_subclass_of_sequential_is_one_where_it_runs_like_one() -> None:
    class Runs(nn.Sequential):
        pass

    class Skips(nn.Sequential):
        def forward(self, x: Tensor) -> Tensor:
            return self[2](x)

    parts = (nn.Linear(4, 8), nn.Dropout(0.4), nn.Linear(8, 2))
    assert vd.convert_(Runs(*copy.deepcopy(parts)), A).replaced == {"1": 0.4}
    assert vd.convert_(nn.Sequential(Runs(*copy.deepcopy(parts[:2])), nn.Linear(8, 2)), A).replaced == {"0.1": 0.4}
    assert vd.convert_(Skips(*copy.deepcopy(parts)), A).replaced == {}


def test_a_start_that_the_bound_cuts_is_said() -> None:
    def report(p: float, config: vd.VariationalDropout) -> vd.Report:
        return vd.convert_(nn.Sequential(nn.Dropout(p), nn.Linear(4, 2)), config)

    words = "1 starts at the rate 0.5 and not at the 0.8 of 0: max_alpha of the posterior bounds it"
    assert words in str(report(0.8, A))
    assert report(0.5, A).notes == []
    assert report(0.8, vd.VariationalDropout(max_alpha=math.inf)).notes == []
    assert report(0.8, vd.VariationalDropout(rate=0.3)).notes == []  # it was asked to start there


def test_noise_that_half_precision_keeps_still_is_said() -> None:
    layer = nn.Linear(4, 2).bfloat16()
    report = vd.convert_(layer, vd.SparseVariationalDropout())
    words = "is of torch.bfloat16, which rounds steps below 0.031 away where it starts: .* run it under torch.autocast"
    assert re.search(words, str(report))
    noise = report.new_parameters[0]
    before = noise.detach().clone()
    for lr, moves in ((0.01, False), (0.04, True)):  # Adam's steps are as long as its learning rate
        adam = torch.optim.Adam([noise], lr=lr)
        for _ in range(20):
            noise.grad = torch.ones_like(noise)
            adam.step()
        assert torch.equal(noise, before) != moves
    assert vd.convert_(nn.Linear(4, 2), vd.SparseVariationalDropout()).notes == []


# --- what else assigns weights ------------------------------------------------------------------------------------


def test_replicas_of_data_parallel_have_the_tensors_that_they_are_given() -> None:
    layer = nn.Linear(4, 2)
    vd.convert_(layer, A)
    replica = layer._replicate_for_data_parallel()  # what torch.nn.parallel.replicate does on every device
    for key, parameter in layer._parameters.items():
        setattr(replica, key, parameter.detach().clone().requires_grad_())
    x = torch.randn(3, 4)
    assert varies(replica, x)
    assert torch.equal(replica.eval()(x), layer.eval()(x))


def test_what_replaces_the_weight_of_a_converted_layer_is_refused() -> None:
    layer = nn.Linear(4, 2)
    vd.convert_(layer, A)
    with pytest.raises(
        TypeError, match=r"'weight' of a converted layer must be an nn\.Parameter, .* got a Tensor; undo"
    ):
        torch.nn.utils.spectral_norm(layer.eval())
    layer = nn.Linear(4, 2)
    vd.convert_(layer, A)
    layer.weight = nn.Parameter(torch.ones(2, 4))
    assert torch.equal(layer.eval().weight, torch.ones(2, 4))
