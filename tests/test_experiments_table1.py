"""Table 1: the variances, what a weight sample per data point adds, and the readings of the paper's sentence."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.reproduce.experiments import _gradient_variance as measure
from vardrop.reproduce.experiments import _table1, table1, table1_correlated
from vardrop.reproduce.results import Result

N, M = 60, 12


def trained_a_little(type_: str = "B", sharing: str = "weight") -> tuple[nn.Module, measure.Pair]:
    torch.manual_seed(1)
    x = torch.randn(N, 5)
    y = (x[:, 0] + 0.5 * torch.randn(N) > 0).long() + (x[:, 1] > 1).long()
    network = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 4), nn.ReLU(), nn.Linear(4, 3))
    vd.convert_(network, vd.VariationalDropout(type_, sharing=sharing, rate=0.4))
    for _ in measure.train(network, 0.0, (x, y), [10], M, 0.9, 0):
        pass
    return network, (x, y)


def test_both_weight_samples_follow_from_products_of_two_examples():
    """Eq. 5 against minibatches that the library draws: one weight sample per data point, and one for all of them."""
    network, data = trained_a_little()
    generator = torch.Generator().manual_seed(0)
    parts, repeats = 8, 100
    direct = {
        name: [measure.moments(network, data, name, M, repeats, generator) for _ in range(parts)]
        for name in ("local", "per_example", "per_minibatch")
    }
    products = [measure.products(network, data, 15, repeats, generator) for _ in range(parts)]
    correction = (N - 1) / (N - M)  # minibatches without replacement; here for noise and data alike, hence at most
    for key in products[0]:
        squared_mean = sum(part[key][1] for part in direct["local"]).div(parts).square().mean().item()
        squared_mean -= direct["local"][0][key][0] / (parts * repeats * (N // M))
        per_example = torch.tensor([part[key].same - squared_mean for part in products]).double() / M
        covariance = torch.tensor([part[key].other - squared_mean for part in products]).double() * (1 - 1 / M)
        for name, found in (("per_example", per_example), ("per_minibatch", per_example + covariance)):
            measured = torch.tensor([part[key][0] for part in direct[name]], dtype=torch.float64)
            error = (measured.var() / parts + found.var() / parts).sqrt().item()
            low, high = measured.mean().item() - 4 * error, correction * measured.mean().item() + 4 * error
            assert low < found.mean().item() < high, (key, name)
            assert error < 0.1 * measured.mean().item(), "a test that could not fail"


def test_products_without_noise_are_those_of_the_gradients():
    network, (x, y) = trained_a_little()
    for name, parameter in network.named_parameters():
        if name.endswith("log_alpha"):
            nn.init.constant_(parameter, -60.0)
    weights = [dict(network.named_parameters())[name] for name in ("4.weight", "0.weight")]
    each = [torch.autograd.grad(F.cross_entropy(network(x[i : i + 1]), y[i : i + 1]), weights) for i in range(N)]
    found = measure.products(network, (x, y), N, 1, torch.Generator().manual_seed(0))
    for k, layer in enumerate(("top", "bottom")):
        gradients = torch.stack([example[k] for example in each]).double()
        squares = gradients.square().sum(0)
        assert found[layer, "theta"].same == pytest.approx(squares.mean().item() / N, rel=1e-4)
        others = (gradients.sum(0).square() - squares).mean().item() / (N * (N - 1))
        assert found[layer, "theta"].other == pytest.approx(others, rel=1e-4, abs=1e-7)
        assert found[layer, "log alpha"].same == pytest.approx(0, abs=1e-12)
    assert network.training


def test_type_a_has_a_sample_for_every_data_point_already():
    network, data = trained_a_little("A", "neuron")
    found = {}
    for name in ("local", "per_example"):
        torch.manual_seed(3)
        found[name] = measure.moments(network, data, name, M, 1, torch.Generator().manual_seed(0))
    for key, (variance, _) in found["local"].items():
        assert found["per_example"][key][0] == pytest.approx(variance)


def test_the_moments_are_those_of_the_library():
    network, (x, y) = trained_a_little()
    batches = list(measure.minibatches((x, y), M, torch.Generator().manual_seed(5)))
    torch.manual_seed(7)
    expected = vd.gradient_variance(
        network, lambda net, batch: F.cross_entropy(net(batch[0]), batch[1]), batches, estimators=["per_minibatch"]
    )["per_minibatch"]
    torch.manual_seed(7)
    found = measure.moments(network, (x, y), "per_minibatch", M, 1, torch.Generator().manual_seed(5))
    assert found["top", "theta"][0] == pytest.approx(expected["4.weight"])
    assert found["bottom", "theta"][0] == pytest.approx(expected["0.weight"])


def test_without_noise_the_mean_is_the_full_gradient():
    network, (x, y) = trained_a_little()
    found = measure.moments(network, (x, y), "none", M, 1, torch.Generator().manual_seed(5))
    with vd.estimator("none"):
        full = torch.autograd.grad(F.cross_entropy(network(x), y), dict(network.named_parameters())["4.weight"])[0]
    torch.testing.assert_close(found["top", "theta"][1].float(), full, atol=1e-6, rtol=1e-4)
    assert found["top", "log alpha"][0] == 0


def test_measuring_does_not_change_the_training():
    (config,) = [cell.config for cell in table1.EXPERIMENT.at("smoke") if cell.config["seed"] == 0]
    few = {**config, "repeats": 1}
    once = _table1.run_cell({**few, "marks": [3]})
    twice = _table1.run_cell({**few, "marks": [1, 2, 3]})[-len(once) :]
    assert once == twice


def test_averaged_weights_are_a_copy():
    network, data = trained_a_little()
    stops = list(measure.train(network, 1.0, data, [1, 2], M, 0.9, 0))
    assert [(epoch, weights) for epoch, weights, _ in stops] == [
        (epoch, weights) for epoch in (1, 2) for weights in ("last", "averaged")
    ]
    assert stops[0][2] is network
    assert stops[1][2] is not stops[3][2]
    assert not torch.equal(next(stops[3][2].parameters()), next(network.parameters()))


# --- readings ------------------------------------------------------------------------------------------------------

ROW = {"none": 1.0, "local": 2.0, "per_example": 3.0, "per_minibatch": 7.0, "squared_shift": 0.5, "M": 10,
       "minibatches": 4}  # fmt: skip


def test_a_reference_without_noise_is_off_by_the_shift_of_the_mean():
    assert _table1.reading(ROW, "without noise") == {
        "none": 1.0,
        "local": 2.5,
        "per_example": 3.5,
        "per_minibatch": 7.5,
    }


def test_a_reference_with_noise_of_its_own_varies_too():
    found = _table1.reading(ROW, "with its own noise")
    assert found["none"] == 1.0
    assert found["local"] == pytest.approx(2.25)
    assert found["per_minibatch"] == pytest.approx(7 + 0.5 + 4 * 10 / 9)  # noise / 4, and the covariance


def test_the_variance_of_a_full_gradient_with_one_weight_is_that_of_equation_5():
    """Var[g] = Var[g_i] / M + (M - 1) / M Cov, and no variance of the data at M = N: the noise's share and Cov."""
    size, count, data, noise, covariance = 1000, 60, 3.0, 5.0, 0.01
    row = {
        "none": data / size, "local": (data + noise) / size, "per_example": (data + noise) / size, "M": size,
        "per_minibatch": (data + noise) / size + (size - 1) / size * covariance, "minibatches": count,
        "squared_shift": 0.0,
    }  # fmt: skip
    every = size * count
    full = noise / every + (every - 1) / every * covariance
    found = _table1.reading(row, "with its own noise")["per_minibatch"] - row["per_minibatch"]
    assert found == pytest.approx(full, rel=1e-3)


