"""Rates: schedules against their formulas, the scheduler's habits, and what a module does with its rate."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch import nn

from vardrop import layers, rates
from vardrop.rates import Rated, RateScheduler


class Learner(Rated):
    learnable = True


class Bounded(Rated):
    one = False


def halving(step: int) -> float:
    return 0.5 ** (step + 1)


SCHEDULES = {
    "linear": (rates.linear(0.1, 0.5, steps=4, delay=2), lambda t: 0.1 + 0.4 * min(1, max(0, t - 2) / 4)),
    "cosine": (rates.cosine(0.4, 0.0, steps=8), lambda t: 0.2 + 0.2 * math.cos(math.pi * min(1, t / 8))),
    "steps": (rates.steps([0.1, 0.2, 0.3], at=[2, 5]), lambda t: 0.1 + 0.1 * (t >= 2) + 0.1 * (t >= 5)),
    "early": (rates.early(0.3, until=3), lambda t: 0.3 * (t < 3)),
    "late": (rates.late(0.3, after=3), lambda t: 0.3 * (t >= 3)),
    "own": (halving, lambda t: 2.0 ** -(t + 1)),
}
every_schedule = pytest.mark.parametrize(("schedule", "truth"), SCHEDULES.values(), ids=list(SCHEDULES))


@every_schedule
def test_a_schedule_is_its_formula(schedule: rates.Schedule, truth: rates.Schedule) -> None:
    assert [schedule(t) for t in range(12)] == pytest.approx([truth(t) for t in range(12)], abs=1e-12)
    copied = pickle.loads(pickle.dumps(schedule))
    assert [copied(t) for t in range(12)] == [schedule(t) for t in range(12)]


@every_schedule
def test_the_scheduler_sets_the_value_of_every_step(schedule: rates.Schedule, truth: rates.Schedule) -> None:
    model = nn.Sequential(Rated(schedule), nn.ReLU(), Rated(0.25))
    buffer = model[0].rate
    scheduler = RateScheduler(model)
    for step in range(10):
        assert scheduler.last_epoch == step
        assert model[0].p == pytest.approx(truth(step), abs=1e-7)
        scheduler.step()
    assert model[0].rate is buffer  # in place: a compiled model goes on reading this tensor
    assert model[2].p == 0.25


def test_the_scheduler_resumes() -> None:
    model = nn.ModuleDict({"a": Rated(rates.linear(0.0, 0.5, steps=10))})
    scheduler = RateScheduler(model)
    for _ in range(4):
        scheduler.step()
    fresh = nn.ModuleDict({"a": Rated(rates.linear(0.0, 0.5, steps=10))})
    fresh.load_state_dict(model.state_dict())
    assert fresh["a"].p == pytest.approx(0.2)
    resumed = RateScheduler(fresh)
    resumed.load_state_dict(pickle.loads(pickle.dumps(scheduler.state_dict())))
    assert resumed.get_last_rate() == scheduler.get_last_rate() == {"a": pytest.approx(0.2)}
    scheduler.step()
    resumed.step()
    assert resumed.get_last_rate() == scheduler.get_last_rate() == {"a": pytest.approx(0.25)}
    assert RateScheduler(fresh, last_epoch=6).get_last_rate() == {"a": pytest.approx(0.35)}


def test_one_schedule_for_chosen_layers() -> None:
    model = nn.ModuleDict({"encoder": nn.Sequential(Rated(0.1), Learner(rates.learned(0.3))), "head": Rated(0.1)})
    scheduler = RateScheduler(model, rates.late(0.4, after=1), where="encoder.*")
    assert scheduler.get_last_rate() == {"encoder.0": 0.0}  # a learned rate has no schedule
    scheduler.step()
    assert (model["encoder"][0].p, model["head"].p) == pytest.approx((0.4, 0.1))


def test_a_bad_value_changes_no_rate() -> None:
    model = nn.Sequential(Rated(rates.linear(0.0, 1.0, steps=2)), Rated(lambda t: 0.1 + t))
    scheduler = RateScheduler(model)
    with pytest.raises(ValueError, match=r"vardrop.Rated: p must be a dropout rate in \[0, 1\], got 1.1"):
        scheduler.step()
    assert scheduler.get_last_rate() == {"0": 0.0, "1": pytest.approx(0.1)}
    assert scheduler.last_epoch == 0


@pytest.mark.parametrize("p", [-0.1, 1.1, math.nan, True, "0.1", None, torch.tensor([0.1])])
def test_what_is_no_rate(p: object) -> None:
    with pytest.raises(ValueError, match=r"vardrop\.Rated: p must be a dropout rate in \[0, 1\], got "):
        Rated(p)
    with pytest.raises(ValueError, match="must be a dropout rate"):
        Rated(0.5).p = p


def test_rates_at_the_ends() -> None:
    assert (Rated(0).p, Rated(1).p) == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"vardrop.Bounded: p must be a dropout rate in \[0, 1\), got 1"):
        Bounded(1)
    with pytest.raises(ValueError, match=r"in \[0, 1\), got 1.0"):
        rates.learned(1.0)
    with pytest.raises(ValueError, match="initial must be above 0, where a logit is finite, got 0"):
        rates.learned(0.0)


def test_what_is_no_schedule() -> None:
    with pytest.raises(
        ValueError, match=r"rates.linear: a ramp must take 1 step or more after .* got steps=0, delay=0"
    ):
        rates.linear(0.0, 0.1, steps=0)
    with pytest.raises(ValueError, match=r"rates.cosine: p must be a dropout rate in \[0, 1\], got 2"):
        rates.cosine(0.0, 2, steps=3)
    with pytest.raises(ValueError, match=r"at must grow and have one entry fewer than values, got at=\[3, 2\] with 3"):
        rates.steps([0.1, 0.2, 0.3], at=[3, 2])


def test_nothing_to_schedule() -> None:
    with pytest.raises(ValueError, match=r"some layer must have a scheduled rate, got 1: p=0.1; give layers p=rates"):
        RateScheduler(nn.Sequential(nn.ReLU(), Rated(0.1)))
    with pytest.raises(ValueError, match="got a model without vardrop layers"):
        RateScheduler(nn.ReLU())
    with pytest.raises(ValueError, match=r"got none that matches 'body.\*'"):
        RateScheduler(nn.Sequential(Rated(0.1)), rates.late(0.1, 3), where="body.*")


@pytest.mark.parametrize("state", [{}, {"last_epoch": -1}, {"last_epoch": 1.5}, {"last_epoch": True}])
def test_a_state_that_is_none(state: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="state must have 'last_epoch', a whole number of 0 or more, got "):
        RateScheduler(Rated(rates.early(0.1, 3))).load_state_dict(state)


def test_a_learned_rate_is_a_parameter() -> None:
    module = Learner(rates.learned(0.2))
    assert list(dict(module.named_parameters())) == ["rate_logit"]
    assert module.p == pytest.approx(0.2)
    module.rate.backward()
    assert module.rate_logit.grad.item() == pytest.approx(0.2 * 0.8)
    parameter = module.rate_logit
    module.p = 0.4
    assert module.p == pytest.approx(0.4)
    assert module.rate_logit is parameter
    with pytest.raises(
        TypeError, match=r"vardrop.Rated: p must be a number or a schedule, got learned\(0.2\); no grad"
    ):
        Rated(rates.learned(0.2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casts_keep_the_digits(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(2, 2), Rated(0.1)).to(dtype)
    assert model[0].weight.dtype == dtype
    assert model[1].rate.dtype == torch.float32
    assert model[1].rate == torch.tensor(0.1)
    assert model.to("meta")[1].rate.device.type == "meta"


def test_checkpoints() -> None:
    model = nn.Sequential(nn.Linear(2, 2), Rated(0.1))
    other = nn.Sequential(nn.Linear(2, 2), Rated(0.3))
    other.load_state_dict(model.state_dict())
    assert other[1].p == pytest.approx(0.1)
    plain = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    other.load_state_dict(plain.state_dict())  # strict, and without a rate
    assert other[1].p == pytest.approx(0.1)
    learner = nn.Sequential(nn.Linear(2, 2), Learner(rates.learned(0.3)))
    with pytest.raises(RuntimeError, match="Missing key"):  # a rate of the wrong kind is no rate
        learner.load_state_dict(model.state_dict())


def test_copies_are_independent() -> None:
    module = Rated(rates.linear(0.1, 0.2, steps=2))
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert other.schedule == module.schedule
        other.p = 0.7
        assert module.p == pytest.approx(0.1)


def test_what_is_shown() -> None:
    assert repr(Rated(0.1)) == "Rated(p=0.1)"
    assert repr(Learner(rates.learned(0.1))) == "Learner(p=0.1, learned)"
    shown = {
        "linear(0, 0.1, steps=3, delay=1)": rates.linear(0, 0.1, 3, delay=1),
        "cosine(0, 0.1, steps=3)": rates.cosine(0, 0.1, 3),
        "steps([0.2, 0.0], at=[5])": rates.early(0.2, 5),
        "halving": halving,
    }
    for text, schedule in shown.items():
        assert repr(Rated(schedule)) == f"Rated(p={schedule(0):g}, schedule={text})"


def test_the_number_outlives_the_meta_device() -> None:
    """Deferred initialisation: tensors hold nothing there, and a plain checkpoint has no rates."""
    plain = nn.Sequential(nn.Linear(3, 3), nn.Dropout(0.5)).state_dict()
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(3, 3), layers.Dropout(0.3))
        gaussian = layers.GaussianDropout(rates.learned(0.2), features=3)
    assert (net[1].p, gaussian.p) == (0.3, 0.2)
    assert "p=0.3" in repr(net)
    net[1].p = 0.4
    other = copy.deepcopy(net)
    net.to_empty(device="cpu").load_state_dict(plain)
    other.load_state_dict(plain, assign=True)
    assert net[1].p == other[1].p == pytest.approx(0.4)
    assert gaussian.to_empty(device="cpu").p == pytest.approx(0.2)
    net[1].rate_value.fill_(0.25)  # as a checkpoint does
    assert net.to("meta")[1].p == 0.25
    net.to_empty(device="cpu")
    assert net[1].p == 0.25
    with torch.device("meta"):
        block = layers.StochasticDepth(nn.Linear(3, 3), 0.3)
    block.load_state_dict({"block.weight": torch.ones(3, 3)}, strict=False, assign=True)
    assert block.p == pytest.approx(0.3)
    assert block.block.bias.is_meta  # what the checkpoint has not is as it was, and no stray memory
    gaussian.p = 0.4
    assert gaussian.to("meta").to_empty(device="cpu").p == pytest.approx(0.4)


def test_a_schedule_must_be_a_function() -> None:
    for wrong in (0.3, rates.learned(0.3)):
        with pytest.raises(TypeError, match=r"schedule must be a function of the step, got .*; write rates.linear"):
            RateScheduler(Rated(0.1), wrong)  # type: ignore[arg-type]
