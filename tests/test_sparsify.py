"""Which weights go, what is told of it, and that they stay away."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import vardrop as vd
from vardrop.sparsity.ranking import Order, groups_of
from vardrop.weights.modules import noisy_weights

POSTERIORS = {
    "sparse": vd.SparseVariationalDropout(),
    "B": vd.VariationalDropout(type="B", sharing="weight", max_alpha=math.inf),
    "gaussian": vd.GaussianPosterior(prior="log_uniform"),
    "gaussian prior": vd.GaussianPosterior(),
    "B per output": vd.VariationalDropout(type="B", sharing="neuron", unit="output", max_alpha=math.inf),
    "A": vd.VariationalDropout(type="A", max_alpha=math.inf),
}


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))


def noisy(config: vd.SparseVariationalDropout, seed: int = 0) -> nn.Sequential:
    """An MLP whose log α are spread over both sides of 3."""
    torch.manual_seed(seed)
    model = mlp()
    vd.convert_(model, config)
    with torch.no_grad():
        for module in (model[0], model[2]):
            noise = module.weight_log_alpha if hasattr(module, "weight_log_alpha") else module.weight_log_variance
            noise.copy_(3 + 3 * torch.randn(noise.shape))
    return model


def mean(model: nn.Module, name: str) -> Tensor:
    """A parameter, also in training, where the attribute is random."""
    return dict(model.named_parameters())[name]


def log_alphas(model: nn.Module) -> dict[str, Tensor]:
    """log α of every weight by the posterior's own account, spread over the entries by hand."""
    spread = {}
    for name, log_alpha in vd.dropout_rates(model, as_="log_alpha").items():
        weight = mean(model, name)
        by_output = log_alpha.ndim == 1 and getattr(model[0].vardrop_noise["weight"].config, "unit", "") == "output"
        spread[name] = (log_alpha[:, None] if by_output else log_alpha).expand(weight.shape)
    return spread


@pytest.mark.parametrize("config", POSTERIORS.values(), ids=POSTERIORS)
def test_exactly_the_weights_above_the_threshold_go(config: vd.SparseVariationalDropout) -> None:
    model = noisy(config)
    before = {name: mean(model, name).detach().clone() for name in ("0.weight", "2.weight")}
    above = {name: log_alpha > 3 for name, log_alpha in log_alphas(model).items()}
    report = vd.sparsify_(model)
    for layer in report.layers:
        after = mean(model, layer.name)
        assert torch.equal(after == 0, above[layer.name])
        assert torch.equal(after[~above[layer.name]], before[layer.name][~above[layer.name]])
        assert (layer.weights, layer.removed) == (after.numel(), int((after == 0).sum()))
        assert layer.sparsity == layer.removed / layer.weights
    assert report.threshold == 3.0
    assert report.removed == sum(int(mask.sum()) for mask in above.values())
    assert report.compression == pytest.approx(45 / (45 - report.removed))
    assert f"{report.removed} of 45 removed" in str(report)


@pytest.mark.parametrize("config", POSTERIORS.values(), ids=POSTERIORS)
def test_what_is_removed_has_no_noise(config: vd.SparseVariationalDropout) -> None:
    model = noisy(config)
    vd.sparsify_(model)
    layer = model.train()[0]
    samples = torch.stack([layer.random_weight("weight").drawn() for _ in range(10)])
    removed = mean(layer, "weight") == 0
    assert samples[:, removed].abs().max() < 1e-6
    assert samples[:, ~removed].std(0).min() > 0
    assert math.isfinite(vd.kl_divergence(model).item())


def test_input_units_go_as_a_whole_under_rates_of_neurons() -> None:
    model = noisy(POSTERIORS["A"])
    vd.sparsify_(model)
    assert all((zero.all() or not zero.any()) for zero in (mean(model, "0.weight") == 0).T)


