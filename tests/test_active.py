"""The active-learning loop: who is asked, that it can be killed, and that it is worth it where it must be."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from vardrop.uncertainty import active_learning

POOL = 60


def fit(labelled: Tensor) -> dict[str, Any]:
    return {"labelled": labelled.tolist(), "noise": torch.rand(3).tolist()}


def predict(model: dict[str, Any], candidates: Tensor) -> Tensor:
    """The higher its index, the more the passes disagree about a case; a little noise."""
    sure = 1 - 0.5 * candidates / POOL + 1e-3 * torch.rand(len(candidates))
    first = torch.stack([sure, 1 - sure], -1)
    return torch.stack([first, 1 - first]).clamp(0, 1)


def score(model: dict[str, Any]) -> float:
    return sum(model["noise"]) + len(model["labelled"])


def loop(**changed: Any) -> Any:
    settings = {"pool": POOL, "initial": [3, 58], "count": 4, "rounds": 5, "method": "entropy", "seed": 1}
    return active_learning(fit, predict, score, **{**settings, **changed})


def test_the_most_uncertain_are_asked_for_and_nothing_twice() -> None:
    def flat(model: Any, candidates: Tensor) -> Tensor:
        sure = 1 - 0.5 * candidates.double() / POOL
        return torch.stack([sure, 1 - sure], -1)[None]

    made = active_learning(fit, flat, score, pool=POOL, initial=[3, 58], count=4, rounds=3, method="entropy")
    rounds = list(made)
    assert [r.chosen for r in rounds] == [(59, 57, 56, 55), (54, 53, 52, 51), (50, 49, 48, 47), ()]
    assert [r.labels for r in rounds] == [2, 6, 10, 14]
    assert [r.number for r in rounds] == [0, 1, 2, 3]
    assert rounds == made.history
    assert made.labelled.tolist()[:6] == [3, 58, 59, 57, 56, 55]


@pytest.mark.parametrize("method", ["bald", "batch_bald", "random", "variation_ratio"])
def test_the_seed_decides_and_torch_s_generator_is_left_alone(method: str) -> None:
    state = torch.get_rng_state()
    one = list(loop(method=method, subset=20))
    assert torch.equal(state, torch.get_rng_state())
    torch.rand(5)
    assert one == list(loop(method=method, subset=20))
    assert one != list(loop(method=method, subset=20, seed=2))
    chosen = [i for made in one for i in made.chosen]
    assert len({3, 58, *chosen}) == 22


def test_killed_it_goes_on_as_if_nothing_had_happened() -> None:
    whole = list(loop(method="bald", subset=15))
    first = loop(method="bald", subset=15)
    for made in first:
        if made.number == 2:
            break
    state = json.loads(json.dumps(first.state_dict()))
    second = loop(method="bald", subset=15)
    second.load_state_dict(state)
    assert list(second) == whole[3:]
    assert second.history == whole


def test_an_exception_in_a_round_loses_only_that_round() -> None:
    whole = list(loop())
    calls = []

    def breaks(model: Any, candidates: Tensor) -> Tensor:
        calls.append(0)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(model, candidates)

    made = active_learning(fit, breaks, score, pool=POOL, initial=[3, 58], count=4, rounds=5, method="entropy", seed=1)
    with pytest.raises(KeyboardInterrupt):
        list(made)
    assert made.history == whole[:2]
    assert list(made) == whole[2:]


def test_more_rounds_can_be_asked_for_later() -> None:
    whole, short, longer = loop(), loop(rounds=2), loop()
    list(whole)
    list(short)
    longer.load_state_dict(short.state_dict())
    list(longer)
    assert longer.history == whole.history


def test_the_subset_is_all_that_is_looked_at() -> None:
    seen = []

    def watched(model: Any, candidates: Tensor) -> Tensor:
        seen.append(candidates.tolist())
        return predict(model, candidates)

    made = active_learning(fit, watched, score, pool=POOL, initial=[0], count=2, rounds=4, subset=10)
    rounds = list(made)
    assert [len(some) for some in seen] == [10] * 4
    assert len({tuple(some) for some in seen}) == 4
    for some, done in zip(seen, rounds, strict=False):
        assert set(done.chosen) <= set(some)
        assert not set(some) & {0, *(i for r in rounds[: done.number] for i in r.chosen)}


def test_bald_finds_a_boundary_that_chance_does_not() -> None:
    x = torch.arange(1000) / 999  # the class is x > 0.37; the passes are thresholds that the labels allow

    def bounds(labelled: Tensor) -> tuple[float, float]:
        known = x[labelled]
        return known[known <= 0.37].max().item(), known[known > 0.37].min().item()

    def passes(model: tuple[float, float], candidates: Tensor) -> Tensor:
        above = (torch.linspace(*model, 64)[:, None] < x[candidates]).float()
        return torch.stack([above, 1 - above], -1)

    def width(method: str, seed: int) -> float:
        made = active_learning(
            bounds,
            passes,
            lambda m: m[1] - m[0],
            pool=1000,
            initial=[0, 999],
            count=1,
            rounds=8,
            method=method,
            seed=seed,
        )
        return list(made)[-1].score

    assert width("bald", 0) < 1 / 2**7  # halved every time, but for the grid of the passes
    # 8 labels at random: the gap about the boundary is below 1/128 with a probability of about 8 * 2 / 128
    assert sum(width("random", seed) > 1 / 2**7 for seed in range(10)) >= 6


def test_the_bar(capsys: pytest.CaptureFixture[str]) -> None:
    list(loop(rounds=1, progress=True))
    told = capsys.readouterr().err
    assert "round 1/2 · 2 labels · score" in told
    assert told.endswith("\n")
    list(loop(rounds=1))  # not on a terminal
    assert capsys.readouterr().err == ""


def test_bad_input() -> None:
    for wrong in ([], [1, 1], [POOL]):
        with pytest.raises(ValueError, match=r"initial must be different indices of the pool, 0 to 59, at least one"):
            loop(initial=wrong)
    with pytest.raises(ValueError, match=r"vardrop.active_learning: method must be one of bald, .*, got 'BALD'"):
        loop(method="BALD")
    for wrong in ({"rounds": 15}, {"count": 0}, {"rounds": -1}):
        with pytest.raises(ValueError, match=r"rounds of .* labels must fit into the pool of 60, 2 of which are"):
            loop(**wrong)
    with pytest.raises(ValueError, match="a subset of 3 is too small to choose 4 cases from"):
        loop(subset=3)
    state = loop().state_dict()
    with pytest.raises(ValueError, match="the state must be that of the same settings, got others for method, seed"):
        loop(method="bald", seed=3).load_state_dict(state)
    short = active_learning(fit, lambda m, c: predict(m, c)[:, 1:], score, pool=9, initial=[0], count=1, rounds=1)
    with pytest.raises(ValueError, match="predict must say something about every one of 8 candidates, got 7"):
        list(short)
