"""The diagnosis: planted faults are found and nothing else is, k is what theory says, and nothing is left behind."""

from __future__ import annotations

import doctest
import math
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planted
import vardrop as vd
from vardrop.diagnosis.passes import Passes, hooked
from vardrop.diagnosis.report import BatchNormShift, Diagnosis, Finding, Unjudged
from vardrop.diagnosis.scores import labels_of
from vardrop.diagnosis.statistics import Inputs
from vardrop.diagnosis.theory import conditional_variance, direct_ratio, rate_for
from vardrop.diagnosis.tracing import tracing


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def only(diagnosis: Diagnosis) -> BatchNormShift:
    (found,) = diagnosis.batchnorms
    return found


# ------------------------------------------------------------------------------------------------- planted faults


@pytest.mark.parametrize("build", planted.HEALTHY + planted.PLANTED, ids=lambda build: build.__name__)
def test_the_planted_fault_is_found_and_nothing_else(build: planted.Build) -> None:
    case = build()
    found = vd.diagnose(case.model, case.batches, validation=case.validation)
    assert [(finding.where, finding.rule) for finding in found.findings] == case.expected, str(found)
    assert all(finding.severity > 0 and finding.why.endswith(".") and finding.todo for finding in found.findings)


def test_there_are_as_many_of_each_kind_as_promised() -> None:
    assert len(planted.HEALTHY) >= 4
    assert len(planted.PLANTED) >= 8


def test_two_dropouts_before_one_batchnorm_are_told_apart() -> None:
    data = planted.rows()
    layers = (nn.Linear(8, 32), nn.Dropout(0.02), nn.ReLU(), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.Linear(32, 2))
    found = vd.diagnose(planted.settled(nn.Sequential(*layers), data), data)
    assert [finding.where for finding in found.findings] == ["3"]
    causes = only(found).causes
    assert set(causes) == {"1", "3"}
    assert causes["1"] < 1.1 < causes["3"]


def test_findings_are_in_the_order_of_harm() -> None:
    data = planted.rows()
    one = (nn.Linear(8, 32), nn.Dropout(0.2), nn.BatchNorm1d(32), nn.ReLU())
    other = (nn.Linear(32, 32), nn.Dropout(0.7), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    found = vd.diagnose(planted.settled(nn.Sequential(*one, *other), data), data)
    assert [finding.where for finding in found.findings] == ["5", "1"]
    severities = [finding.severity for finding in found.findings]
    assert severities == sorted(severities, reverse=True)


def test_attention_on_in_evaluation_is_named_where_it_is_called() -> None:
    net = nn.Sequential(nn.Linear(8, 8), planted.ConstantAttention(constant=True))
    (finding,) = vd.diagnose(net, planted.rows()).findings
    assert (finding.where, finding.rule) == ("1", "noise-in-evaluation")
    assert "scaled_dot_product_attention" in finding.why


def test_attention_weights_are_no_feature_map() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.1)

        def forward(self, x: Tensor) -> Tensor:
            weights = self.drop(torch.softmax(x @ x.mT / 100, -1))  # [batch, heads, 16, 16], smooth
            return (weights @ x).mean((2, 3))

    net = nn.Sequential(Attention(), nn.Linear(2, 2))
    assert not vd.diagnose(net, [torch.randn(8, 2, 16, 4).cumsum(2)]).findings


def test_after_recalibration_the_shift_does_no_harm_and_is_still_told() -> None:
    case = planted.directly_before()
    planted.settled(case.model[1].eval() and case.model, case.batches)
    inputs = torch.cat([x for x, _ in case.batches])
    with torch.no_grad():
        hidden = case.model[0](inputs)
        case.model[2].running_mean.copy_(hidden.mean(0))
        case.model[2].running_var.copy_(hidden.var(0))
    found = vd.diagnose(case.model, case.batches)
    assert not found.findings
    assert only(found).ratio > 1.8
    assert abs(only(found).running - 1) < 1e-5