def test_channels_of_a_grouped_convolution_go_as_a_whole() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(6, 4, 3, groups=2)
    vd.convert_(conv, vd.VariationalDropout(max_alpha=math.inf))
    with torch.no_grad():
        conv.weight_log_alpha.copy_(torch.tensor([0.0, 5, 0, 0, 0, 5]))
    vd.sparsify_(conv)
    vd.restore_(conv)
    x = torch.randn(2, 6, 5, 5)
    dead = x.clone()
    dead[:, [1, 5]] = 0
    torch.testing.assert_close(conv(x), conv(dead))
    assert int((conv.weight == 0).sum()) == 2 * 2 * 9


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 63), st.sampled_from(sorted(POSTERIORS)), st.integers(0, 5))
def test_a_target_is_reached_and_by_no_more_than_one_group(part: int, kind: str, seed: int) -> None:
    model, target = noisy(POSTERIORS[kind], seed), part / 64
    groups, _ = groups_of(model)
    largest = max(each.group.numel() // len(each.log_alpha) for each in groups)
    order = [log_alpha.flatten() for log_alpha in log_alphas(model).values()]
    report = vd.sparsify_(model, target_sparsity=target, allow_empty=True)
    assert 45 * target <= report.removed < 45 * target + largest
    removed = torch.cat([(mean(model, layer.name) == 0).flatten() for layer in report.layers])
    if 0 < report.removed < 45:
        assert torch.cat(order)[removed].min() >= torch.cat(order)[~removed].max()


def test_of_equal_rates_the_smaller_weights_go_first() -> None:
    layer = nn.Linear(8, 1)
    vd.convert_(layer, vd.SparseVariationalDropout(log_variance=30.0))  # all of them at the clip
    with torch.no_grad():
        mean(layer, "weight").copy_(torch.tensor([[3.0, 1, 4, 1.5, 9, 2, 6, 5]]))
    vd.sparsify_(layer, target_sparsity=0.5)
    assert mean(layer, "weight").tolist() == [[0, 0, 4, 0, 9, 0, 6, 5]]


def test_zeros_count_as_removed_whatever_their_rates() -> None:
    layer = nn.Linear(4, 1)
    vd.convert_(layer, POSTERIORS["B"])
    with torch.no_grad():
        mean(layer, "weight")[0, 2] = 0.0
    report = vd.sparsify_(layer)
    assert report.removed == 1
    assert "nothing was removed" in str(report)
    assert vd.sparsify_(layer, target_sparsity=0.25).removed == 1


def truth_error(kept: list[int]) -> Callable[[nn.Module], float]:
    """An error that grows with what is lost, by a known amount."""
    return lambda model: sum(kept) - float(mean(model, "weight").abs().sum())


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=3, max_size=60), st.integers(0, 40))
def test_the_largest_sparsity_within_an_error_is_found_where_errors_rise(sizes: list[int], allowed: int) -> None:
    increase = allowed + 0.5  # all sums are whole numbers
    layer = nn.Linear(len(sizes), 1)
    vd.convert_(layer, vd.SparseVariationalDropout(clip=40.0))
    with torch.no_grad():
        weight = mean(layer, "weight").copy_(torch.tensor([sizes], dtype=torch.float))
    losses = weight.abs().flatten().sort().values.double().cumsum(0)
    report = vd.sparsify_(layer, max_error_increase=increase, validation=truth_error(sizes))
    best = min(int((losses <= increase).sum()), len(sizes) - 1)
    assert report.removed == best
    thresholds, sparsities, errors = zip(*report.curve, strict=True)
    assert list(sparsities) == sorted(sparsities)
    assert list(thresholds) == sorted(thresholds, reverse=True)
    torch.testing.assert_close(
        torch.tensor(errors).diff().clamp(max=0), torch.zeros(len(errors) - 1), atol=1e-5, rtol=0
    )


def test_the_curve_on_batches_is_the_error_of_the_model_at_each_threshold() -> None:
    model = noisy(POSTERIORS["sparse"])
    x, y = torch.randn(50, 6), torch.randint(3, (50,))
    loader = [(x[:20], y[:20]), (x[20:], y[20:])]
    report = vd.sparsify_(copy.deepcopy(model).train(), threshold=2.0, validation=loader)
    assert "threshold  sparsity  error" in str(report)
    for point in report.curve[::6]:
        other = copy.deepcopy(model)
        with torch.no_grad():
            for name, log_alpha in log_alphas(other).items():
                mean(other, name)[log_alpha >= point.threshold] = 0
        assert point.error == pytest.approx(float((other.eval()(x).argmax(1) != y).double().mean()))


def test_real_targets_have_a_root_mean_square() -> None:
    layer = nn.Linear(2, 1, bias=False)
    vd.convert_(layer, vd.SparseVariationalDropout())
    x, y = torch.eye(2), torch.tensor([1.0, 2.0])
    dense = (layer.eval()(x).flatten() - y).square().mean().sqrt().item()
    report = vd.sparsify_(layer, validation=[(x, y)])
    assert report.curve[0].error == pytest.approx(dense, rel=1e-5)


