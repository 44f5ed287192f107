"""The experiments on sparsity: what they do to a network, on networks and images of a moment."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import vardrop as vd
from vardrop.models import build
from vardrop.reproduce.experiments import EXPERIMENTS, _sparse, _sparse_training, sparse_cifar
from vardrop.reproduce.results import Result
from vardrop.weights.modules import noisy_weights

RECIPE = _sparse_training.Recipe(dense=1, epochs=4, warmup=1, decay=0.5, shrink=2, finetune=1, batch=32)


def digits(n: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(10, (n,), generator=generator)
    return torch.eye(10)[y].repeat(1, 2) + 0.1 * torch.randn(n, 20, generator=generator), y


@pytest.fixture(scope="module")
def noisy() -> nn.Module:
    """A network with units whose weights are all noise."""
    torch.manual_seed(0)
    net = build("mlp:12,8", (20,), 10)
    vd.convert_(net, _sparse_training.POSTERIOR)
    with torch.no_grad():
        for weight in noisy_weights(net):
            weight.noise.uniform_(-8, -4)
        first, second, *_ = noisy_weights(net)
        first.noise[3:7] = 5.0  # four dead rows
        first.noise[:, 11] = 5.0
        second.noise[:, 0] = 5.0  # nothing reads unit 0
    return net


def test_shrinking_keeps_means_rates_and_the_function_without_the_noise(noisy: nn.Module) -> None:
    x = torch.randn(5, 20)
    small = _sparse_training.shrink(noisy, x[:2])
    shapes = [tuple(weight.mean.shape) for weight in noisy_weights(small)]
    assert shapes == [(7, 20), (8, 7), (10, 8)]
    pruned = copy.deepcopy(noisy)
    vd.sparsify_(pruned, threshold=_sparse_training.THRESHOLD)
    smaller = copy.deepcopy(small)
    vd.sparsify_(smaller, threshold=_sparse_training.THRESHOLD)
    torch.testing.assert_close(smaller.eval()(x), pruned.eval()(x))
    live = [1, 2, 7, 8, 9, 10, 11]
    (first, second, _), (mine, next_, _) = noisy_weights(noisy), noisy_weights(small)
    torch.testing.assert_close(mine.mean, first.mean[live])
    torch.testing.assert_close(mine.noise, first.noise[live])
    torch.testing.assert_close(next_.noise, second.noise[:, live])


def test_training_makes_a_network_sparse_that_still_knows_its_classes() -> None:
    torch.manual_seed(0)
    x, y = digits()
    net = build("mlp:32", (20,), 10)
    _sparse_training.fit(net, x, y, 40, 1e-2, seed=0)
    assert _sparse_training.error(net, x, y) < 5
    recipe = RECIPE._replace(epochs=150, warmup=30, shrink=50, lr=1e-2)
    net = _sparse_training.train(net, x, y, recipe, seed=0)
    report = vd.sparsify_(net, threshold=_sparse_training.THRESHOLD)
    assert report.sparsity > 0.3
    assert _sparse_training.error(net, x, y) < 10


def test_as_many_weights_stay_as_are_asked_for(noisy: nn.Module) -> None:
    total = sum(weight.mean.numel() for weight in noisy_weights(noisy))
    before = [weight.mean.clone() for weight in noisy_weights(noisy)]
    left = sum(_sparse.weights_left(_sparse.remove(noisy, 4.0, total)))
    assert left == pytest.approx(total / 4, abs=1)
    assert all(torch.equal(a, b.mean) for a, b in zip(before, noisy_weights(noisy), strict=True))


def test_fine_tuning_leaves_zeros_and_noise(noisy: nn.Module) -> None:
    x, y = digits(64)
    net = _sparse.remove(noisy, 4.0, sum(weight.mean.numel() for weight in noisy_weights(noisy)))
    zeros = [weight.mean == 0 for weight in noisy_weights(net)]
    noise = [weight.noise.clone() for weight in noisy_weights(net)]
    means = [weight.mean.clone() for weight in noisy_weights(net)]
    with vd.finetune(net):
        _sparse_training.fit(net, x, y, 2, 1e-2, seed=0)
    for weight, gone, was, mean in zip(noisy_weights(net), zeros, noise, means, strict=True):
        assert torch.equal(weight.mean == 0, gone)
        assert torch.equal(weight.noise, was)
        assert not torch.equal(weight.mean, mean)


def test_a_student_learns_what_the_teacher_says_on_average_and_not_the_labels(noisy: nn.Module) -> None:
    x, y = digits(64)
    soft = _sparse_training.said(noisy, x, temperature=3.0, seed=0)
    torch.testing.assert_close(soft.probabilities.sum(1), torch.ones(64))
    warm = _sparse_training.said(noisy, x, temperature=30.0, seed=0)
    assert warm.probabilities.amax(1).mean() < soft.probabilities.amax(1).mean()  # nearer to even
    with vd.stochastic(noisy), torch.no_grad():
        passes = torch.stack([(noisy(x) / 3).softmax(1) for _ in range(200)])
    spread = passes.std(0) * (1 / 200 + 1 / _sparse_training.TEACHER_PASSES) ** 0.5
    assert ((soft.probabilities - passes.mean(0)) / spread).square().mean() < 1.5  # z-scores of 640 entries
    x, y = digits()
    teacher = (y + 1) % 10
    net = build("mlp:32", (20,), 10)
    certain = _sparse_training.Soft(torch.eye(10)[teacher], 3.0)
    _sparse_training.fit(net, x, y, 40, 1e-2, seed=0, soft=certain)
    assert _sparse_training.error(net, x, teacher) < 5
    assert _sparse_training.error(net, x, y) > 95


def test_images_are_shifted_each_by_itself_and_zeros_come_in() -> None:
    x = torch.zeros(900, 2, 5, 6)
    x[:, 0, 2, 3], x[:, 1, 4, 5] = 1.0, 2.0
    moved = _sparse_training.shifted(x, 1, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    places = moved[:, 0].flatten(1).argmax(1)
    counts = torch.bincount(places, minlength=30).view(5, 6)
    assert counts.sum() == counts[1:4, 2:5].sum() == 900
    assert (counts[1:4, 2:5] - 100).abs().max() < 5 * (900 * 8 / 81) ** 0.5  # nine places, alike
    down, right = places // 6 - 2, places % 6 - 3
    inside = (down <= 0) & (right <= 0)
    torch.testing.assert_close(moved[:, 1].sum((1, 2)), torch.where(inside, 2.0, 0.0))
    rows = inside.nonzero()[:, 0]
    assert (moved[rows, 1, 4 + down[rows], 5 + right[rows]] == 2).all()  # all channels by the same


def test_fitting_on_shifted_images_makes_a_network_care_less_where_they_are() -> None:
    generator = torch.Generator().manual_seed(0)
    y = torch.randint(2, (256,), generator=generator)
    x = torch.zeros(256, 1, 6, 6)
    x[torch.arange(256), 0, 2 + y, 2 + y] = 1.0  # a point, at one of two places
    x += 0.05 * torch.randn(x.shape, generator=generator)
    wrong = []
    for shift in (0, 1):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 2))
        _sparse_training.fit(net, x, y, 60, 1e-2, seed=0, shift=shift)
        other = torch.roll(x, (1, -1), (2, 3))  # where no point of the other class comes
        wrong.append(_sparse_training.error(net, other, y))
    assert wrong[1] < 5 < 20 < wrong[0]


@pytest.mark.parametrize("shift", [0, 2])
def test_training_with_noise_sees_moved_images_where_it_is_asked_to(shift: int) -> None:
    x = torch.zeros(64, 1, 7, 7)
    x[:, 0, 3, 3] = torch.arange(1.0, 65.0)  # every image has its own point, in the middle
    seen = []
    net = nn.Sequential(nn.Flatten(), nn.Linear(49, 2))
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    recipe = RECIPE._replace(epochs=3, shrink=9, shift=shift)
    _sparse_training.train(net, x, torch.arange(64) % 2, recipe, seed=0)
    images = torch.cat(seen).view(3, 64, 49)
    assert all(torch.equal(epoch.amax(1).sort().values, torch.arange(1.0, 65.0)) for epoch in images)
    places = {(int(place) // 7 - 3, int(place) % 7 - 3) for place in images.view(-1, 49).argmax(1)}
    far = range(-shift, shift + 1)
    assert places == {(down, right) for down in far for right in far}


def test_log_variances_have_a_learning_rate_of_their_own() -> None:
    x, y = digits(64)

    def steps(noise_lr: float | None) -> tuple[float, float]:
        torch.manual_seed(0)
        net = build("mlp:8", (20,), 10)
        means = [layer.weight.detach().clone() for layer in net if isinstance(layer, nn.Linear)]
        recipe = RECIPE._replace(epochs=1, shrink=9, batch=64, noise_lr=noise_lr)  # one step, in which Adam goes by lr
        weights = list(noisy_weights(_sparse_training.train(net, x, y, recipe, seed=0)))
        mean = max((w.mean - m).abs().max().item() for w, m in zip(weights, means, strict=True))
        return mean, max((w.noise + 8).abs().max().item() for w in weights)

    assert steps(None) == pytest.approx((1e-3, 1e-3), rel=1e-2)
    assert steps(4e-3) == pytest.approx((1e-3, 4e-3), rel=1e-2)


def test_a_configuration_from_before_moved_images_keeps_its_key_and_its_recipe() -> None:
    assert "shift" not in RECIPE.entries()
    moved = RECIPE._replace(shift=2, noise_lr=4e-3, finetune_lr=2e-3)
    assert moved.entries() == {**RECIPE.entries(), "shift": 2, "noise_lr": 4e-3, "finetune_lr": 2e-3}
    for recipe in (RECIPE, moved):
        assert _sparse_training.Recipe.of({**recipe.entries(), "model": "lenet-5"}) == recipe


def test_means_are_of_one_kind_of_images_and_above_the_dense_network_of_the_same() -> None:
    def result(seed: int, **shift: int) -> Result:
        images = {"images": _sparse.images(shift["shift"])} if shift else {}  # results from before had no such column
        here = 10.0 * shift.get("shift", 0)
        rows = [
            {**images, "stage": stage, "target": None, "seed": seed, "error": here + seed + more, "ratio": 1.0}
            for stage, more in (("dense", 0.0), ("fine-tuned", 0.5))
        ]
        return Result("x", "cpu", {"seed": seed, **shift}, seed, {}, None, "here", 1, 1.0, rows)

    means = _sparse.summarise([result(0), result(2), result(0, shift=2), result(1, shift=2)])
    found = {(row["images"], row["stage"]): (row["seeds"], row["error"], row["above_dense"]) for row in means}
    assert found == {
        ("as they are", "dense"): (2, 1.0, 0.0),
        ("as they are", "fine-tuned"): (2, 1.5, 0.5),
        ("moved by up to 2 px", "dense"): (2, 20.5, 0.0),
        ("moved by up to 2 px", "fine-tuned"): (2, 21.0, 0.5),
    }


def test_a_file_that_gives_back_something_else_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    net = nn.Linear(4, 2)
    assert _sparse.file_size(net) > 0
    monkeypatch.setattr(vd, "load_compressed", lambda path, model: None)
    with pytest.raises(RuntimeError, match="a compressed file must hold the network, got another one back"):
        _sparse.file_size(net)


def test_magnitude_pruning_removes_the_smallest() -> None:
    net = nn.Sequential(nn.Linear(10, 10), nn.ReLU(), nn.Linear(10, 5))
    before = torch.cat([w.detach().abs().flatten() for w in sparse_cifar.weights(net)])
    sparse_cifar.prune_by_magnitude_(net, 0.8)
    after = torch.cat([w.detach().abs().flatten() for w in sparse_cifar.weights(net)])
    assert sparse_cifar.sparsity(net) == pytest.approx(0.8)
    assert after[after > 0].min() > before[after == 0].max()


@pytest.mark.parametrize(("name", "which"), [("sparse-lenet-300-100", 0), ("sparse-lenet-5", 0), ("sparse-lenet-5", 1)])
def test_stages_of_a_cell(name: str, which: int) -> None:
    experiment = EXPERIMENTS[name]
    config = experiment.cells("smoke")[which]
    rows = [row for row in experiment.run_cell(config) if row["stage"] != "epoch"]
    trained = ["fine-tuned", "distilled"] if "temperature" in config else ["fine-tuned"]
    stages = ["dense", "log alpha > 3", *[*trained, "in the file"] * len(config["ratios"])]
    assert [row["stage"] for row in rows] == stages
    dense, threshold, tuned = rows[:3]
    file = rows[2 + len(trained)]
    assert dense["ratio"] == 1
    assert threshold["ratio"] > 1
    assert tuned["weights"] == pytest.approx(dense["weights"] / config["ratios"][0], abs=1)
    assert file["bytes"] < dense["bytes"]
    assert file["smaller"] == dense["bytes"] / file["bytes"]
    assert file["parameters"] <= dense["parameters"]
    work = {"sparse-lenet-300-100": 64 * 300 + 300 * 100 + 100 * 10, "sparse-lenet-5": None}[name]
    assert work is None or dense["multiply_adds"] == work  # of one example
    assert 0 < file["multiply_adds"] <= dense["multiply_adds"]


def test_both_sides_of_the_comparison_have_the_same_zeros() -> None:
    (config,) = sparse_cifar.EXPERIMENT.cells("smoke")
    rows = sparse_cifar.run_cell(config)
    for target in config["sparsities"]:
        pair = [row for row in rows if row["target"] == target]
        assert [row["method"] for row in pair] == [sparse_cifar.MAGNITUDE, sparse_cifar.SPARSE]
        assert all(row["sparsity"] == pytest.approx(target, abs=0.01) for row in pair)
