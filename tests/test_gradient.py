"""gradient_variance against closed forms, its ordering, and its manners."""

import pytest
import torch
from torch import nn

import vardrop as vd


def summed(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return model(x).sum()


def test_equals_the_closed_form_without_noise():
    layer = nn.Linear(6, 1, bias=False)
    vd.convert_(layer, vd.VariationalDropout(type="B", sharing="layer"))
    batches = torch.randn(50, 8, 6)
    found = vd.gradient_variance(layer, summed, batches, estimators=["none"])
    by_hand = batches.sum(1).double().var(0).mean().item()  # d sum(x w) / dw = sum of the rows
    assert found["none"]["weight"] == pytest.approx(by_hand, rel=1e-6)


def test_one_minibatch_weight_has_the_variance_of_equation_7():
    # loss = sum(y), x = 1: d loss / d log alpha = M sum_i eps_i sqrt(alpha) theta_i / 2, so its variance is known
    layer = nn.Linear(4, 1, bias=False)
    vd.convert_(layer, vd.VariationalDropout(type="B", sharing="layer", alpha=0.5))
    theta = dict(layer.named_parameters())["weight"].detach().double()
    generator = torch.Generator().manual_seed(0)
    repeats, m = 1500, 8
    found = vd.gradient_variance(
        layer, summed, [torch.ones(m, 4)], ["per_minibatch", "per_example"], repeats, generator
    )
    expected = (m**2 * 0.5 * theta.square().sum() / 4).item()
    error = (2 / repeats) ** 0.5  # relative standard error of the variance of a Gaussian
    assert found["per_minibatch"]["weight_log_alpha"] == pytest.approx(expected, rel=5 * error)
    assert found["per_example"]["weight_log_alpha"] == pytest.approx(expected / m, rel=5 * error)


def test_the_paper_s_ordering():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 1))
    vd.convert_(net, vd.VariationalDropout(type="B", sharing="weight", rate=0.5))
    target = torch.randn(64, 1)
    batches = [torch.randn(64, 30)]
    found = vd.gradient_variance(
        net, lambda model, x: (model(x) - target).square().mean(), batches, repeats=80,
        estimators=["local", "flipout", "per_example", "per_minibatch", "none"],
    )  # fmt: skip
    for name in ("0.weight", "0.weight_log_alpha", "2.weight", "2.weight_log_alpha"):
        row = {estimator: values.get(name, 0.0) for estimator, values in found.items()}
        assert row["none"] == pytest.approx(0.0, abs=1e-12)  # one batch, no noise
        assert row["local"] < row["per_example"] < row["per_minibatch"]
        assert row["flipout"] < row["per_minibatch"]


def test_leaves_the_model_as_it_was():
    net = nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    vd.convert_(net, vd.VariationalDropout())
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    vd.gradient_variance(net, summed, torch.randn(3, 8, 5), ["local"])
    assert not any(module.training for module in net.modules())
    assert all(p.grad is None for p in net.parameters())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])


def test_same_generator_same_figures():
    layer = nn.Linear(4, 1)
    vd.convert_(layer, vd.VariationalDropout())
    batches = torch.randn(5, 3, 4)
    first, second = (
        vd.gradient_variance(layer, summed, batches, ["local"], generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert first == second


def test_bad_input():
    layer = nn.Linear(4, 1)
    vd.convert_(layer, vd.VariationalDropout())
    with pytest.raises(ValueError, match="estimator must be one of"):
        vd.gradient_variance(layer, summed, torch.randn(2, 3, 4), ["locl"])
    with pytest.raises(ValueError, match="needs two gradients or more, got 1 batches x 1 repeats"):
        vd.gradient_variance(layer, summed, torch.randn(1, 3, 4))
    with pytest.raises(ValueError, match="must return a finite scalar, got nan"):
        vd.gradient_variance(layer, lambda m, x: m(x).sum() * float("nan"), torch.randn(2, 3, 4))
    with pytest.raises(ValueError, match=r"must return a finite scalar, got shape \(3, 1\)"):
        vd.gradient_variance(layer, lambda m, x: m(x), torch.randn(2, 3, 4))