def test_measuring_leaves_flags_and_weights_alone() -> None:
    model = noisy(POSTERIORS["gaussian"]).train()
    model[1].eval()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ZeroDivisionError):
        vd.sparsify_(model, validation=lambda model: 1 / 0)
    assert [module.training for module in model] == [True, False, True]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"threshold": 1.0, "target_sparsity": 0.5}, "give one of threshold, target_sparsity and max_error_increase"),
        ({"threshold": math.nan}, "threshold must be a finite log alpha, got nan"),
        ({"target_sparsity": 1.0}, "target_sparsity must be at least 0 and below 1, got 1.0"),
        (
            {"max_error_increase": -0.1, "validation": []},
            "max_error_increase must be finite and not negative, got -0.1",
        ),
        ({"max_error_increase": 0.1}, "max_error_increase needs validation, a function of the model or batches"),
        ({"validation": 3}, "validation must be a function of the model that returns its error, or batches"),
        ({"validation": []}, "validation must have batches .*, got none; a loader, not an iterator"),
        ({"threshold": -1e3}, r"every layer must keep a weight, got 0.weight, 2.weight with none left at log alpha"),
    ],
)
def test_refusals_leave_the_model_as_it_was(arguments: dict[str, object], words: str) -> None:
    model = noisy(POSTERIORS["sparse"])
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=words):
        vd.sparsify_(model, **arguments)  # type: ignore[arg-type]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_model_without_learned_noise_is_refused() -> None:
    with pytest.raises(ValueError, match=r"needs weights with learned noise, for example .* got a Sequential without"):
        vd.sparsify_(mlp())
    model = mlp()
    vd.convert_(model, vd.GaussianDropout())
    with pytest.raises(ValueError, match=r"0.weight has the fixed rates of a GaussianDropout"):
        vd.sparsify_(model)


def test_a_layer_may_go_where_that_is_allowed() -> None:
    model = noisy(POSTERIORS["sparse"])
    assert vd.sparsify_(model, threshold=-1e3, allow_empty=True).compression == math.inf


def test_a_model_never_trained_sparse_is_told_so() -> None:
    model = mlp()
    vd.convert_(model, vd.SparseVariationalDropout())
    report = vd.sparsify_(model, threshold=7.9)
    assert report.removed == 0
    assert "may not be trained long enough" in str(report)
    bounded = mlp()
    vd.convert_(bounded, vd.VariationalDropout(type="B", sharing="weight"))
    assert "their posterior bounds log alpha by 0 (max_alpha)" in str(vd.sparsify_(bounded))
    small = mlp()
    with torch.no_grad():
        small[0].weight[0, :2] = 1e-4  # some weights of any network are
    vd.convert_(small, vd.SparseVariationalDropout())
    report = vd.sparsify_(small)
    assert report.removed > 0
    assert "the noise was never trained: it has one value everywhere (-10)" in str(report)
    with torch.no_grad():
        next(iter(noisy_weights(small))).noise[0, 0] += 1
    assert "never trained" not in str(vd.sparsify_(small))
    halved = mlp().bfloat16()
    vd.convert_(halved, vd.SparseVariationalDropout())
    words = "train with vd.ELBO first (in half precision, where steps below 0.031 are rounded away, keep it in float32)"
    assert words in str(vd.sparsify_(halved, target_sparsity=0.1))


def test_more_than_the_noise_has_taken_over_is_said() -> None:
    model = mlp()
    vd.convert_(model, vd.SparseVariationalDropout())
    with torch.no_grad():
        for weight in noisy_weights(model):
            weight.noise.uniform_(-9, -3)
    report = vd.sparsify_(copy.deepcopy(model), target_sparsity=0.7)
    assert report.threshold < 3
    rate = 1 / (1 + math.exp(-report.threshold))
    assert f"goes down to {report.threshold:.3g}, a dropout rate of {rate:.2g}: below 3" in str(report)
    assert "has not taken" not in str(vd.sparsify_(copy.deepcopy(model), target_sparsity=0.01))
    assert "has not taken" not in str(vd.sparsify_(model, threshold=-4.0))  # it was asked for by its number


