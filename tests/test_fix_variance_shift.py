"""Cures of the variance shift: each on its planted fault, none that makes the model worse, and no change unasked."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import planted
import vardrop as vd
from vardrop.diagnosis.fixes.plan import offenders
from vardrop.diagnosis.fixes.uniform import UniformNoise
from vardrop.diagnosis.report import BatchNormShift


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def shift(model: nn.Module, batches: Any) -> BatchNormShift:
    (found,) = vd.diagnose(model, batches).batchnorms
    return found


CURES = ("lower_rate", "uniform", "move")
FAULTS = (planted.directly_before, planted.before_last_of_block)


@pytest.mark.parametrize("fault", FAULTS, ids=lambda build: build.__name__)
@pytest.mark.parametrize("strategy", CURES)
def test_training_shifts_no_more(strategy: Any, fault: planted.Build) -> None:
    case = fault()
    before = shift(case.model, case.batches)
    report = vd.fix_variance_shift_(case.model, case.batches, strategy, metric=lambda model, batch: torch.zeros(()))
    after = shift(case.model, case.batches)
    assert report.chosen == strategy, str(report)
    assert before.ratio > 1.5
    assert abs(after.ratio - 1) < 0.06 + 3 * after.error
    assert abs(math.log(after.running)) < 1e-4
    assert report.outcome.findings == ()
    assert report.attempts[0].shift == pytest.approx(abs(after.ratio - 1))


@pytest.mark.parametrize("fault", FAULTS, ids=lambda build: build.__name__)
def test_recalibration_makes_statistics_those_of_evaluation(fault: planted.Build) -> None:
    case = fault()
    before = shift(case.model, case.batches)
    report = vd.fix_variance_shift_(case.model, case.batches, "recalibrate", metric=lambda model, batch: torch.ones(()))
    after = shift(case.model, case.batches)
    assert report.chosen == "recalibrate"
    assert before.running > 1.5
    assert abs(math.log(after.running)) < 1e-4
    assert after.mean_gap < 1e-6
    assert after.ratio == pytest.approx(before.ratio, rel=0.05)  # training is as it was


def test_recalibration_is_exact_through_a_stack() -> None:
    """Batches of several sizes, and layers whose statistics hang on each other."""
    data = [torch.randn(size, 4) + 2 for size in (64, 16, 48)]
    net = nn.Sequential(nn.BatchNorm1d(4), nn.ReLU(), nn.Dropout(0.5), nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    planted.settled(net, [(x, 0) for x in data])
    assert vd.fix_variance_shift_(net, data, "recalibrate").chosen == "recalibrate"
    x = torch.cat(data)
    assert torch.allclose(net[0].running_var, x.var(0), rtol=1e-4)
    assert torch.allclose(net[0].running_mean, x.mean(0), rtol=1e-4)
    with torch.no_grad():
        hidden = net[3](net[1](net[0](x)))
    assert torch.allclose(net[4].running_var, hidden.var(0), rtol=0.01)
    assert torch.allclose(net[4].running_mean, hidden.mean(0), atol=0.01 * float(hidden.std()))


def test_stale_statistics_are_cured() -> None:
    case = planted.stale()
    report = vd.fix_variance_shift_(case.model, case.batches, metric=lambda model, batch: torch.zeros(()))
    assert report.chosen == "recalibrate"
    assert report.outcome.findings == ()


def teacher_labels(model: nn.Module, batches: Any) -> planted.Batches:
    """Labels that are the model's own answers with statistics that fit evaluation: then a shift costs accuracy."""
    twin = copy.deepcopy(model)
    vd.fix_variance_shift_(twin, [x for x, _ in batches], "recalibrate")
    with torch.no_grad():
        return [(x, twin.eval()(x).argmax(1)) for x, _ in batches]


def test_auto_reports_all_and_keeps_what_changes_least() -> None:
    case = planted.directly_before()
    batches = teacher_labels(case.model, case.batches)
    before = copy.deepcopy(case.model)
    report = vd.fix_variance_shift_(case.model, batches, validation=batches)
    assert [attempt.strategy for attempt in report.attempts] == [
        "recalibrate",
        "lower_rate",
        "uniform",
        "move",
        "layernorm",
    ]
    assert report.chosen == "recalibrate"
    assert report.measure == "error rate"
    assert report.before > 0.01
    assert report.attempts[0].after == 0
    assert [type(module) for module in case.model] == [type(module) for module in before]
    assert case.model[1].p == 0.5
    told = str(report)
    assert told.startswith("kept: recalibrate")
    assert all(name in told for name in ("lower_rate", "move", "as it was"))