def test_factors_and_order():
    published = table1.PUBLISHED["top", 10]
    assert _table1.in_order(published) == 6
    assert set(_table1.factors(published, published).values()) == {1.0}
    swapped = {**published, "local": published["per_example"], "per_example": published["local"]}
    assert _table1.in_order(swapped) == 5
    off = _table1.factors({**published, "none": 3 * published["none"]}, published)
    assert off["none", "local"] == pytest.approx(3)
    assert off["local", "per_minibatch"] == 1
    assert len(_table1.factors({**published, "none": 0.0}, published)) == 3, "a variance of 0 has no ratio"


def planted(factor: float) -> list[Result]:
    """Networks whose variances are the published ones times a factor, but in the first column one that is off."""
    made = []
    for cell in table1.EXPERIMENT.at("cpu"):
        rows = []
        for (layer, epochs), published in table1.PUBLISHED.items():
            if epochs in cell.config["marks"]:
                off = {**published, "none": published["none"] * (factor if (layer, epochs) == ("top", 10) else 1)}
                rows += [
                    {"table": "variances", "layer": layer, "gradient": "theta", "epochs": epochs, "weights": weights,
                     **off, "squared_shift": 0.0, "M": 1000, "minibatches": 60, "test_error": 2.0,
                     **{key: cell.config[key] for key in ("model", "sharing", "batch", "seed")}}
                    for weights in ("last", "averaged")
                ]  # fmt: skip
        made.append(Result("table1", "cpu", cell.config, 0, {}, None, "here", 1, 1.0, rows))
    return made


def test_the_summary_tells_which_ratio_is_off():
    results = planted(2.5)
    rows = table1.summarise(results)
    (off,) = [r for r in rows if r["table"] == "ratios" and (r["layer"], r["epochs"]) == ("top", 10)]
    assert off["pairs_in_order"] == 6
    assert off["ratios_within_2"] == 3
    assert off["largest_factor"] == pytest.approx(2.5)
    assert "no dropout noise" in off["between"]
    readings = [r for r in rows if r["table"] == "readings" and r["full_gradient"] == "expected"]
    assert {r["of_ratios"] - r["ratios_within_2"] for r in readings} == {3}
    assert {r["of_ratios"] for r in readings} <= {12, 24}


def test_figures_show_every_column():
    drawn = table1.figure(planted(1.0), [])
    assert [axes.get_title() for axes in drawn.axes] == [
        f"{layer} layer, {epochs} epochs" for layer in ("top", "bottom") for epochs in (10, 100)
    ]
    results = [
        Result("table1-correlated", "smoke", cell.config, 0, {}, None, "here", 1, 1.0, _table1.run_cell(cell.config))
        for cell in table1_correlated.EXPERIMENT.at("smoke")[:1]
    ]
    assert len(table1_correlated.figure(results, []).axes) == 4
    rows = table1_correlated.summarise(results)
    assert {row["per_minibatch_to_local"] > 0 for row in rows if row["table"] == "ratios"} == {True}
