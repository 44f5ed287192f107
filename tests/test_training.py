from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import vardrop as vd
from vardrop.data import Data, load, split_validation
from vardrop.methods import METHODS, prepare
from vardrop.training import Averages, Config, load_model, load_task, train
from vardrop.training.evaluation import evaluate, rate_histograms, rate_quantiles, telling_examples
from vardrop.training.finite import blame, check_data
from vardrop.training.task import Categorical, Gaussian, Task

SMALL = Config(model="mlp:1x16", epochs=2, average=0.9)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Networks this small lose by more, on a busy machine a hundredfold."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(config: Config, **values) -> Config:
    return Config(**vars(config) | values)


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# averaging


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.999])
def test_averages_are_those_of_the_paper_from_the_first_step(decay):
    parameter = nn.Parameter(torch.zeros(3, dtype=torch.float64))
    averages = Averages([parameter], decay)
    biased = torch.zeros(3, dtype=torch.float64)
    for step in range(1, 50):
        with torch.no_grad():
            parameter.copy_(torch.randn(3, dtype=torch.float64) + 5)
        averages.update()
        biased = decay * biased + (1 - decay) * parameter.detach()
        with averages.swapped_in():
            torch.testing.assert_close(parameter.detach(), biased / (1 - decay**step))
        if step == 1:
            assert torch.equal(averages.values[0], parameter)


def test_weights_come_back_after_an_error():
    parameter = nn.Parameter(torch.ones(2))
    averages = Averages([parameter], 0.5)
    with torch.no_grad():
        parameter.fill_(3.0)

    def fail() -> None:
        with averages.swapped_in():
            assert parameter.tolist() == [1.0, 1.0]
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert parameter.tolist() == [3.0, 3.0]


def test_averages_need_a_decay_below_one():
    with pytest.raises(ValueError, match="decay must be at least 0 and below 1, got 1"):
        Averages([], 1)


# config


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("epochs", 0, "epochs must be at least 1, got 0"),
        ("batch_size", -1, "batch_size must be at least 1, got -1"),
        ("devices", 0, "devices must be at least 1, got 0"),
        ("seed", -1, "seed must be 0 or more, got -1"),
        ("patience", -1, "patience must be 0 or more, got -1"),
        ("warmup", -2, "warmup must be 0 or more, got -2"),
        ("split", -1, "split must be 0 or more, got -1"),
        ("kl_scale", -0.1, "kl_scale must be 0 or more, and finite, got -0.1"),
        ("kl_scale", math.nan, "kl_scale must be 0 or more, and finite, got nan"),
        ("lr", 0.0, "lr must be positive and finite, got 0.0"),
        ("lr", math.nan, "lr must be positive and finite, got nan"),
        ("validation", 1.5, "validation must be a fraction below 1 or a number, got 1.5"),
        ("validation", math.inf, "validation must be a fraction below 1 or a number, got inf"),
        ("lr_decay", 1.5, "lr_decay must be at least 0 and at most 1, got 1.5"),
        ("average", 1.0, "average must be at least 0 and below 1, got 1.0"),
        ("estimator", "best", "estimator must be one of local, .* got 'best'"),
        ("accelerator", "abacus", "accelerator must be one of cpu, .* got 'abacus'"),
        ("strategy", "dp", "strategy must be one of auto, ddp, fsdp2, got 'dp'"),
        ("precision", "8", "precision must be one of 32-true, .* got '8'"),
    ],
)
def test_config_refuses(name, value, words):
    with pytest.raises(ValueError, match=f"vardrop.training.Config: {words}"):
        Config(**{name: value})


@pytest.mark.parametrize("method", ["none", "binary", "gaussian-a", "gaussian-b"])
def test_only_noise_that_is_learned_has_a_weight_for_its_divergence(method):
    words = (
        r"kl_scale must be left out but with the methods that learn noise "
        rf"\(vd-a, vd-a2, vd-b, sparse-vd, mean-field\), with {method}, got 0.5"
    )
    with pytest.raises(ValueError, match=words):
        Config(method=method, kl_scale=0.5)