# ---------------------------------------------------------------------------------------------------------- theory

LAYERS = {
    "plain": nn.Dropout(0.3),
    "ours": vd.layers.Dropout(0.3),
    "gaussian": vd.layers.GaussianDropout(0.3),
    "path": vd.layers.DropPath(0.3),
}


@pytest.mark.parametrize("mean", [0.0, 1.5])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_k_directly_after_dropout_is_that_of_theory(layer: nn.Module, mean: float) -> None:
    data = [mean + torch.randn(512, 16) for _ in range(6)]
    found = only(vd.diagnose(nn.Sequential(layer, nn.BatchNorm1d(16)), data))
    expected = direct_ratio(0.3, mean, 1.0)
    assert found.theory == pytest.approx(expected, rel=0.05)
    assert abs(found.ratio - expected) < 4 * found.error + 0.03 * (expected - 1)  # these data's own moments differ
    gap, error = found.theory_gap or (math.nan, math.nan)
    assert abs(gap) < 4 * error
    assert error < 0.1 * math.log(1.1) * 4  # a theory that is 10 % off would be 2.5 errors away, at the least


def test_a_zero_mean_gives_one_over_q() -> None:
    assert direct_ratio(0.5, 0.0, 3.0) == 2.0
    assert direct_ratio(0.25, 0.0, 0.1) == pytest.approx(4 / 3)


def test_a_theory_ten_percent_off_is_caught() -> None:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(4096, 16, generator=generator)
    noisy = x * (torch.rand(x.shape, generator=generator) < 0.7) / 0.7
    inputs = Inputs()
    inputs.add(x, noisy)
    right = inputs.log_variance(noise=True) - inputs.log_theory(0.3 / 0.7, direct=True)
    wrong = right.mean()[0] - math.log(1.1)
    assert abs(right.mean()[0]) < 4 * right.mean()[1] < abs(wrong)


CONVOLUTION = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU(), nn.Dropout(0.4), nn.Conv2d(4, 5, 3, stride=2))


@pytest.mark.parametrize(
    ("front", "norm", "shape"),
    [
        (nn.Sequential(nn.Linear(8, 6), nn.Dropout(0.4), nn.ReLU(), nn.Linear(6, 8)), nn.BatchNorm1d(8), (8,)),
        (CONVOLUTION, nn.BatchNorm2d(5), (3, 7, 7)),
    ],
    ids=["linear", "convolution"],
)
def test_k_behind_a_linear_layer_is_that_of_theory(front: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    data = [1 + torch.randn(512, *shape) for _ in range(12)]
    found = only(vd.diagnose(nn.Sequential(front, norm), data))
    assert found.theory is not None
    assert found.theory > 1.1
    gap, error = found.theory_gap or (math.nan, math.nan)
    assert abs(gap) < 4 * error < 0.1


class Added(nn.Module):
    """Stochastic depth: a branch that is dropped, added to what bypasses it."""

    def __init__(self) -> None:
        super().__init__()
        self.path = vd.layers.DropPath(0.4)
        self.branch = nn.Linear(16, 16)
        self.bn = nn.BatchNorm1d(16)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x + self.path(self.branch(x)))


def test_k_behind_a_sum_with_a_dropped_branch_is_that_of_theory() -> None:
    found = only(vd.diagnose(Added(), [torch.randn(512, 16) for _ in range(4)]))
    assert found.sources == ("path",)
    gap, error = found.theory_gap or (math.nan, math.nan)
    assert abs(gap) < 4 * error < 0.1
    assert found.ratio > 1.1


