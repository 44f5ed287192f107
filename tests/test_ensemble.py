"""Ensembles: the same as a loop over separate models, for anything that a member may be."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.ensemble.stacking import reset_

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
Y = torch.randint(3, (12,), generator=torch.Generator().manual_seed(2))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "There is a performance drop", UserWarning)  # of vmap, for the reader
        torch.manual_seed(0)
        yield


def mlp(dropout: float = 0.0) -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Dropout(dropout), nn.Linear(8, 3)).double()


def normed() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()


class Tied(nn.Module):
    """One matrix used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.second.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.second(self.first(x).relu()))


class Sequences(nn.Module):
    """A recurrent network, for which vmap has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.last = nn.LSTM(1, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.lstm(x.T.unsqueeze(-1))[0][-1])


class Looking(nn.Module):
    """Control flow that looks at values, after BatchNorm has changed its statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(self.norm(x))
        return y if y.sum() > 0 else 2 * y


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp,
    "batch norm": normed,
    "batch norm first": lambda: nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3)).double(),
    "tied": lambda: Tied().double(),
    "lstm": lambda: Sequences().double(),
    "looking": lambda: Looking().double(),
}


def train(model: nn.Module, loss: Callable[[nn.Module], Tensor], optimizer: type[torch.optim.Optimizer]) -> None:
    steps = optimizer(model.parameters(), lr=0.05)
    for _ in range(4):
        steps.zero_grad()
        loss(model).backward()
        steps.step()


def assert_same(ensemble: vd.Ensemble, members: list[nn.Module]) -> None:
    for ours, theirs in zip(ensemble.members(), members, strict=True):
        state = theirs.state_dict()
        assert ours.state_dict().keys() == state.keys()
        for name, tensor in ours.state_dict().items():
            torch.testing.assert_close(tensor, state[name], msg=lambda words, name=name: f"{name}: {words}")


# --- the same as a loop ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("kind", MODELS)
def test_it_trains_as_separate_models_do(kind: str, optimizer: type[torch.optim.Optimizer]) -> None:
    ensemble = vd.Ensemble(MODELS[kind](), members=3, seed=5)
    separate = ensemble.members()
    train(ensemble, lambda m: m.losses(F.cross_entropy, m(X), Y).sum(), optimizer)
    for member in separate:
        train(member, lambda m: F.cross_entropy(m(X), Y), optimizer)
    assert_same(ensemble, separate)
    ensemble.eval()
    expected = torch.stack([member.eval()(X) for member in separate])
    torch.testing.assert_close(ensemble(X), expected)
    assert (expected[0] - expected[1]).abs().max() > 0.01


def test_every_member_may_have_a_batch_of_its_own() -> None:
    ensemble = vd.Ensemble(normed(), members=3)
    separate = ensemble.members()
    x = torch.randn(3, 12, 4, dtype=torch.float64)
    y = torch.randint(3, (3, 12))
    train(
        ensemble,
        lambda m: m.losses(F.cross_entropy, m(x, per_member=True), y, per_member=True).sum(),
        torch.optim.Adam,
    )
    for k, member in enumerate(separate):
        train(member, lambda m, k=k: F.cross_entropy(m(x[k]), y[k]), torch.optim.Adam)
    assert_same(ensemble, separate)


def test_a_loop_takes_the_place_of_vmap_and_says_why() -> None:
    ensemble = vd.Ensemble(Looking().double(), members=3)
    separate = ensemble.members()
    x = torch.randn(3, 12, 4, dtype=torch.float64)
    torch.testing.assert_close(ensemble(x, per_member=True), torch.stack([m(x[k]) for k, m in enumerate(separate)]))
    assert ensemble.fallback is not None
    assert "data-dependent control flow" in ensemble.fallback
    assert_same(ensemble, separate)  # the statistics have moved once
    ensemble.fallback = "chosen"
    torch.testing.assert_close(ensemble(x, per_member=True), torch.stack([m(x[k]) for k, m in enumerate(separate)]))
    assert ensemble.fallback == "chosen", "vmap is not tried again"
    other = vd.Ensemble(mlp(), members=2)
    other(X)
    assert other.fallback is None