@pytest.mark.parametrize(("asked", "weight"), [(None, 1 / 3), (0.1, 0.1), (0.0, 0.0)])
def test_the_weight_of_the_divergence_is_what_is_asked_for(tmp_path, asked, weight):
    config = Config(model="mlp:1x8", method="vd-a2", kl_scale=asked, epochs=2, warmup=1)
    train(config, tmp_path / "run", progress=False)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["kl_scale"] == pytest.approx(weight)
    assert lines[-1]["kl"] > 0


def test_config_goes_to_json_and_back(tmp_path):
    config = Config(validation=0.25, sharing="layer", lr=1e-4)
    path = tmp_path / "config.json"
    path.write_text(config.to_json())
    assert Config.read(path) == config
    path.write_text('{"epoch": 3}')
    with pytest.raises(ValueError, match="knows no option epoch; was it written by another version"):
        Config.read(path)
    path.write_text("{")
    with pytest.raises(ValueError, match=r"config.json is not valid JSON"):
        Config.read(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="must hold an object with the options"):
        Config.read(path)


def test_only_what_changes_no_step_may_differ():
    assert Config(epochs=3, devices=2, tensorboard=True).difference(Config()) == ""
    assert Config(lr=0.1).difference(Config(seed=1)) == "lr 0.1 there and 0.001 here, seed 0 there and 1 here"


# likelihoods and scores


def test_gaussian_likelihood_is_that_of_the_original_units():
    y = torch.tensor([10.0, 14.0, 30.0])
    likelihood = Gaussian(y)
    with torch.no_grad():
        likelihood.log_precision.fill_(0.7)
    outputs = torch.randn(3, 1)
    mean, std = y.mean(), y.std(correction=0)
    expected = torch.distributions.Normal(outputs[:, 0] * std + mean, std * math.exp(-0.35))
    torch.testing.assert_close(likelihood(outputs, y), -expected.log_prob(y))
    torch.testing.assert_close(likelihood.predict(outputs), expected.mean)
    error = likelihood.mistake(outputs, y).item()
    assert error == pytest.approx(float(np.sqrt(np.mean((expected.mean - y).numpy() ** 2))), rel=1e-6)


def test_constant_targets_have_a_likelihood():
    likelihood = Gaussian(torch.full((4,), 3.0))
    assert likelihood(torch.zeros(4, 1), torch.full((4,), 3.0)).tolist() == pytest.approx(
        [0.5 * math.log(2 * math.pi)] * 4
    )