def test_conditional_variance_is_that_of_enumeration() -> None:
    layer = nn.Linear(4, 3).double()
    x = torch.randn(1, 4, dtype=torch.float64)
    bits = torch.cartesian_prod(*[torch.tensor([0.0, 2.0], dtype=torch.float64)] * 4)  # rate 1/2: α = 1
    expected = layer(x * bits).var(0, correction=0)
    assert torch.allclose(conditional_variance(layer, x)[0], expected)  # type: ignore[index]
    assert conditional_variance(nn.ReLU(), x) is None


def test_no_theory_where_it_does_not_hold() -> None:
    data = [torch.randn(64, 8)]
    twice = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 8), nn.Dropout(0.2), nn.BatchNorm1d(8))
    bent = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.2), nn.Tanh(), nn.BatchNorm1d(8))
    signs = nn.Sequential(vd.layers.GaussianDropout(0.2), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8))
    alpha = nn.Sequential(nn.AlphaDropout(0.2), nn.BatchNorm1d(8))
    for net in (twice, bent, signs, alpha):
        assert only(vd.diagnose(net, data)).theory is None


def test_the_rate_for_a_target_gives_it() -> None:
    p = rate_for(direct_ratio(0.5, 1.0, 2.0) - 1, 0.5, 0.05)
    assert direct_ratio(p, 1.0, 2.0) - 1 == pytest.approx(0.05)
    assert rate_for(0.01, 0.5, 0.05) == 0.5  # it is low enough


# ------------------------------------------------------------------------------------------------------ statistics


def test_variances_are_those_of_all_values() -> None:
    inputs, parts = Inputs(), []
    for size in (5, 3, 8):
        x = 1e3 + torch.randn(size, 3, 4, 4, dtype=torch.float64)
        inputs.add(x, 3 * x)
        parts.append(x)
    x = torch.cat(parts).transpose(0, 1).flatten(1)
    assert torch.allclose(inputs.variance(), x.var(1, correction=0))
    assert torch.allclose(inputs.mean(), x.mean(1))
    assert torch.allclose(inputs.variance(noise=True), 9 * x.var(1, correction=0))
    assert inputs.count == x.shape[1]


def test_standard_errors_cover_the_truth() -> None:
    """Images whose pixels hang together, so that pixels are not examples: 200 repetitions."""
    generator = torch.Generator().manual_seed(5)
    hits, errors, values = 0, [], []
    for _ in range(200):
        x = torch.randn(64, 2, 1, 1, generator=generator) + 0.1 * torch.randn(64, 2, 4, 4, generator=generator)
        mask = (torch.rand(64, 2, 1, 1, generator=generator) < 0.5) * 2.0
        inputs = Inputs()
        inputs.add(x, x * mask)
        value, error = (inputs.log_variance(noise=True) - inputs.log_variance()).mean()
        hits += abs(value - math.log(2)) < 2 * error
        errors.append(error)
        values.append(value)
    spread = torch.tensor(values).std()
    assert 0.8 < torch.tensor(errors).mean() / spread < 1.2
    assert hits > 180  # of 191, less three of its standard errors


# ----------------------------------------------------------------------------------------- nothing is left behind


