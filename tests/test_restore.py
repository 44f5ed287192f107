"""The way back, and what moves between plain and converted models: checkpoints."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

import vardrop as vd

CONFIGS = {
    "A": vd.VariationalDropout(),
    "A layer": vd.VariationalDropout(sharing="layer"),
    "B": vd.VariationalDropout(type="B", sharing="weight"),
    "fixed": vd.GaussianDropout(rate=0.3),
    "sparse": vd.SparseVariationalDropout(),
    "gaussian": vd.GaussianPosterior(),
}


class Mixed(nn.Module):
    """A layer of every kind there is."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, 8, padding_idx=0)
        self.lstm = nn.LSTM(8, 8, batch_first=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.conv = nn.Conv1d(8, 8, 3, padding=1, groups=2)
        self.up = nn.ConvTranspose1d(8, 4, 2, stride=2)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3))

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.lstm(self.embedding(tokens))[0]
        x = self.attention(x, x, x, need_weights=False)[0]
        return self.head(self.norm(self.up(self.conv(x.mT))).mT)


TOKENS = torch.tensor([[1, 2, 3, 0], [4, 5, 6, 1]])


@pytest.fixture
def plain() -> Mixed:
    torch.manual_seed(0)
    return Mixed().eval()


def described(model: nn.Module) -> list[tuple[str, type, list[str]]]:
    """Names, exact classes and every attribute of the modules."""
    return [(name, type(module), sorted(vars(module))) for name, module in model.named_modules()]


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_restore_undoes_convert_to_the_bit(plain: Mixed, config: vd.VariationalDropout) -> None:
    before = plain(TOKENS)
    shape, printed = described(plain), repr(plain)
    state, parameters = copy.deepcopy(plain.state_dict()), list(plain.parameters())
    report = vd.convert_(plain, config)
    assert described(plain) != shape
    assert vd.restore_(plain) == report.converted
    assert described(plain) == shape
    assert repr(plain) == printed
    assert all(p is q for p, q in zip(plain.parameters(), parameters, strict=True))
    assert list(plain.state_dict()) == list(state)
    assert all(torch.equal(plain.state_dict()[key], value) for key, value in state.items())
    assert torch.equal(plain(TOKENS), before)
    plain.train()
    plain.head[0].p = 0.0
    assert torch.equal(plain(TOKENS), plain(TOKENS))


def test_restore_keeps_what_was_learned(plain: Mixed) -> None:
    report = vd.convert_(plain, CONFIGS["B"])
    optimiser = torch.optim.SGD(plain.parameters(), lr=0.1)
    plain.train()(TOKENS).square().mean().backward()
    optimiser.step()
    means = {name: p.detach().clone() for name, p in plain.named_parameters()}
    noise = {name for name, p in plain.named_parameters() if any(p is q for q in report.new_parameters)}
    assert len(noise) == len(report.new_parameters)
    vd.restore_(plain)
    assert set(means) - noise == {name for name, _ in plain.named_parameters()}
    assert all(torch.equal(p, means[name]) for name, p in plain.named_parameters())


def test_dropout_comes_back_where_it_is_inside() -> None:
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 2))
    vd.convert_(model, CONFIGS["A"])
    assert vd.restore_(model[1]) == ["Linear"]
    assert model[0].p == 0.0
    assert vd.restore_(model) == []
    assert model[0].p == 0.2


def test_restore_of_a_plain_model_does_nothing() -> None:
    model = nn.Sequential(nn.Dropout(0.2), nn.Linear(2, 2))
    assert vd.restore_(model) == []
    assert model[0].p == 0.2


def test_restored_models_convert_again(plain: Mixed) -> None:
    first = vd.convert_(plain, CONFIGS["A"]).converted
    vd.restore_(plain)
    again = vd.convert_(plain, CONFIGS["gaussian"])
    assert again.converted == first
    assert again.replaced == {"head.0": 0.5}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_dense_checkpoint_loads_into_a_converted_model(plain: Mixed, config: vd.VariationalDropout) -> None:
    other = Mixed().eval()
    vd.convert_(other, config)
    noise = {name: value.clone() for name, value in vd.dropout_rates(other, as_="log_alpha").items()}
    other.load_state_dict(plain.state_dict(), strict=True)
    assert torch.equal(other(TOKENS), plain(TOKENS))
    if isinstance(config, vd.VariationalDropout | vd.GaussianDropout):  # where the rate does not depend on the mean
        assert all(torch.equal(value, noise[name]) for name, value in vd.dropout_rates(other, as_="log_alpha").items())


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_converted_checkpoint_makes_the_round_trip(plain: Mixed, config: vd.VariationalDropout) -> None:
    vd.convert_(plain, config)
    with torch.no_grad():
        for _, tensor in [*plain.named_parameters(), *plain.named_buffers()]:
            if tensor.is_floating_point():
                tensor.add_(0.01 * torch.rand_like(tensor))
    file = io.BytesIO()
    torch.save(plain.state_dict(), file)
    file.seek(0)
    other = Mixed().eval()
    vd.convert_(other, config)
    other.load_state_dict(torch.load(file), strict=True)
    assert torch.equal(other(TOKENS), plain(TOKENS))
    rates = vd.dropout_rates(plain)
    assert all(torch.equal(value, rates[name]) for name, value in vd.dropout_rates(other).items())


def test_a_converted_checkpoint_does_not_load_into_a_plain_model(plain: Mixed) -> None:
    state = copy.deepcopy(plain.state_dict())
    vd.convert_(plain, CONFIGS["A"])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"embedding\.weight_log_alpha"'):
        Mixed().load_state_dict(plain.state_dict())
    assert set(state) < set(plain.state_dict())


def test_a_checkpoint_with_other_sharing_does_not_load(plain: Mixed) -> None:
    vd.convert_(plain, CONFIGS["A"])
    other = Mixed()
    vd.convert_(other, CONFIGS["B"])
    with pytest.raises(RuntimeError, match=r"size mismatch for embedding\.weight_log_alpha: .*\[7\].*\[7, 8\]"):
        other.load_state_dict(plain.state_dict())


def test_a_checkpoint_of_another_parametrisation_does_not_load(plain: Mixed) -> None:
    vd.convert_(plain, CONFIGS["B"])
    other = Mixed()
    vd.convert_(other, CONFIGS["gaussian"])
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"embedding\.weight_log_alpha"'):
        other.load_state_dict(plain.state_dict())


def test_a_checkpoint_with_some_noise_missing_does_not_load() -> None:
    layer = nn.MultiheadAttention(4, 2, kdim=3, vdim=3)
    vd.convert_(layer, CONFIGS["B"])
    state = layer.state_dict()
    del state["k_proj_weight_log_alpha"]
    with pytest.raises(RuntimeError, match=r'Missing key.*"k_proj_weight_log_alpha"'):
        layer.load_state_dict(state)


def test_a_whole_model_in_a_file(plain: Mixed) -> None:
    vd.convert_(plain, CONFIGS["A"])
    file = io.BytesIO()
    torch.save(plain, file)
    file.seek(0)
    other = torch.load(file, weights_only=False)
    assert torch.equal(other(TOKENS), plain(TOKENS))
    assert not torch.equal(other.train()(TOKENS), other(TOKENS))
    assert vd.restore_(other)
    assert described(other) == described(Mixed())