def test_tied_weights_are_counted_once_and_zero_in_both_places() -> None:
    model = nn.Sequential(nn.Embedding(7, 4), nn.Linear(4, 7))
    model[1].weight = model[0].weight
    vd.convert_(model, vd.SparseVariationalDropout(log_variance=-3.0))
    report = vd.sparsify_(model, target_sparsity=0.5)
    assert report.weights == 28
    assert "0.weight, 1.weight are one weight" in str(report)
    assert int((mean(model[1], "weight") == 0).sum()) == 14


# ------------------------------------------------------------------------------------------------------ fine-tuning

OPTIMIZERS = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, weight_decay=0.1, nesterov=True),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.1, weight_decay=0.1, amsgrad=True),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, max_iter=3),
}


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = (model(torch.ones(4, 6) + torch.arange(4.0)[:, None]) - 1).square().mean()
        loss.backward()
        return loss

    optimizer.step(closure)


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize("kind", ["sparse", "gaussian", "B", "A", "plain"])
def test_zeros_stay_zero_against_momentum_and_decay(make: object, kind: str) -> None:
    model = noisy(POSTERIORS["sparse" if kind == "plain" else kind])
    optimizer = make(model.parameters())  # type: ignore[operator]
    step(model, optimizer)  # momentum from before
    vd.sparsify_(model, target_sparsity=0.5)
    if kind == "plain":
        vd.restore_(model)
    zeros = {name: mean(model, name) == 0 for name in ("0.weight", "2.weight")}
    before = mean(model, "0.weight").detach().clone()
    with vd.finetune(model) as held:
        for _ in range(3):
            step(model, optimizer)
            assert all(torch.equal(mean(model, name) == 0, zero) for name, zero in zeros.items())
            assert all(not mean(model, name).grad[zero].any() for name, zero in zeros.items())
    assert held == {name: int(zero.sum()) for name, zero in zeros.items()}
    assert not torch.equal(mean(model, "0.weight"), before)
    if kind == "gaussian":  # the noise of removed weights stays silent
        assert mean(model, "0.weight_log_variance")[zeros["0.weight"]].max() == -40
    step(model, optimizer)
    if kind == "plain":
        assert any((mean(model, name)[zero] != 0).any() for name, zero in zeros.items())


def test_steps_by_hand_are_put_right_at_the_end() -> None:
    layer = nn.Linear(3, 2)
    with torch.no_grad():
        layer.weight[:, 1] = 0
    with vd.finetune(layer), torch.no_grad():
        layer.weight += 1
    assert not layer.weight[:, 1].any()
    assert layer.weight[:, 0].all()


def test_frozen_weights_can_be_held() -> None:
    layer = nn.Linear(3, 2).requires_grad_(False)
    layer.weight[0, 0] = 0
    with vd.finetune(layer) as held:
        assert held == {"weight": 1}


def test_a_model_without_zeros_is_refused() -> None:
    with pytest.raises(ValueError, match="needs a model with weights at zero, got one in which nothing was removed"):
        vd.finetune(mlp()).__enter__()


def test_ranks_are_a_permutation() -> None:
    order = Order(groups_of(noisy(POSTERIORS["sparse"]))[0])
    assert torch.equal(order.rank.sort().values, torch.arange(order.total))


@pytest.mark.parametrize(
    ("outputs", "y"),
    [
        (1, torch.tensor([0, 1, 1, 0])),  # argmax over one logit is always 0
        (2, torch.tensor([[0], [1], [1], [0]])),
        (2, torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]])),
        (2, torch.tensor([0, 1, 1])),
        (2, torch.zeros(4)),
        (1, torch.zeros(3)),
    ],
)
def test_truths_that_do_not_fit_the_outputs(outputs: int, y: Tensor) -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, outputs))
    vd.convert_(model, vd.SparseVariationalDropout())
    before = [weight.mean.clone() for weight in noisy_weights(model)]
    with pytest.raises(ValueError, match=r"y of validation must be .*, got y of shape .* and outputs of shape \(4, "):
        vd.sparsify_(model, max_error_increase=0.0, validation=[(torch.randn(4, 3), y)])
    assert all(torch.equal(a, b.mean) for a, b in zip(before, noisy_weights(model), strict=True))


def test_validation_sees_its_inputs_unchanged() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.mul_(0.5))

    model = Careless()
    vd.convert_(model, vd.SparseVariationalDropout())
    x, y = torch.randn(4, 3), torch.tensor([0, 1, 1, 0])
    kept = x.clone()
    vd.sparsify_(model, target_sparsity=0.1, validation=[(x, y)])
    assert torch.equal(x, kept)