def state(model: nn.Module) -> dict[str, Any]:
    """All that a diagnosis could leave behind."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())
    flags = [m.training for m in model.modules()]
    tensors = {name: x.clone() for name, x in (*model.named_parameters(), *model.named_buffers())}
    momenta = [getattr(m, "momentum", None) for m in model.modules()]
    generator = torch.get_rng_state()
    return {"hooks": hooks, "flags": flags, "tensors": tensors, "momenta": momenta, "generator": generator}


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    tensors = all(torch.equal(x, other["tensors"][name]) for name, x in one["tensors"].items())
    plain = all(one[key] == other[key] for key in ("hooks", "flags", "momenta"))
    return tensors and plain and torch.equal(one["generator"], other["generator"])


@pytest.mark.parametrize("training", [True, False])
def test_nothing_is_left_behind(training: bool) -> None:
    case = planted.before_last_of_block()
    case.model.train(training)
    case.model.bn.eval()
    loader = torch.utils.data.DataLoader(
        torch.utils.data.TensorDataset(*map(torch.cat, zip(*case.batches, strict=True))), batch_size=32, shuffle=True
    )
    before = state(case.model)
    vd.diagnose(case.model, loader, validation=loader)
    assert same(before, state(case.model))
    assert all(p.grad is None for p in case.model.parameters())


def test_nothing_is_left_behind_by_a_model_that_fails() -> None:
    class Fails(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.bn, self.drop, self.count = nn.BatchNorm1d(8), nn.Dropout(0.5), 0

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            if self.count > 3:
                raise KeyError("what it needs")
            return self.bn(self.drop(x))

    model, data = Fails().train(), planted.rows()
    before = state(model)
    with pytest.raises(KeyError):
        vd.diagnose(model, data, loss_fn=lambda net, batch: net(batch[0]).sum())
    assert same(before, state(model))


def test_two_diagnoses_agree_and_a_generator_makes_others() -> None:
    case = planted.directly_before()
    first, second = (only(vd.diagnose(case.model, case.batches)).ratio for _ in range(2))
    assert first == second
    generator = torch.Generator().manual_seed(1)
    assert only(vd.diagnose(case.model, case.batches, generator=generator)).ratio != first


# --------------------------------------------------------------------------------------------- what is not judged


def reasons(diagnosis: Diagnosis) -> dict[str, str]:
    return {entry.where: entry.reason for entry in diagnosis.unjudged}


def test_lazy_layers_are_listed_and_left_alone() -> None:
    net = nn.Sequential(nn.LazyLinear(8), nn.LazyBatchNorm1d())
    found = vd.diagnose(net, [torch.randn(4, 3)])
    assert reasons(found)["1"].startswith("it is lazy")
    assert net[1].has_uninitialized_params()


def test_what_cannot_be_judged_is_listed_with_the_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop = nn.Dropout(0.5)
            self.fresh = nn.BatchNorm1d(8)
            self.batch = nn.BatchNorm1d(8, track_running_stats=False)
            self.unused = nn.BatchNorm1d(8)
            self.dead = nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.fresh(self.drop(x)) + self.batch(x) + self.dead(0 * x)

    found = vd.diagnose(Odd(), [torch.randn(32, 8)])
    told = reasons(found)
    assert "seen no batch" in told["fresh"]
    assert "no running statistics" in told["batch"]
    assert "did not run" in told["unused"]
    assert "no channel" in told["dead"]
    assert "no labels" in told["loss of accuracy"]
    assert "validation" in told["underfitting"]
    assert "not judged: 6" in str(found)


def test_few_examples_are_not_judged_where_theory_says_nothing() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Tanh(), nn.BatchNorm1d(8))
    found = vd.diagnose(net, [torch.randn(8, 8)])
    assert not found.findings
    assert any("too few" in entry.reason for entry in found.unjudged)
    alone = vd.diagnose(net, [torch.randn(1, 8)])
    assert any("two or more" in entry.reason for entry in alone.unjudged)


def test_few_examples_are_judged_by_theory_where_it_speaks() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2))
    (finding,) = vd.diagnose(net, [torch.randn(8, 8)]).findings
    assert (finding.where, finding.rule) == ("1", "dropout-before-batchnorm")


def test_a_model_that_does_not_run_with_its_noise_on() -> None:
    class Refuses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.bn = nn.Dropout(0.5), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(x)
            if not torch.equal(x, y):
                raise RuntimeError("noise is not wanted")
            return self.bn(y)

    found = vd.diagnose(Refuses(), [torch.randn(32, 8)])
    assert "does not run with its noise on" in reasons(found)["bn"]
    assert not found.batchnorms


def test_inputs_that_are_not_finite() -> None:
    found = vd.diagnose(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2)), [torch.full((8, 2), math.inf)])
    assert "not finite" in reasons(found)["1"]


def test_noise_that_stays_off_is_listed() -> None:
    class TokenDrop(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.p = 0.5

        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2] if self.training else x

    found = vd.diagnose(nn.Sequential(TokenDrop()), [torch.randn(8, 4)])
    assert "stays off" in reasons(found)["0"]


# ------------------------------------------------------------------------------------------------- kinds of models


class Frozen(nn.Module):
    """Somebody's BatchNorm that is none of torch's."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_var", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.running_mean) / self.running_var.sqrt()


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4), (4, 6)),
        (nn.BatchNorm2d(4), (4, 5, 5)),
        (nn.BatchNorm3d(4), (4, 3, 3, 3)),
        (nn.SyncBatchNorm(4), (4, 5, 5)),
        (Frozen(4), (4,)),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else None,
)
def test_every_kind_of_batchnorm(norm: nn.Module, shape: tuple[int, ...]) -> None:
    found = only(vd.diagnose(nn.Sequential(nn.Dropout(0.5), norm), [torch.randn(256, *shape)]))
    assert found.name == "1"
    assert abs(found.ratio - 2) < 4 * found.error
    assert found.channels.shape == (4,)
    assert found.extremes[0] <= found.median <= found.extremes[1]


