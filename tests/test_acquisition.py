"""Acquisition: scores by their definitions, BatchBALD against the sum over all joint outcomes."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor, nn

import vardrop as vd
from vardrop.uncertainty import acquisition, batch_bald, joint_information


def drawn(passes: int, cases: int, classes: int, scale: float = 2.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.softmax(scale * torch.randn(passes, cases, classes, generator=generator, dtype=torch.float64), -1)


def information(samples: Tensor, chosen: tuple[int, ...]) -> float:
    """I(y_chosen; w), by the definition: over all joint outcomes."""
    joint = 0.0
    for outcome in itertools.product(range(samples.shape[2]), repeat=len(chosen)):
        each = torch.stack([samples[:, i, c] for i, c in zip(chosen, outcome, strict=True)], -1).prod(-1)
        joint += torch.special.entr(each.mean()).item()
    single = sum(torch.special.entr(samples[:, i]).sum(-1).mean().item() for i in chosen)
    return joint - single


def test_scores_are_their_definitions() -> None:
    p = drawn(7, 5, 3)
    for n in range(5):
        mean = [sum(p[t, n, c].item() for t in range(7)) / 7 for c in range(3)]
        entropy = -sum(q * math.log(q) for q in mean)
        inside = -sum(p[t, n, c].item() * math.log(p[t, n, c].item()) for t in range(7) for c in range(3)) / 7
        spread = sum((sum((p[t, n, c].item() - mean[c]) ** 2 for t in range(7)) / 7) ** 0.5 for c in range(3)) / 3
        votes = [sum(p[t, n].argmax().item() == c for t in range(7)) for c in range(3)]
        found = {name: score(p)[n].item() for name, score in acquisition.SCORES.items()}
        assert found == pytest.approx({
            "bald": entropy - inside, "entropy": entropy, "least_confident": 1 - max(mean), "mean_std": spread,
            "variation_ratio": 1 - max(votes) / 7,
        })  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("passes", "classes"), [(3, 2), (10, 3)])
def test_batch_bald_is_greedy_over_all_joint_outcomes(passes: int, classes: int, seed: int) -> None:
    p = drawn(passes, 7, classes, seed=seed)
    chosen: tuple[int, ...] = ()
    gains = []
    for _ in range(4):
        values = {i: information(p, (*chosen, i)) for i in range(7) if i not in chosen}
        best = max(values, key=values.__getitem__)
        gains.append(values[best] - sum(gains))
        chosen = (*chosen, best)
    found = batch_bald(p, 4)
    assert tuple(found.indices.tolist()) == chosen
    assert found.gains.tolist() == pytest.approx(gains, abs=1e-12)
    exhaustive = max(information(p, some) for some in itertools.combinations(range(7), 4))
    assert found.gains.sum().item() >= (1 - 1 / math.e) * exhaustive


def test_small_parts_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    p = drawn(8, 30, 3)
    whole = batch_bald(p, 5)
    monkeypatch.setattr(joint_information, "_ENTRIES", 50)
    parts = batch_bald(p, 5)
    assert torch.equal(whole.indices, parts.indices)
    torch.testing.assert_close(whole.gains, parts.gains)


def test_drawn_configurations_agree_with_all_of_them() -> None:
    p = drawn(20, 12, 3)
    exact = batch_bald(p, 5, configurations=3**5)
    generator = torch.Generator().manual_seed(0)
    order = exact.indices
    totals = []
    for _ in range(40):  # the gain of the exact batch's own order, estimated from draws
        labels = joint_information._Labels(20, 60, p.device, generator)
        gains = []
        for i in order.tolist():
            gains.append((labels.entropy_of(p[:, [i]]) - torch.special.entr(p[:, i]).sum(-1).mean()).item())
            labels.add(p[:, i])
        totals.append(gains)
    found = torch.tensor(totals, dtype=torch.float64)
    error = found.std(0) / 40**0.5
    assert ((found.mean(0) - exact.gains).abs() <= 4 * error + 1e-12).all()
    many = batch_bald(p, 5, configurations=50, generator=torch.Generator().manual_seed(1))
    assert information(p, tuple(many.indices.tolist())) >= 0.95 * exact.gains.sum().item()


def test_equal_cases_are_not_asked_twice() -> None:
    p = drawn(30, 40, 4, seed=3)
    same = p[:, :1].expand(-1, 20, -1)  # 20 copies of one case among 40 others
    p = torch.cat([same, p[:, 1:]], 1)
    p[:, :20] = torch.eye(4, dtype=p.dtype)[torch.arange(30) % 4][:, None]  # every pass is sure, all disagree
    assert vd.acquire(p, 5, "bald").tolist() == [0, 1, 2, 3, 4]
    assert sum(i < 20 for i in vd.acquire(p, 5, "batch_bald").tolist()) == 1


def test_long_batches_do_not_underflow() -> None:
    p = drawn(5, 350, 10, scale=0.3)
    found = batch_bald(p, 350, configurations=50, generator=torch.Generator().manual_seed(0))
    assert sorted(found.indices.tolist()) == list(range(350))
    assert found.gains.isfinite().all()
    # there are but 5 passes to be told apart; the estimate of every gain has an error of its own
    assert found.gains.sum().item() == pytest.approx(math.log(5), rel=0.1)


def test_impossible_outcomes_are_no_trouble() -> None:
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.5, 0.5]], [[0.0, 1.0], [0.0, 1.0], [0.5, 0.5]]])
    for configurations in (1, 2, 100):
        found = batch_bald(p, 3, configurations, torch.Generator().manual_seed(0))
        assert found.indices[0] == 0
        assert found.gains.tolist() == pytest.approx([math.log(2), 0, 0], abs=1e-7)


@pytest.mark.parametrize("method", acquisition.METHODS)
def test_the_same_generator_chooses_the_same(method: str) -> None:
    p = drawn(6, 50, 3)
    one, other = (
        vd.acquire(p, 8, method, generator=torch.Generator().manual_seed(5), configurations=10) for _ in range(2)
    )
    assert one.tolist() == other.tolist()
    assert len(set(one.tolist())) == 8
    if method in acquisition.SCORES:
        scores = acquisition.SCORES[method](p)
        assert scores[one].tolist() == sorted(scores.tolist(), reverse=True)[:8]


def test_ties_are_broken_at_random_by_a_generator_and_by_place_without() -> None:
    p = torch.full((2, 1000, 2), 0.5)
    assert vd.acquire(p, 3).tolist() == [0, 1, 2]
    generator = torch.Generator().manual_seed(0)
    chosen = torch.cat([vd.acquire(p, 10, generator=generator) for _ in range(100)]).double()
    assert chosen.mean().item() == pytest.approx(499.5, abs=4 * 1000 / 12**0.5 / 1000**0.5)


@pytest.mark.parametrize("method", acquisition.METHODS)
def test_a_prediction_is_as_good_as_its_samples(method: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 30), nn.ReLU(), nn.Dropout(0.5), nn.Linear(30, 3)).double()
    x = torch.randn(25, 4, dtype=torch.float64)
    made = vd.mc_predict(net, x, samples=20, outputs="logits")
    one, other = (
        vd.acquire(some, 6, method, generator=torch.Generator().manual_seed(1)) for some in (made, made.samples)
    )
    assert one.tolist() == other.tolist()


def test_bad_input() -> None:
    p = drawn(3, 4, 2)
    with pytest.raises(ValueError, match=r"method must be one of bald, .*, random, got 'BALD'"):
        vd.acquire(p, 1, "BALD")
    for method in ("bald", "batch_bald"):
        for count in (0, 5, 2.5, True):
            with pytest.raises(ValueError, match="count must be a whole number from 1 to the 4 cases there are, got"):
                vd.acquire(p, count, method)
        with pytest.raises(ValueError, match=r"probabilities of every pass are needed, \[T, N, C\], got \(4, 2\)"):
            vd.acquire(p[0], 1, method)
    with pytest.raises(ValueError, match="samples must be at least 0 and sum to 1 over the last axis"):
        vd.acquire(p.log(), 1)
    with pytest.raises(ValueError, match="configurations must be at least 1, got 0"):
        batch_bald(p, 2, configurations=0)
    net, x = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), torch.randn(5, 4)
    with pytest.raises(ValueError, match=r"every pass is needed, got a prediction that kept only their moments"):
        vd.acquire(vd.mc_predict(net, x, samples=4, outputs="logits", keep=False), 2, "batch_bald")
    with pytest.raises(ValueError, match=r"probabilities of classes are needed, got a prediction of kind None"):
        vd.acquire(vd.mc_predict(net, x, samples=4), 2, "batch_bald")