def test_an_error_of_the_model_is_raised_as_it_is() -> None:
    ensemble = vd.Ensemble(mlp(), members=2)
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        ensemble(X[:, :3])
    assert ensemble.fallback is None


class Structured(nn.Module):
    """Outputs in a dict, keywords in."""

    def __init__(self, looks: bool) -> None:
        super().__init__()
        self.linear, self.looks = nn.Linear(4, 3), looks

    def forward(self, x: Tensor, *, shift: Tensor) -> dict[str, tuple[Tensor, list[Tensor]]]:
        y = self.linear(x) + shift
        if self.looks and y.sum() > 1e9:
            raise ArithmeticError
        return {"y": (y, [y.square()])}


@pytest.mark.parametrize("looks", [False, True])
def test_outputs_may_have_any_structure(looks: bool) -> None:
    ensemble = vd.Ensemble(Structured(looks).double(), members=3)
    y, (squares,) = ensemble(X, shift=X[:, :3])["y"]
    assert (ensemble.fallback is not None) == looks
    assert y.shape == (3, 12, 3)
    torch.testing.assert_close(squares, y.square())
    per_member = torch.arange(3.0, dtype=torch.float64).view(3, 1, 1)
    moved = ensemble(X.expand(3, 12, 4), shift=per_member, per_member=True)["y"][0]
    torch.testing.assert_close(moved - per_member, y - X[:, :3])


def test_members_have_dropout_of_their_own() -> None:
    ensemble = vd.Ensemble.from_modules([nn.Dropout(0.5)] * 3)
    masks = ensemble(torch.ones(1000)) > 0
    agree = (masks[0] == masks[1]).double().mean().item()
    assert agree == pytest.approx(0.5, abs=5 * 0.5 / 1000**0.5)
    assert torch.equal(ensemble.eval()(torch.ones(7)), torch.ones(3, 7))


# --- how members start ----------------------------------------------------------------------------------------------