def test_auto_leaves_a_healthy_model_alone() -> None:
    case = planted.healthy_mlp()
    before = copy.deepcopy(case.model.state_dict())
    report = vd.fix_variance_shift_(case.model, case.batches)
    assert report.chosen is None
    assert "nothing is wrong" in str(report)
    assert all(torch.equal(before[key], x) for key, x in case.model.state_dict().items())


@pytest.mark.parametrize("strategy", ["auto", "recalibrate", *CURES, "layernorm"])
def test_a_cure_that_makes_it_worse_is_not_kept(strategy: Any) -> None:
    case = planted.directly_before()
    batches = case.batches
    with torch.no_grad():  # labels that only the model as it is gets right
        batches = [(x, case.model(x).argmax(1)) for x, _ in batches]
    before, classes = copy.deepcopy(case.model.state_dict()), [type(module) for module in case.model.modules()]
    p = case.model[1].p
    report = vd.fix_variance_shift_(case.model, batches, strategy)
    assert report.before == 0
    assert report.chosen is None
    assert "as it was" in str(report).splitlines()[0]
    assert any("worse" in attempt.why for attempt in report.attempts)
    assert [type(module) for module in case.model.modules()] == classes
    assert case.model[1].p == p
    assert all(torch.equal(before[key], x) for key, x in case.model.state_dict().items())


def test_layernorm_answers_nearly_as_before() -> None:
    case = planted.directly_before()
    batches = teacher_labels(case.model, case.batches)
    report = vd.fix_variance_shift_(case.model, batches, "layernorm")
    assert report.chosen == "layernorm", str(report)
    assert isinstance(case.model[2], nn.GroupNorm)
    assert not report.outcome.batchnorms
    assert report.attempts[0].after is not None
    assert report.attempts[0].after < 0.15  # of ten classes of answers, nine stay; chance is a half
    assert "fine-tuning" in report.attempts[0].why


def test_layernorm_of_maps_has_groups_and_fits_by_least_squares() -> None:
    data = planted.maps()
    net = planted.settled(nn.Sequential(nn.Conv2d(3, 32, 3), nn.BatchNorm2d(32)), data)
    x = torch.cat([batch[0] for batch in data])
    with torch.no_grad():
        before = net(x)
    metric = lambda model, batch: torch.zeros(())  # noqa: E731
    assert vd.fix_variance_shift_(net, data, "layernorm", metric=metric).chosen == "layernorm"
    assert net[1].num_groups == 4
    with torch.no_grad():
        left = net(x) - before
    assert abs(float(left.mean())) < 1e-3
    assert float(left.square().mean()) < 0.2 * float(before.var())


def test_finetuning_is_given_to_every_cure() -> None:
    case = planted.directly_before()
    trained: list[nn.Module] = []
    report = vd.fix_variance_shift_(case.model, case.batches, finetune=trained.append)
    assert len(trained) == len(report.attempts) == 5
    assert all(made is not case.model for made in trained)


def test_what_finetuning_learned_is_kept() -> None:
    case = planted.directly_before()

    def finetune(model: nn.Module) -> None:
        with torch.no_grad():
            model[4].bias.copy_(torch.tensor([7.0, -7.0]))

    vd.fix_variance_shift_(case.model, case.batches, "move", finetune=finetune, metric=lambda m, b: torch.zeros(()))
    assert case.model[4].bias.tolist() == [7.0, -7.0]


# ---------------------------------------------------------------------------------------------------- the details


def moved() -> planted.Case:
    case = planted.directly_before()
    vd.fix_variance_shift_(case.model, case.batches, "move", metric=lambda model, batch: torch.zeros(()))
    return case


def test_moved_dropout_keeps_keys_and_pickles() -> None:
    keys = list(planted.directly_before().model.state_dict())
    case = moved()
    assert list(case.model.state_dict()) == keys
    assert isinstance(case.model[2], nn.BatchNorm1d)
    assert case.model[2].moved_dropout.p == 0.5
    assert case.model[1].p == 0
    again = pickle.loads(pickle.dumps(case.model))
    x = case.batches[0][0]
    assert torch.equal(again.eval()(x), case.model.eval()(x))
    case.model.train()
    assert not torch.equal(case.model(x), case.model(x))