def test_a_batchnorm_that_is_used_twice() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.bn = nn.Dropout(0.5), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(x) + self.bn(self.drop(x))

    found = only(vd.diagnose(Twice(), [torch.randn(512, 8)]))
    assert found.theory is None
    assert found.ratio == pytest.approx(1.5, abs=0.1)  # half of its inputs are noisy


def test_functional_dropout_is_traced_to_the_batchnorm_behind_it() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.early, self.late = nn.BatchNorm1d(8), nn.BatchNorm1d(8)

        def forward(self, x: Tensor) -> Tensor:
            return self.late(F.dropout(self.early(x), 0.5, self.training))

    found = vd.diagnose(Functional(), [torch.randn(512, 8)])
    early, late = found.batchnorms
    assert early.sources == ()
    assert (early.ratio, early.error) == (1.0, 0.0)
    assert late.theory == pytest.approx(2, abs=0.01)
    assert [finding.where for finding in found.findings] == ["Functional"]


@pytest.mark.parametrize(
    "batches",
    [
        [torch.randn(64, 8)],
        torch.randn(64, 8),
        {"x": torch.randn(64, 8), "labels": torch.zeros(64, dtype=torch.int64)},
        (torch.randn(64, 8), torch.zeros(64, dtype=torch.int64)),
        (batch for batch in planted.rows(2, 32)),
    ],
    ids=["tensors", "tensor", "mapping", "pair", "iterator"],
)
def test_every_kind_of_batches(batches: Any) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.bn, self.head = nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.bn(self.drop(x)))

    found = vd.diagnose(Net(), batches)
    assert found.examples == 64
    assert [finding.rule for finding in found.findings] == ["variance-shift"]


def test_half_precision_is_measured_in_single() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(8)).bfloat16()
    found = only(vd.diagnose(net, [torch.randn(512, 8).bfloat16()]))
    assert abs(found.ratio - 2) < 4 * found.error


def test_a_scripted_model_is_not_judged_and_said_so() -> None:
    with warnings.catch_warnings(action="ignore"):  # torch says that TorchScript is old
        net = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8)))
    found = vd.diagnose(net, [torch.randn(64, 8)])
    assert "TorchScript" in reasons(found)["2"]
    assert not found.findings


def test_random_weights_shift_too_and_cannot_be_moved() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))
    vd.convert_(net, vd.VariationalDropout(type="B", sharing="weight", rate=0.3))
    (finding,) = vd.diagnose(net, [torch.randn(512, 8)]).findings
    assert (finding.where, finding.rule) == ("0", "variance-shift")
    assert "Re-estimate" in finding.todo
    assert "Move" not in finding.todo