def test_scores_of_known_outputs():
    outputs = torch.tensor([[0.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    task = Task(nn.Identity(), Categorical()).train()
    scores = evaluate(task, task, outputs, torch.tensor([1, 1, 1]))
    expected = -torch.log_softmax(outputs.double(), -1)[:, 1].mean()
    assert scores.nll == pytest.approx(expected.item())
    assert scores.mistake == pytest.approx(1 / 3)
    assert task.training


def test_rates_in_a_few_numbers_are_numpys():
    layer = nn.Linear(40, 30)
    vd.convert_(layer, vd.VariationalDropout(type="B", sharing="weight"))
    with torch.no_grad():
        layer.weight_log_alpha.normal_(-1, 2)
    rates = vd.dropout_rates(layer)["weight"].double().numpy().ravel()
    told = rate_quantiles(layer)["weight"]
    assert told["mean"] == pytest.approx(rates.mean())
    for name, q in {"q05": 5, "q25": 25, "q50": 50, "q75": 75, "q95": 95}.items():
        assert told[name] == pytest.approx(np.percentile(rates, q))
    histogram = rate_histograms(layer)["weight"]
    counts, edges = np.histogram(rates, bins=100, range=(0, 1))
    assert histogram["counts"] == counts.tolist()
    assert sum(histogram["counts"]) == 1200
    assert histogram["edges"] == pytest.approx(edges.tolist())
    assert (histogram["min"], histogram["max"]) == pytest.approx((rates.min(), rates.max()))


def test_telling_examples_are_the_worst_and_the_least_certain():
    logits = torch.tensor([[9.0, 0.0], [5.0, 0.0], [0.1, 0.0], [0.0, 9.0], [0.0, 3.0]])
    labels = torch.tensor([1, 1, 0, 1, 1])
    found = telling_examples(Task(nn.Identity(), Categorical()), logits, labels, images=False, each=2)
    assert found["kind"].tolist() == [0, 0, 1, 1]
    assert found["features"][:2].tolist() == logits[:2].tolist()  # wrong, the more confident first
    assert found["score"][:2].tolist() == pytest.approx([9.0, 5.0], abs=0.01)
    assert found["features"][2:].tolist() == [logits[2].tolist(), logits[4].tolist()]
    assert found["score"][2].item() == pytest.approx(math.log(2), abs=0.01)
    assert found["predicted"].tolist() == [0, 0, 0, 1]
    assert found["label"].tolist() == [1, 1, 0, 1]


def test_telling_examples_are_drawn_with_noise_that_disturbs_nobody():
    torch.manual_seed(1)
    network, _, _ = prepare("binary", "mlp:1x8", (4,), 3)
    task = Task(network, Categorical())
    x, y = torch.rand(50, 4), torch.randint(3, (50,))
    before = torch.get_rng_state()
    one, two = (telling_examples(task, x, y, images=False, seed=seed) for seed in (0, 0))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(one[name], two[name]) for name in one)
    other = telling_examples(task, x, y, images=False, seed=1)
    assert not torch.equal(one["score"], other["score"])
    assert not any(module.training for module in network.modules())


def test_the_uncertain_ones_are_looked_for_among_some_of_a_large_test_set(monkeypatch):
    from vardrop.training import evaluation

    monkeypatch.setattr(evaluation, "_LOOKED_AT", 20)
    network, _, _ = prepare("vd-a", "mlp:1x8", (1, 8, 8), 10)
    x, y = torch.rand(300, 1, 8, 8), torch.randint(10, (300,))
    found = telling_examples(Task(network, Categorical()), x, y, images=False, each=16, seed=1)
    uncertain = found["features"][found["kind"] == 1]
    rows = [int((x == row).flatten(1).all(1).nonzero()) for row in uncertain]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        drawn = torch.randperm(300)[:20].tolist()
    assert len(set(rows)) == 16
    assert set(rows) <= set(drawn)


def test_telling_examples_of_numbers():
    y = torch.tensor([0.0, 1.0, 2.0, 10.0])
    x = torch.tensor([[0.0], [0.1], [0.2], [0.0]])
    layer = nn.Linear(1, 1)
    with torch.no_grad():
        layer.weight.fill_(1.0)
        layer.bias.zero_()
    plain = telling_examples(Task(layer, Gaussian(y)), x, y, images=False, each=1)
    assert plain["kind"].tolist() == [0]  # without noise nothing says how certain it is
    assert plain["label"].tolist() == [10.0]
    vd.convert_(layer, vd.VariationalDropout(rate=0.4))
    noisy = telling_examples(Task(layer, Gaussian(y)), x, y, images=False, each=1)
    assert noisy["kind"].tolist() == [0, 1]
    assert noisy["features"][1].item() == x[2].item()  # the noise is relative to the input


# runs


def test_a_network_learns_its_rates_on_real_digits(tmp_path):
    config = Config(model="mlp:1x64", method="vd-a2", epochs=25, average=0.95, lr=3e-3, tensorboard=True)
    summary = train(config, tmp_path, progress=False)
    assert summary["test_error"] < 0.10
    history = lines(tmp_path)
    assert history[-1]["train_nll"] < 0.5 < history[0]["train_nll"]
    first, last = (
        history[i]["rates"]["5.weight" if "5.weight" in history[i]["rates"] else "2.weight"] for i in (0, -1)
    )
    assert abs(first["mean"] - last["mean"]) > 0.005
    assert first["q95"] - first["q05"] < last["q95"] - last["q05"]

    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    scalars = events.Scalars("val_error")
    assert [scalar.step for scalar in scalars] == [line["epoch"] for line in history]
    assert [scalar.value for scalar in scalars] == pytest.approx([line["val_error"] for line in history])
    assert "rate/2.weight/mean" in events.Tags()["scalars"]


@pytest.mark.parametrize("method", METHODS)
def test_every_method_leaves_the_files_that_others_read(method, tmp_path):
    config = changed(SMALL, method=method, warmup=0)
    summary = train(config, tmp_path, progress=False)
    assert json.loads((tmp_path / "summary.json").read_text()) == summary
    assert Config.read(tmp_path / "config.json") == config
    assert set(summary) == {
        "test_error", "test_nll", "kl", "rates", "seconds", "epochs_run", "best_epoch", "parameters", "config",
        "versions", "device", "data", "test_examples", "notes",
    }  # fmt: skip
    learns = method not in ("none", "binary")
    random_layers = {"gaussian-a", "gaussian-b"} & {method}
    assert (summary["kl"] != 0) == learns
    assert bool(summary["rates"]) == learns
    assert [line["epoch"] for line in lines(tmp_path)] == [1, 2]
    for line in lines(tmp_path):
        assert set(line) == {"epoch", "seconds", "train_nll", "kl", "kl_scale", "val_nll", "val_error", "rates"}
        assert line["kl_scale"] == pytest.approx({"vd-a2": 1 / 3, "none": 0, "binary": 0}.get(method, 1.0))
        assert set(line["rates"]) == set(summary["rates"])
        if random_layers:
            assert line["rates"]["2.weight"]["mean"] == pytest.approx(0.2)
    tensors = load_file(tmp_path / "model.safetensors")
    assert {name for name in tensors if name.endswith(".weight")} >= set(summary["rates"])
    examples = load_file(tmp_path / "examples.safetensors")
    rows = len(examples["label"])
    assert examples["image"].shape == (rows, 1, 8, 8)
    assert examples["image"].dtype == examples["kind"].dtype == torch.uint8
    assert {len(examples[name]) for name in ("image", "predicted", "score", "kind")} == {rows}
    assert (examples["kind"] == 1).sum() == 16

    test = load("digits")
    network = load_model(tmp_path)
    with torch.no_grad():
        wrong = (network(test.test_x).argmax(-1) != test.test_y).double().mean().item()
    assert wrong == summary["test_error"]


def test_the_best_averaged_weights_are_what_is_saved_and_tested(tmp_path):
    config = changed(SMALL, epochs=60, patience=3, lr=0.03, validation=100)
    summary = train(config, tmp_path, progress=False)
    history = lines(tmp_path)
    best = min(history, key=lambda line: (line["val_error"], line["val_nll"]))
    assert summary["best_epoch"] == best["epoch"]
    assert summary["epochs_run"] == len(history) == best["epoch"] + 3 < 60
    _, val_x, val_y = split_validation(load("digits"), 100, config.seed)
    task = load_task(tmp_path)
    scores = evaluate(task, task, val_x, val_y)
    assert (scores.mistake, scores.nll) == pytest.approx((best["val_error"], best["val_nll"]), rel=1e-12)


def test_without_validation_the_last_average_is_the_model(tmp_path):
    summary = train(changed(SMALL, validation=0.0, average=0.0, patience=1), tmp_path, progress=False)
    assert summary["best_epoch"] == 2
    assert [line["val_error"] for line in lines(tmp_path)] == [None, None]
    checkpoint, model = (load_file(tmp_path / f"{name}.safetensors") for name in ("checkpoint", "model"))
    assert all(torch.equal(checkpoint[f"model.network.{name}"], tensor) for name, tensor in model.items())


def test_the_learning_rate_falls_over_the_last_part():
    config = Config(epochs=10, lr_decay=0.4)
    assert [config.lr_factor(epoch) for epoch in (0, 6, 8, 10)] == pytest.approx([1, 1, 0.5, 0])
    assert Config(epochs=10).lr_factor(10) == 1
    assert config.difference(Config(epochs=11, lr_decay=0.4)) == "epochs 10 there and 11 here"


def test_a_learning_rate_that_has_fallen_moves_nothing(tmp_path):
    """Adam goes about a learning rate a step: with one that falls from the start the way is about half as long."""
    ways = []
    for decay in (0.0, 1.0):
        torch.manual_seed(0)
        start = prepare(SMALL.method, SMALL.model, load("digits").shape, 10)[0][-1].bias.detach()
        train(changed(SMALL, epochs=1, average=0.0, lr_decay=decay), tmp_path / str(decay), progress=False)
        ways.append((load_model(tmp_path / str(decay))[-1].bias - start).abs().mean().item())
    assert 0.2 < ways[1] / ways[0] < 0.8


def test_a_run_starts_from_another(tmp_path):
    """With a learning rate of next to nothing the new network is the old one."""
    first, second = tmp_path / "first", tmp_path / "second"
    old = train(changed(SMALL, method="none", epochs=3), first, progress=False)
    tiny = changed(SMALL, method="sparse-vd", warmup=0, epochs=1, lr=1e-12, average=0.0, start=str(first))
    new = train(tiny, second, progress=False)
    assert new["test_error"] == old["test_error"]
    plain, sparse = load_model(first), load_model(second)
    vd.restore_(sparse)
    for a, b in zip(plain.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    with pytest.raises(
        ValueError, match=r"start must be a run of the same network, got one with weights of \[\(16, 64"
    ):
        train(changed(tiny, model="mlp:1x8"), tmp_path / "third", progress=False)


def test_the_divergence_warms_up(tmp_path):
    train(changed(SMALL, method="vd-a", epochs=5, warmup=3, batch_size=100), tmp_path, progress=False)
    steps = 13  # 1,294 rows stay for training
    expected = [min(1.0, (epoch * steps - 1) / (3 * steps)) for epoch in range(1, 6)]
    assert [line["kl_scale"] for line in lines(tmp_path)] == pytest.approx(expected)


def test_no_epoch_of_the_warm_up_is_best_or_ends_training(tmp_path):
    summary = train(changed(SMALL, epochs=8, warmup=5, patience=1), tmp_path, progress=False)
    assert summary["best_epoch"] > 5
    assert summary["epochs_run"] > 5


def test_sparse_networks_warm_up_unless_told_otherwise(tmp_path):
    sparse = changed(SMALL, method="sparse-vd")
    assert sparse.warmup_epochs == METHODS["sparse-vd"].warmup == 30
    assert changed(sparse, warmup=0).warmup_epochs == 0
    assert SMALL.warmup_epochs == 0
    train(changed(sparse, epochs=3), tmp_path, progress=False)
    steps = math.ceil(1293 / SMALL.batch_size) * 30
    scales = [line["kl_scale"] for line in lines(tmp_path)]
    assert scales[0] < scales[1] < scales[2] < 3 * steps / 30 / steps + 1e-9


def test_the_seed_decides_everything_and_the_callers_generator_is_left_alone(tmp_path):
    torch.manual_seed(99)
    before = torch.get_rng_state()
    runs = {
        name: train(changed(SMALL, seed=seed), tmp_path / name, progress=False)
        for name, seed in zip("abc", (1, 1, 2), strict=True)
    }
    assert torch.equal(torch.get_rng_state(), before)
    models = {name: load_file(tmp_path / name / "model.safetensors") for name in runs}
    assert all(torch.equal(models["a"][name], models["b"][name]) for name in models["a"])
    assert not torch.equal(models["a"]["2.weight"], models["c"]["2.weight"])


@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_precision(precision, tmp_path):
    summary = train(changed(SMALL, precision=precision), tmp_path, progress=False)
    weight = load_file(tmp_path / "model.safetensors")["2.weight"]
    assert weight.dtype == (torch.float64 if precision == "64-true" else torch.float32)
    assert load_model(tmp_path)[2].bias.dtype == weight.dtype
    assert 0 < summary["test_nll"] < 3


@pytest.mark.parametrize("name", ["per_example", "per_minibatch", "flipout", "none"])
def test_every_estimator_trains_and_noise_is_its_own(name, tmp_path):
    local, other = (
        train(changed(SMALL, estimator=choice, epochs=1), tmp_path / choice, progress=False)
        for choice in ("local", name)
    )
    assert local["test_nll"] != other["test_nll"]


def noisy_line(path: Path, scale: float = 1.0) -> Path:
    rng = np.random.default_rng(0)
    x = rng.uniform(-1, 1, (600, 2))
    y = scale * (100 + 5 * x[:, 0] - 3 * x[:, 1] + rng.normal(0, 0.5, 600))
    rows = "\n".join(f"{a},{b},{c}" for (a, b), c in zip(x, y, strict=True))
    path.write_text(f"a,b,y\n{rows}\n")
    return path


def test_regression_finds_the_noise_in_the_units_of_the_data(tmp_path):
    config = Config(
        data=str(noisy_line(tmp_path / "line.csv")), model="mlp:1x32", method="none", epochs=150, lr=0.01, average=0.95
    )
    summary = train(config, tmp_path / "run", progress=False)
    rows = 120
    assert summary["test_rmse"] == pytest.approx(0.5, abs=0.5 * (5 / math.sqrt(2 * rows) + 0.1))
    truth = 0.5 * math.log(2 * math.pi * math.e * 0.25)
    assert summary["test_nll"] == pytest.approx(truth, abs=5 * math.sqrt(0.5 / rows) + 0.1)
    assert lines(tmp_path / "run")[-1]["val_rmse"] < 1
    assert "features" in load_file(tmp_path / "run" / "examples.safetensors")

    thousand = changed(config, data=str(noisy_line(tmp_path / "thousand.csv", 1000.0)), epochs=5)
    scaled = train(thousand, tmp_path / "thousand", progress=False)
    plain = train(changed(config, epochs=5), tmp_path / "five", progress=False)
    assert scaled["test_rmse"] == pytest.approx(1000 * plain["test_rmse"], rel=1e-3)
    assert scaled["test_nll"] == pytest.approx(math.log(1000) + plain["test_nll"], rel=1e-3)


# what goes wrong


def test_data_with_nan_are_refused_before_training(monkeypatch):
    x = torch.rand(10, 3)
    good = Data(
        "mine",
        "classification",
        x,
        torch.zeros(10, dtype=torch.int64),
        x,
        torch.zeros(10, dtype=torch.int64),
        ("a", "b"),
    )
    check_data(good)
    bad = x.clone()
    bad[7, 1], bad[8, 0] = math.nan, math.inf
    with pytest.raises(ValueError, match="got NaN or Inf in 2 of 10 rows of mine's test_x, first in row 7"):
        check_data(Data(**vars(good) | {"test_x": bad}))


def test_a_run_that_diverges_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    train(changed(SMALL, epochs=1), tmp_path, progress=False)
    checkpoint = (tmp_path / "checkpoint.safetensors").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.Adam.step

        def burst(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            with torch.no_grad():
                self.param_groups[0]["params"][1].add_(math.inf)
            return result

        patch.setattr(torch.optim.Adam, "step", burst)
        words = (
            r"the parameter '.*' is not finite in step 2 of epoch 2; the checkpoint of epoch 1 is kept in .*; a lower "
            r"lr often helps \(it is 0.001\)"
        )
        with pytest.raises(FloatingPointError, match=words):
            train(SMALL, tmp_path, resume=True, progress=False)
    assert (tmp_path / "checkpoint.safetensors").read_bytes() == checkpoint
    assert len(lines(tmp_path)) == 1
    assert train(SMALL, tmp_path, resume=True, progress=False)["epochs_run"] == 2


def test_a_weight_that_breaks_in_the_last_step_is_found_too(tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        step = torch.optim.Adam.step

        def burst(self, *args, **kwargs):
            result = step(self, *args, **kwargs)
            with torch.no_grad():
                self.param_groups[0]["params"][1].add_(math.nan)
            return result

        patch.setattr(torch.optim.Adam, "step", burst)
        with pytest.raises(
            FloatingPointError, match="is not finite in the last step of epoch 1; the checkpoint of epoch 0"
        ):
            train(changed(SMALL, batch_size=2000), tmp_path, progress=False)
    assert not (tmp_path / "model.safetensors").exists()
    assert (tmp_path / "checkpoint.safetensors").exists()


def a_task() -> tuple[Task, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    network, _, _ = prepare("vd-a", "mlp:2x8", (4,), 3)
    return Task(network, Categorical()).train(), torch.rand(6, 4), torch.randint(3, (6,))


def test_blame_names_what_comes_first():
    task, x, y = a_task()
    assert blame(task, x, y).startswith("the loss of another process")
    assert blame(task, torch.full_like(x, math.nan), y) == "the data (x of the batch)"

    first, second = [(name, m) for name, m in task.network.named_modules() if hasattr(m, "vardrop_noise")][:2]
    with torch.no_grad():
        second[1].bias.fill_(3e38)
        second[1]._parameters["weight"].fill_(3e38)
    assert blame(task, x, y) == f"the output of layer '{second[0]}' (VariationalLinear)"
    with torch.no_grad():
        first[1].bias[0] = math.nan
        second[1].bias[0] = math.nan
    assert blame(task, x, y) == f"the parameter '{first[0]}.bias' (and 1 more)"


def test_blame_finds_divergences_and_losses():
    layer = nn.Linear(4, 3)
    vd.convert_(layer, vd.GaussianPosterior())
    with torch.no_grad():
        layer._parameters["weight"].fill_(1e20)  # its square is not finite
    x, y = torch.full((6, 4), 1e-20), torch.randint(3, (6,))
    assert blame(Task(layer, Categorical()).train(), x, y) == "the divergence of 'weight', by its rates,"
    outputs = torch.full((2, 1), 1e30)
    assert (
        blame(Task(nn.Flatten(), Gaussian(torch.tensor([0.0, 1.0]))), outputs, torch.tensor([0.0, 1.0])) == "the loss"
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_a_device_that_is_not_here_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"accelerator='cuda', devices=1, .* must go together and exist here, got"):
        train(changed(SMALL, accelerator="cuda"), tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_fewer_rows_than_processes_are_refused(monkeypatch, tmp_path):
    from vardrop.training import loop

    class Two:
        world_size, device = 2, torch.device("cpu")

    network, _, _ = prepare("none", "mlp:1x4", (1, 8, 8), 10)
    with pytest.raises(ValueError, match="must be at least the number of processes, 2, got 1 and"):
        loop._Run(changed(SMALL, batch_size=1), tmp_path, load("digits"), network, Two())


def test_damaged_summaries_are_refused(tmp_path):
    train(changed(SMALL, epochs=1), tmp_path, progress=False)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(ValueError, match=r"summary.json is not valid JSON .*; remove it"):
        train(SMALL, tmp_path, resume=True, progress=False)


def test_unknown_attributes_of_the_package_are_errors():
    import vardrop.training

    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        vardrop.training.nothing  # noqa: B018


def test_a_finished_network_without_its_checkpoint_is_not_begun_anew(tmp_path):
    out = tmp_path / "run"
    train(SMALL, out, progress=False)
    (out / "checkpoint.safetensors").unlink()  # as in what `vardrop prune` writes
    model = (out / "model.safetensors").read_bytes()
    with pytest.raises(
        FileExistsError, match=r"holds a finished network without the checkpoint .* go on elsewhere with"
    ):
        train(changed(SMALL, epochs=SMALL.epochs + 1), out, resume=True, progress=False)
    assert (out / "model.safetensors").read_bytes() == model
    assert train(SMALL, out, resume=True, progress=False)["epochs_run"] == SMALL.epochs  # nothing to do