def test_members_start_differently_and_repeatably() -> None:
    first, again, other = (vd.Ensemble(mlp(), members=3, seed=seed)(X) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert (first - other).abs().min() > 0
    assert all((first[i] - first[j]).abs().min() > 0 for i in range(3) for j in range(i))


def test_a_function_builds_the_members_from_their_seeds() -> None:
    built, copied = vd.Ensemble(lambda: nn.Linear(4, 3), seed=4), vd.Ensemble(nn.Linear(4, 3), seed=4)
    assert torch.equal(built(X.float()), copied(X.float()))


def test_the_callers_random_numbers_stay_where_they_are() -> None:
    model = mlp()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    vd.Ensemble(model)
    assert torch.equal(torch.rand(4), expected)


def test_parameters_are_drawn_as_when_a_module_is_built() -> None:
    for build in (lambda: nn.MultiheadAttention(8, 2), lambda: nn.LSTM(3, 4), normed):
        torch.manual_seed(7)
        model = build()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(9.0)
        reset_(model)
        assert all((parameter != 9).any() for parameter in model.parameters())


class Token(nn.Module):
    """A parameter that only the constructor sets."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(4))
        self.inner = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x + self.token)


def test_what_cannot_be_drawn_anew_is_refused() -> None:
    with pytest.raises(ValueError, match=r"members must start differently, got '1', a Token with parameters and no"):
        vd.Ensemble(nn.Sequential(nn.ReLU(), Token()))
    tokens = [m.token for m in vd.Ensemble(Token, members=2).members()]  # type: ignore[misc]
    assert (tokens[0] != tokens[1]).all()
    with pytest.raises(ValueError, match="every module must have its shape, got '0', which is lazy"):
        vd.Ensemble(nn.Sequential(nn.LazyLinear(3)))


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module or a function that builds one, got 3"):
        vd.Ensemble(3)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"function must build a torch.nn.Module, got int"):
        vd.Ensemble(lambda: 3)  # type: ignore[arg-type, return-value]
    one = mlp()
    with pytest.raises(ValueError, match="must build a new model in every call, got the same one twice"):
        vd.Ensemble(lambda: one)
    for members in (0, True, 2.0):
        with pytest.raises(ValueError, match="members must be a whole number of 1 or more, got"):
            vd.Ensemble(one, members=members)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"from_modules needs one torch.nn.Module or more"):
        vd.Ensemble.from_modules([])
    with pytest.raises(ValueError, match=r"with per_member=True every tensor must have 3 members in front, got .*12"):
        vd.Ensemble(one, members=3)(X, per_member=True)
    ensemble = vd.Ensemble(one, members=3)
    with pytest.raises(ValueError, match=r"every tensor must have 3 members in front, got shape \(12,\)"):
        ensemble.losses(F.cross_entropy, ensemble(X), Y, per_member=True)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (nn.Linear(4, 2), "whose weight is of shape .2, 4."),
        (nn.Linear(4, 3).double(), "torch.float64"),
        (nn.Linear(4, 3, bias=False), "with other parameters: bias"),
        (nn.Linear(4, 3).eval(), "in evaluation mode, unlike the first"),
        (nn.Linear(4, 3).requires_grad_(False), "requires_grad=False"),
        (nn.Bilinear(4, 4, 3), "of class Bilinear beside Linear"),
    ],
)
def test_members_must_be_alike(other: nn.Module, words: str) -> None:
    with pytest.raises(ValueError, match=f"differ in the values of their parameters alone, got member 1 .*{words}"):
        vd.Ensemble.from_modules([nn.Linear(4, 3), other])


# --- a module like any other ----------------------------------------------------------------------------------------


def test_state_dict_copies_and_pickles() -> None:
    ensemble = vd.Ensemble(normed(), members=3).eval()
    assert ensemble.state_dict()["stacked.0.weight"].shape == (3, 8, 4)
    other = vd.Ensemble(normed(), members=3, seed=9).eval()
    other.load_state_dict(ensemble.state_dict())
    for same in (other, copy.deepcopy(ensemble), pickle.loads(pickle.dumps(ensemble))):
        assert torch.equal(same(X), ensemble(X))
    assert len(ensemble) == 3
    assert "members=3" in repr(ensemble)


def test_members_are_copies() -> None:
    ensemble = vd.Ensemble(Tied().double(), members=2)
    before = ensemble(X).clone()
    member = ensemble.members()[0]
    assert member.first.weight is member.second.weight  # type: ignore[union-attr]
    with torch.no_grad():
        member.first.weight.zero_()  # type: ignore[union-attr, operator]
    assert torch.equal(ensemble(X), before)
    assert ensemble.stacked.first.weight is ensemble.stacked.second.weight  # type: ignore[union-attr]
    again = vd.Ensemble.from_modules(ensemble.members())
    assert torch.equal(again(X), before)


def test_fixed_rates_are_shared_and_can_be_scheduled() -> None:
    ensemble = vd.Ensemble(nn.Sequential(vd.layers.Dropout(0.5), nn.Linear(4, 3)), members=2)
    ensemble.stacked[0].p = 1.0  # type: ignore[index]
    y = ensemble(X.float())
    assert torch.equal(y[:, 0], y[:, 1])
    assert "p=1" in repr(ensemble)
    learned = nn.Sequential(vd.layers.GaussianDropout(vd.rates.learned(0.2), features=4), nn.Linear(4, 3))
    with pytest.raises(ValueError, match="a layer that learns its rate cannot be stacked, got '0', a GaussianDropout"):
        vd.Ensemble.from_modules([learned, copy.deepcopy(learned)])


# --- random weights -------------------------------------------------------------------------------------------------

POSTERIORS = [
    vd.VariationalDropout(type="A"),
    vd.VariationalDropout(type="B", sharing="weight"),
    vd.VariationalDropout(type="B", prior="gaussian"),
    vd.VariationalDropout(type="A", prior="cubic"),
    vd.SparseVariationalDropout(),
    vd.SparseVariationalDropout(sharing="neuron"),
    vd.SparseVariationalDropout(sharing="layer"),
    vd.GaussianPosterior(),
    vd.GaussianDropout(type="B", rate=0.3),
]


@pytest.mark.parametrize("config", POSTERIORS, ids=str)
def test_random_weights_train_as_in_separate_models(config: object) -> None:
    model = mlp()
    vd.convert_(model, config)  # type: ignore[arg-type]
    ensemble = vd.Ensemble(model, members=3)
    separate = ensemble.members()
    torch.testing.assert_close(vd.kl_divergence(ensemble), sum(vd.kl_divergence(m) for m in separate))
    elbo, elbos = vd.ELBO(ensemble, num_data=12), [vd.ELBO(m, num_data=12) for m in separate]
    with vd.estimator("none"):  # the same gradient for all: no noise
        train(ensemble, lambda m: elbo(m.losses(F.cross_entropy, m(X), Y).sum()), torch.optim.Adam)
        for one, member in zip(elbos, separate, strict=True):
            train(member, lambda m, one=one: one(F.cross_entropy(m(X), Y)), torch.optim.Adam)
    assert ensemble.fallback is None
    assert_same(ensemble, separate)
    assert elbo.last.kl == pytest.approx(sum(one.last.kl for one in elbos))
    for name, rates in vd.dropout_rates(ensemble).items():
        expected = [vd.dropout_rates(m)[name.removeprefix("stacked.")] for m in separate]
        torch.testing.assert_close(rates, torch.stack(expected) if rates.ndim > 1 else expected[0])


def test_random_weights_have_noise_of_their_own_in_every_member() -> None:
    model = nn.Linear(50, 1, bias=False)
    nn.init.ones_(model.weight)
    vd.convert_(model, vd.VariationalDropout(type="B", alpha=1.0))
    ensemble = vd.Ensemble.from_modules([model, model])
    one, other = ensemble(torch.ones(4000, 50)).squeeze(-1)
    for y in (one, other):  # N(50, 50)
        assert y.mean().item() == pytest.approx(50, abs=5 * (50 / 4000) ** 0.5)
        assert y.var().item() == pytest.approx(50, rel=5 * (2 / 4000) ** 0.5)
    assert torch.corrcoef(torch.stack([one, other]))[0, 1].abs().item() < 5 / 4000**0.5
    assert torch.equal(*ensemble.eval()(torch.ones(1, 50)))


@pytest.mark.parametrize("config", [vd.VariationalDropout(), vd.SparseVariationalDropout()], ids=str)
def test_noise_keeps_its_start_when_weights_are_drawn_anew(config: object) -> None:
    model = nn.LSTM(3, 4)
    vd.convert_(model, config)  # type: ignore[arg-type]
    expected = {name: value for name, value in model.state_dict().items() if "log" in name}
    state = vd.Ensemble(model, members=2).state_dict()
    for name, value in expected.items():
        assert torch.equal(state[f"stacked.{name}"], torch.stack([value, value]))


def test_members_are_converted_before_they_are_stacked_or_after_they_are_taken_out() -> None:
    ensemble = vd.Ensemble(mlp(), members=3)
    member = ensemble.members()[0]
    assert vd.convert_(member, vd.VariationalDropout()).converted == ["0", "3"]
    vd.convert_(ensemble, vd.VariationalDropout())
    with pytest.raises(RuntimeError, match=r"must keep the parameters that it was made with, got .*weight_log_alpha"):
        ensemble(X)


def test_restored_members_are_plain() -> None:
    model = mlp()
    vd.convert_(model, vd.VariationalDropout())
    plain = vd.Ensemble(model, members=2).members()[1]
    vd.restore_(plain)
    assert plain.state_dict().keys() == mlp().state_dict().keys()


# --- prediction -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["mlp", "looking"])
def test_members_play_the_part_of_passes(kind: str) -> None:
    ensemble = vd.Ensemble(nn.Sequential(MODELS[kind](), nn.Dropout(0.5)), members=4)
    ensemble.stacked[1].eval()  # type: ignore[index]
    prediction = ensemble.predict(X, "logits")
    probabilities = torch.stack([member.eval()(X).softmax(-1) for member in ensemble.members()])
    torch.testing.assert_close(prediction.samples, probabilities)
    torch.testing.assert_close(prediction.probabilities, probabilities.mean(0))
    entropy = torch.special.entr(probabilities.mean(0)).sum(-1)
    torch.testing.assert_close(prediction.predictive_entropy, entropy)
    assert prediction.passes == 4
    assert (prediction.engine, bool(prediction.reason)) == (("loop", True) if kind == "looking" else ("vmap", False))
    assert [m.training for m in (ensemble, ensemble.stacked[0], ensemble.stacked[1])] == [True, True, False]  # type: ignore[index]


def test_prediction_from_a_loader() -> None:
    ensemble = vd.Ensemble(mlp(), members=3)
    loader = [(X[:5], Y[:5]), (X[5:], Y[5:])]
    torch.testing.assert_close(ensemble.predict(loader).samples, ensemble.predict(X).samples)
    assert ensemble.predict(loader, keep=False).samples is None
    with pytest.raises(ValueError, match="predict needs a batch or more, got a loader that has none"):
        ensemble.predict([])


def test_members_must_be_built_alike() -> None:
    def member(act: nn.Module, p: float) -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), act, nn.Dropout(p), nn.Linear(8, 2))

    for other, words in (
        (member(nn.Tanh(), 0.1), r"whose 1 is Tanh\(\) beside ReLU\(\)"),
        (member(nn.ReLU(), 0.9), r"whose 2 is Dropout\(p=0.9, inplace=False\) beside Dropout\(p=0.1, inplace=False\)"),
    ):
        with pytest.raises(ValueError, match=words):
            vd.Ensemble.from_modules([member(nn.ReLU(), 0.1), other])


def test_a_member_that_writes_to_its_input_leaves_it_to_the_others() -> None:
    class Halves(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            if float(self.weight.detach().sum()) == float("inf"):  # which vmap cannot ask: the loop runs
                return x
            return super().forward(x.mul_(0.5))

    ensemble = vd.Ensemble.from_modules([Halves(4, 2) for _ in range(3)])
    x = torch.randn(5, 4)
    kept = x.clone()
    for _ in range(2):
        with torch.no_grad():
            outputs = ensemble(x)
        for member, output in zip(ensemble.members(), outputs, strict=True):
            torch.testing.assert_close(output, member(kept.clone()))
        assert torch.equal(x, kept)
    assert ensemble.fallback is not None


def test_an_ensemble_is_made_sparse_member_by_member() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    vd.convert_(net, vd.SparseVariationalDropout())
    ensemble = vd.Ensemble(net, 3)
    words = r"must be the weight of one network, got those of 3 members of a vd.Ensemble; take them one by one"
    with pytest.raises(ValueError, match=words):
        vd.sparsify_(ensemble, target_sparsity=0.3)
    assert vd.sparsify_(ensemble.members()[0], target_sparsity=0.3).sparsity >= 0.3


@pytest.mark.parametrize(
    "config", [vd.GaussianPosterior(std=0.3), vd.SparseVariationalDropout(), vd.VariationalDropout()]
)
def test_the_divergence_of_padded_embeddings_is_that_of_the_members(config: Any) -> None:
    members = [nn.Embedding(7, 4, padding_idx=1) for _ in range(3)]
    for member in members:
        vd.convert_(member, config)
    ensemble = vd.Ensemble.from_modules(members)
    torch.testing.assert_close(vd.kl_divergence(ensemble), sum(map(vd.kl_divergence, members)))


def test_in_inference_mode_and_compiled() -> None:
    ensemble, x = vd.Ensemble.from_modules([nn.Linear(3, 2) for _ in range(2)]), torch.randn(4, 3)
    wanted = ensemble(x).detach()
    with torch.inference_mode():
        torch.testing.assert_close(ensemble(x.clone()), wanted)
    compiled = torch.compile(ensemble, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x).detach(), wanted)


def test_the_prediction_has_the_other_outputs_and_no_nan() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"logits": self.linear(x), "none": None, "hidden": (x, 2 * self.linear(x))}

    ensemble = vd.Ensemble(Both(), 3)
    x = torch.randn(12, 4)
    for inputs in (x, list(x.split(5))):
        found = ensemble.predict(inputs, "logits")
        assert list(found.outputs) == ["hidden.0", "hidden.1"]
        torch.testing.assert_close(found.outputs["hidden.0"].mean, x)
        assert found.outputs["hidden.1"].std.min() > 0
    with pytest.raises(
        ValueError, match=r"vardrop.Ensemble.predict: outputs must be numbers, got nan for 12 of 12 exam"
    ):
        ensemble.predict(x * torch.nan)