def test_shapes_and_calls_that_hang_on_the_noise() -> None:
    class Shorter(nn.Module):
        def __init__(self, calls: int) -> None:
            super().__init__()
            self.drop, self.bn, self.calls = nn.Dropout(0.5), nn.BatchNorm1d(4), calls

        def forward(self, x: Tensor) -> Tensor:
            y = self.drop(x)
            if torch.equal(x, y):
                return self.bn(y)
            for _ in range(self.calls):
                z = self.bn(y[: 8 if self.calls == 1 else None])
            return z

    assert "other shapes" in reasons(vd.diagnose(Shorter(1), [torch.randn(32, 4)]))["bn"]
    assert "as often" in reasons(vd.diagnose(Shorter(2), [torch.randn(32, 4)]))["bn"]
    odd = vd.diagnose(nn.Sequential(nn.Dropout(0.5), Frozen(4)), [torch.randn(4)])
    assert "no batches of channels" in reasons(odd)["1"]


# ------------------------------------------------------------------------------------------------------ its price


def test_the_cost_of_statistics_that_do_not_fit() -> None:
    x = torch.randn(512, 4)
    net = nn.Sequential(nn.BatchNorm1d(4, affine=False), nn.Linear(4, 2))
    with torch.no_grad():
        net[1].weight.copy_(torch.tensor([[-1.0, 0, 0, 0], [1.0, 0, 0, 0]]))
        net[1].bias.zero_()
        net[0].running_mean.fill_(1.0)
        net[0].num_batches_tracked.fill_(10)
    found = vd.diagnose(net, [(x, (x[:, 0] > x[:, 0].mean()).long())])
    assert found.cost is not None
    assert found.cost.measure == "error rate"
    assert found.cost.estimated == 0.0
    share = float(((x[:, 0] > x[:, 0].mean()) != (x[:, 0] > 1)).double().mean())
    assert found.cost.moving == pytest.approx(share)
    assert 0 < found.cost.error < 0.05
    assert "difference" in str(found.cost)


def test_numbers_and_a_loss_of_ones_own() -> None:
    data = [(torch.randn(64, 4), torch.randn(64)) for _ in range(2)]
    net = planted.settled(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4), nn.Linear(4, 1)), data)
    squared = vd.diagnose(net, data).cost
    own = vd.diagnose(net, data, loss_fn=lambda model, batch: F.mse_loss(model(batch[0]).squeeze(1), batch[1])).cost
    assert squared is not None
    assert own is not None
    assert (squared.measure, own.measure) == ("squared error", "loss")
    assert squared.moving == pytest.approx(own.moving, rel=1e-5)


def test_labels_are_found_where_loaders_have_them() -> None:
    y = torch.zeros(2, dtype=torch.int64)
    assert labels_of((torch.ones(2), y)) is y
    assert labels_of({"x": torch.ones(2), "labels": y}) is y
    assert labels_of(torch.ones(2)) is None
    assert labels_of({"x": y}) is None


# -------------------------------------------------------------------------------------------------- shown and said


def test_it_prints_and_makes_tables_and_plots() -> None:
    case = planted.directly_before()
    found = vd.diagnose(case.model, case.batches)
    told = str(found)
    assert told.startswith("1 finding on 512 examples\n1: variance-shift (k² = ")
    assert "error rate" in told
    table = found.to_pandas()
    assert list(table["name"]) == ["2"]
    assert table["k"][0] == pytest.approx(math.sqrt(table["ratio"][0]))
    assert len(found.plot().axes[0].get_yticklabels()) == 1


def test_many_batchnorms_are_shortened() -> None:
    shift = only(vd.diagnose(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)), [torch.randn(64, 4)]))
    told = str(Diagnosis((), (shift,) * 20, (Unjudged("a", "why"),), None, 64))
    assert "and 8 more, nearer to 1" in told
    assert "a: why" in told
    assert Diagnosis((), (), (), None, 0).worst == 0
    assert str(Finding("a", "b", 1.0, "c", "D.", "E.")) == "a: b (c)\n    D. E."


