"""LSTM, GRU and RNN with noise inside or before them, in many passes at once: the law of the loop, and torch's numbers.

Legend: T passes, N sequences, L steps, C features.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

import vardrop as vd
from vardrop.prediction.chunks import Peak

N, L, C, H = 3, 4, 5, 6

LAYERS: dict[str, dict[str, Any]] = {
    "lstm": {"kind": nn.LSTM},
    "gru": {"kind": nn.GRU},
    "rnn-tanh": {"kind": nn.RNN},
    "rnn-relu": {"kind": nn.RNN, "nonlinearity": "relu"},
    "lstm-bidirectional": {"kind": nn.LSTM, "bidirectional": True},
    "gru-bidirectional-batch-first": {"kind": nn.GRU, "bidirectional": True, "batch_first": True},
    "lstm-batch-first": {"kind": nn.LSTM, "batch_first": True},
    "rnn-three-layers-batch-first": {"kind": nn.RNN, "num_layers": 3, "batch_first": True},
    "lstm-projected-bidirectional": {"kind": nn.LSTM, "proj_size": 2, "bidirectional": True},
    "gru-without-biases": {"kind": nn.GRU, "bias": False},
}
every = pytest.mark.parametrize("name", LAYERS)
pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")


class Reader(nn.Module):
    """A recurrent layer; outputs and last states of a sequence side by side, [N, features].

    Args:
        layer: LSTM, GRU or RNN.
        before: noise on the input, or on the initial states if ``"hx"``, or nowhere.
        hx: whether it starts from states of the caller.
        lengths: of the sequences, which are packed then.
    """

    def __init__(self, layer: nn.Module, before: str = "", hx: bool = False, lengths: list[int] | None = None) -> None:
        super().__init__()
        self.layer, self.before, self.lengths = layer, before, lengths
        self.noise = nn.Dropout(0.4 if before else 0.0)
        d = layer.num_layers * (1 + layer.bidirectional)
        size = layer.proj_size or H
        state = torch.linspace(-1, 1, d * N * size).view(d, N, size)
        memory = torch.linspace(1, -2, d * N * H).view(d, N, H)
        self.hx = ((state, memory) if layer.mode == "LSTM" else state) if hx else None

    def forward(self, x: Tensor) -> Tensor:
        first = self.layer.batch_first
        hx: Any = self.hx
        if self.before == "hx":
            hx = tuple(map(self.noise, hx)) if isinstance(hx, tuple) else self.noise(hx)
        elif self.before:
            x = self.noise(x)
        if self.lengths is None:
            out, last = self.layer(x if first else x.transpose(0, 1), hx)
        else:
            packed = pack_padded_sequence(x, torch.tensor(self.lengths), batch_first=True, enforce_sorted=False)
            found, last = self.layer(packed, hx)
            out = pad_packed_sequence(found, batch_first=first)[0]
        out = out if first else out.transpose(0, 1)
        states = last if isinstance(last, tuple) else (last,)
        return torch.cat([out.flatten(1), *(state.transpose(0, 1).flatten(1) for state in states)], 1)


def layer(name: str, dropout: float = 0.5) -> nn.Module:
    torch.manual_seed(3)
    about = {"num_layers": 2, **LAYERS[name]}
    return about.pop("kind")(C, H, dropout=dropout, **about)


def sequences() -> Tensor:
    return 2 * torch.randn(N, L, C, generator=torch.Generator().manual_seed(4))


def passes(model: nn.Module, samples: int, engine: str = "vmap", x: Tensor | None = None, **about: Any) -> Tensor:
    """[T, N, features]"""
    about = {"generator": torch.Generator().manual_seed(5), **about}
    found = vd.mc_predict(model, sequences() if x is None else x, samples, engine=engine, **about)
    assert (found.engine, found.samples is not None) == (engine, True)
    return found.samples.double()


def agree(one: Tensor, other: Tensor) -> None:
    """Mean and variance of two sets of passes within 4 standard errors, 5 where there are hundreds of entries."""
    bound = 4 if one[0].numel() < 100 else 5
    for a, b in ((one, other), ((one - one.mean(0)) ** 2, (other - other.mean(0)) ** 2)):
        error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt()
        assert ((a.mean(0) - b.mean(0)).abs() <= bound * error + 1e-6).all()


# ------------------------------------------------------------------------------------------------------------- law


@every
@pytest.mark.parametrize("hx", [False, True], ids=["from-zero", "from-states"])
def test_the_law_is_that_of_the_loop(name: str, hx: bool) -> None:
    model = Reader(layer(name), hx=hx)
    agree(passes(model, 4000), passes(model, 600, "loop"))


@pytest.mark.parametrize("before", ["x", "hx"])
def test_noise_before_and_inside(before: str) -> None:
    model = Reader(layer("lstm-bidirectional"), before, hx=True)
    agree(passes(model, 4000), passes(model, 600, "loop"))


@pytest.mark.parametrize("before", ["", "x"])
def test_packed_sequences_have_the_law_of_the_loop(before: str) -> None:
    model = Reader(layer("gru-bidirectional-batch-first"), before, lengths=[2, 4, 3])
    agree(passes(model, 4000), passes(model, 600, "loop"))


# ------------------------------------------------------------------------------------------------------ exact numbers


@every
@pytest.mark.parametrize("which", ["x", "hx", "both"])
def test_without_dropout_folded_passes_are_torchs_own(name: str, which: str) -> None:
    net = layer(name, 0.0).double().eval()
    x = torch.randn(7, *((N, L) if net.batch_first else (L, N)), C).double()
    d = net.num_layers * (1 + net.bidirectional)
    states = [torch.randn(7, d, N, net.proj_size or H).double(), torch.randn(7, d, N, H).double()]

    def outputs(x: Tensor, *hx: Tensor) -> tuple[Tensor, ...]:
        out, last = net(x, hx if net.mode == "LSTM" else hx[0])
        return (out, *last) if net.mode == "LSTM" else (out, last)

    operands = [x, *states[: 1 + (net.mode == "LSTM")]]
    batched = [True, *(False for _ in operands[1:])] if which == "x" else [which == "both", *(True for _ in states)]
    batched = batched[: len(operands)]
    given = [t if b else t[0] for t, b in zip(operands, batched, strict=True)]
    with torch.no_grad(), vd.stochastic(net):
        found = torch.vmap(outputs, in_dims=tuple(0 if b else None for b in batched), randomness="different")(*given)
        for t in range(7):
            wanted = outputs(*(v[t] if b else v for v, b in zip(given, batched, strict=True)))
            torch.testing.assert_close(tuple(each[t] for each in found), wanted, rtol=0, atol=1e-12)


def test_packed_without_dropout_folded_passes_are_torchs_own() -> None:
    net = layer("lstm-bidirectional", 0.0).double().eval()
    data, lengths = torch.randn(7, L, N, C).double(), torch.tensor([4, 3, 1])
    sizes = pack_padded_sequence(data[0], lengths).batch_sizes
    rows = torch.stack([pack_padded_sequence(each, lengths).data for each in data])

    def outputs(rows: Tensor) -> tuple[Tensor, ...]:
        found, last = net(nn.utils.rnn.PackedSequence(rows, sizes))
        return found.data, *last

    with torch.no_grad(), vd.stochastic(net):
        found = torch.vmap(outputs)(rows)
        for t in range(7):
            torch.testing.assert_close(tuple(each[t] for each in found), outputs(rows[t]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("first", [False, True])
def test_packing_and_padding_move_the_rows_of_every_pass(first: bool) -> None:
    x, lengths = torch.randn(2, 7, *((N, L) if first else (L, N)), C), torch.tensor([1, 4, 3])

    def there_and_back(x: Tensor) -> tuple[Tensor, Tensor]:
        packed = pack_padded_sequence(x, lengths, batch_first=first, enforce_sorted=False)
        return packed.data, pad_packed_sequence(packed, batch_first=first, padding_value=9.0)[0]

    with vd.stochastic(nn.Dropout()):
        found = torch.vmap(torch.vmap(there_and_back))(x)
    for a in range(2):
        for t in range(7):
            assert all(torch.equal(each[a, t], own) for each, own in zip(found, there_and_back(x[a, t]), strict=True))


def test_vmap_in_vmap_and_gradients_through_it() -> None:
    net = layer("gru", 0.0).double()
    x = torch.randn(2, 3, L, N, C).double().requires_grad_()
    with vd.stochastic(net):
        found = torch.vmap(torch.vmap(lambda x: net(x)[0]))(x)
        wanted = torch.stack([torch.stack([net(each)[0] for each in row]) for row in x])
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    parameters = (x, *net.parameters())
    torch.testing.assert_close(
        torch.autograd.grad(found.square().sum(), parameters), torch.autograd.grad(wanted.square().sum(), parameters)
    )


@every
def test_evaluation_is_left_alone(name: str) -> None:
    model = Reader(layer(name)).eval()
    before = model(sequences())
    passes(model, 3)
    assert torch.equal(model(sequences()), before)
    assert not any(module.training for module in model.modules())


# ----------------------------------------------------------------------------------------------------------- masks


class Sum(nn.Module):
    """Three linear layers in one RNN that pass their input on, so that a mask can be read off the output."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.rnn = nn.RNN(H, H, layers, nonlinearity="relu", bias=False, dropout=0.5, batch_first=True)
        for name, weight in self.rnn.named_parameters():
            nn.init.eye_(weight) if "ih" in name else nn.init.zeros_(weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


def test_masks_differ_between_passes_sequences_steps_and_units() -> None:
    found = passes(Sum(2), 500, x=torch.ones(N, L, H))  # 0 or 2, by the one mask
    assert set(found.unique().tolist()) == {0.0, 2.0}
    masks = (found > 0).double() - 0.5
    size = 500 * N * L * H
    for axis in range(4):
        along = (masks * masks.roll(1, axis)).mean() * 4  # a correlation; of one mask for all it would be 1
        assert along.abs() < 5 / size**0.5
    assert abs(masks.mean()) < 5 * 0.5 / size**0.5


def test_masks_differ_between_layers() -> None:
    found = passes(Sum(3), 500, x=torch.ones(N, L, H))  # 4 where both masks keep; one mask for both would keep half
    size = found.numel()
    assert abs((found == 4).double().mean() - 0.25) < 5 * (0.25 * 0.75 / size) ** 0.5
    assert set(found.unique().tolist()) == {0.0, 4.0}


def test_what_stands_before_the_first_mask_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vardrop.prediction import recurrent

    seen: list[tuple[int, ...]] = []
    plain = recurrent._Operation.__call__

    def noted(self: Any, x: Tensor, *rest: Any) -> Any:
        seen.append(tuple(x.shape))
        return plain(self, x, *rest)

    monkeypatch.setattr(recurrent._Operation, "__call__", noted)
    passes(Reader(layer("lstm")), 20, chunk=20)
    assert seen == [(L, N, C), (L, 20 * N, H)]


# ---------------------------------------------------------------------------------------------------- memory, refusals


def test_memory_stays_within_the_bound() -> None:
    model, x = nn.Sequential(nn.LSTM(64, 128, 2, dropout=0.5, batch_first=True), First()), torch.randn(8, 20, 64)
    with Peak() as one:
        vd.mc_predict(model, x, 2, chunk=1, keep=False)
    bound = 8 * one.most
    with Peak() as peak:
        found = vd.mc_predict(model, x, 60, max_memory=bound, keep=False)
    assert found.engine == "vmap"
    assert 1 < found.chunk < 60
    assert peak.most <= bound


def test_the_output_of_the_layer_counts_for_the_size_of_a_chunk() -> None:
    model = nn.Sequential(nn.LSTM(4, 128, 2, dropout=0.5, batch_first=True), First())
    found = vd.mc_predict(model, torch.randn(32, 64, 4), 24)  # 1 MiB in a pass
    assert (found.engine, found.chunk) == ("vmap", 4)


class First(nn.Module):
    """The last step of what a recurrent layer returns first."""

    def forward(self, found: Any) -> Tensor:
        return found[0][:, -1]


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_random_weights_run_in_the_loop_and_the_reason_is_told(kind: type[nn.Module]) -> None:
    model = nn.Sequential(kind(C, H, 2, dropout=0.5, batch_first=True), First())
    vd.convert_(model, vd.VariationalDropout())
    found = vd.mc_predict(model, sequences(), 5)
    assert found.engine == "loop"
    assert "must be the same in all passes under vmap, got" in found.reason
    with pytest.raises(RuntimeError, match=r"the weights of .* must be the same in all passes under vmap, got \d+ of"):
        vd.mc_predict(model, sequences(), 5, engine="vmap")


def test_dropout_inside_of_another_transform_is_refused() -> None:
    net = layer("lstm")
    with (
        vd.stochastic(net),
        pytest.raises(RuntimeError, match="must be used under vmap or under no transform of torch"),
    ):
        torch.func.grad(lambda x: net(x)[0].sum())(torch.randn(L, N, C))


def test_sequences_without_a_batch_and_one_layer() -> None:
    net = nn.GRU(C, H, 2, dropout=0.5)
    with torch.no_grad(), vd.stochastic(net):
        found = torch.vmap(lambda _: net(torch.ones(L, C))[0], randomness="different")(torch.empty(6))
        assert found.shape == (6, L, H)
        assert (found.std(0) > 0).all()
    with pytest.warns(UserWarning, match="dropout option adds dropout after all but last"):
        one = nn.GRU(C, H, dropout=0.5)
    with torch.no_grad(), vd.stochastic(one):
        same = torch.vmap(lambda _: one(torch.ones(L, C))[0], randomness="different")(torch.empty(6))
        assert torch.equal(same, one(torch.ones(L, C))[0].expand(6, -1, -1))


def test_calls_by_name() -> None:
    net = layer("gru")
    given = {"has_biases": True, "num_layers": 2, "dropout": 0.5, "train": True, "bidirectional": False}
    x, state = torch.ones(L, N, C), torch.zeros(2, N, H)

    def one(_: Tensor) -> Tensor:
        return torch.gru(x, hx=state, params=net._flat_weights, batch_first=False, **given)[0]

    with torch.no_grad(), vd.stochastic(net):
        found = torch.vmap(one, randomness="different")(torch.empty(6))
    assert (found.std(0) > 0).all()