def test_several_dropouts_move_to_one_place_as_the_strongest() -> None:
    data = planted.rows()
    layers = (nn.Linear(8, 32), nn.Dropout(0.3), nn.ReLU(), vd.layers.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU())
    net = planted.settled(nn.Sequential(*layers, nn.Linear(32, 2)), data)
    vd.fix_variance_shift_(net, data, "move", metric=lambda model, batch: torch.zeros(()))
    assert (net[1].p, net[3].p) == (0, 0)
    assert net[4].moved_dropout.p == 0.5


def test_what_cannot_be_changed_is_told() -> None:
    class Functional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.bn = nn.Linear(8, 16), nn.BatchNorm1d(16)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(F.dropout(self.linear(x), 0.5, self.training))

    class Norm(nn.BatchNorm1d):
        pass

    data = [torch.randn(256, 8)]
    outside = vd.fix_variance_shift_(Functional(), data, "move").attempts[0]
    assert "no rate that is known" in next(iter(outside.left.values()))
    other = vd.fix_variance_shift_(nn.Sequential(nn.Dropout(0.5), Norm(8)), data, "move").attempts[0]
    assert "is a Norm, which is left as it is" in other.left["0"]
    learned = nn.Sequential(vd.layers.GaussianDropout(vd.rates.learned(0.4), features=8), nn.BatchNorm1d(8))
    assert "learned" in vd.fix_variance_shift_(learned, data, "lower_rate").attempts[0].left["0"]
    scheduled = nn.Sequential(vd.layers.Dropout(vd.rates.linear(0.5, 0.6, steps=9)), nn.BatchNorm1d(8))
    assert "schedule" in vd.fix_variance_shift_(scheduled, data, "lower_rate").attempts[0].left["0"]
    odd = vd.fix_variance_shift_(nn.Sequential(nn.Dropout(0.5), Norm(8)), [(data[0], torch.randn(256, 8))], "layernorm")
    assert "Norm" in next(iter(odd.attempts[0].left.values()))
    assert odd.chosen is None


def test_a_shared_dropout_is_exchanged_everywhere() -> None:
    data, drop = planted.rows(), nn.Dropout(0.5)
    net = nn.Sequential(nn.Linear(8, 8), drop, nn.BatchNorm1d(8), drop, nn.BatchNorm1d(8), nn.Linear(8, 2))
    planted.settled(net, data)
    vd.fix_variance_shift_(net, data, "uniform", metric=lambda model, batch: torch.zeros(()))
    assert isinstance(net[1], UniformNoise)
    assert net[1] is net[3]


def test_uniform_noise_has_its_variance() -> None:
    layer = UniformNoise.of(0.6)
    x = torch.full((200_000,), 2.0)
    r = layer(x) / x - 1
    assert float(r.abs().max()) <= 0.6
    assert float(r.mean()) == pytest.approx(0, abs=4 * 0.35 / 200_000**0.5)
    assert float(r.var()) == pytest.approx(0.6**2 / 3, rel=0.02)
    assert layer.p / (1 - layer.p) == pytest.approx(0.12)
    assert layer.beta == pytest.approx(0.6)
    assert torch.equal(layer.eval()(x), x)


def test_offenders_are_those_that_shift() -> None:
    case = planted.before_last_of_block()
    (found,) = offenders(vd.diagnose(case.model, case.batches))
    assert (found.name, found.last, found.share) == ("drop", "bn", 1)
    assert found.excess > 0.5


def test_the_flags_and_the_identity_of_parameters_stay() -> None:
    case = planted.directly_before()
    case.model.train()
    case.model[4].eval()
    parameters = [id(p) for p in case.model.parameters()]
    vd.fix_variance_shift_(case.model, case.batches, "move", metric=lambda model, batch: torch.zeros(()))
    assert [id(p) for p in case.model.parameters()] == parameters
    assert case.model.training
    assert case.model[2].moved_dropout.training
    assert not case.model[4].training


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"strategy must be one of auto, recalibrate, .*, got 'pray'"):
        vd.fix_variance_shift_(nn.Linear(2, 2), torch.ones(2, 2), "pray")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"vardrop.UniformNoise: beta must lie in \[0, 1\], got 2"):
        UniformNoise.of(2)

    class Uncopied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.drop, self.bn = nn.Dropout(0.5), nn.BatchNorm1d(2)

        def forward(self, x: Tensor) -> Tensor:
            return self.bn(self.drop(x))

        def __deepcopy__(self, memo: Any) -> Any:
            raise TypeError("no copies")

    with pytest.raises(RuntimeError, match=r"the model must be one that copy.deepcopy can copy, got TypeError: no"):
        vd.fix_variance_shift_(Uncopied(), torch.randn(64, 2))