def test_the_article_has_k_and_we_have_its_square_too() -> None:
    shift = only(vd.diagnose(nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(4)), [torch.randn(64, 4)]))
    assert shift.k**2 == pytest.approx(shift.ratio)
    assert shift.k_error == pytest.approx(shift.error / (2 * shift.k))


# ---------------------------------------------------------------------------------------------------------- errors


def test_what_is_no_model_and_no_batch() -> None:
    with pytest.raises(TypeError, match=r"vardrop.diagnose: model must be a torch.nn.Module, got list"):
        vd.diagnose([], torch.ones(2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vardrop.diagnose: loader must have a batch, got none"):
        vd.diagnose(nn.Linear(2, 2), [])
    with pytest.raises(ValueError, match=r"max_batches must be a whole number from 1 on, got 0"):
        vd.diagnose(nn.Linear(2, 2), torch.ones(2, 2), max_batches=0)
    with pytest.raises(RuntimeError, match=r"the model must take a batch of the loader, got RuntimeError: mat1"):
        vd.diagnose(nn.Linear(2, 2), torch.ones(2, 3))


def test_passes_and_hooks_and_traces_are_of_use_alone() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.Dropout(0.5), nn.ReLU())
    passes = Passes(net, [torch.ones(4, 2)], 1, None, "test")
    seen: list[Tensor] = []
    with passes.borrowed(), hooked({net[1]: lambda module, x: seen.append(x)}), tracing(net) as trace:
        passes.run(0)
    assert [tuple(x.shape) for x in seen] == [(4, 3)]
    assert [node.name for node in trace.nodes] == ["Linear", "Dropout", "ReLU"]
    assert trace.upstream(2) == {0, 1}


# ------------------------------------------------------------------------------------------------------- the manual


def test_the_examples_of_the_manual_run() -> None:
    manual = Path(__file__).parents[1] / "docs" / "diagnosis.md"
    result = doctest.testfile(str(manual), module_relative=False)
    assert result.attempted > 10
    assert result.failed == 0


def test_the_manual_names_every_rule() -> None:
    manual = (Path(__file__).parents[1] / "docs" / "diagnosis.md").read_text(encoding="utf-8")
    folder = Path(vd.__file__).parent / "diagnosis"
    source = "".join((folder / name).read_text(encoding="utf-8") for name in ("rules.py", "placement.py"))
    names = re.findall(r'^ {12,}"([a-z]+(?:-[a-z]+)+)",$', source, re.M)
    assert len(names) == 10
    assert all(f"`{name}`" in manual for name in names)


def _hidden_noise(x: Tensor, training: bool) -> Tensor:
    return F.dropout(F.relu(x), 0.5, training)


def test_noise_that_no_module_shows_is_measured_nonetheless() -> None:
    """Dropout in a function that the forward calls: no module's, and in no forward's text."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.norm, self.last = nn.Linear(8, 32), nn.BatchNorm1d(32), nn.Linear(32, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.norm(_hidden_noise(self.first(x), self.training)))

    torch.manual_seed(0)
    net, data = Net(), list(torch.randn(2048, 8).split(128))
    for _ in range(20):
        for x in data:
            net(x)
    report = vd.diagnose(net, data)
    assert [finding.rule for finding in report.findings] == ["variance-shift"]
    (shift,) = report.batchnorms
    assert shift.ratio > 2


def test_batches_are_as_they_were() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.BatchNorm1d(16))

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x.mul_(0.5))

    torch.manual_seed(0)
    data = [torch.randn(64, 8) for _ in range(4)]
    kept = [x.clone() for x in data]
    vd.diagnose(Careless(), data)
    assert all(torch.equal(a, b) for a, b in zip(data, kept, strict=True))
