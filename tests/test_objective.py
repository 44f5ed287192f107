"""The loss and its parts: divergence, warm-up, rates."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd

A = vd.VariationalDropout()
B = vd.VariationalDropout(type="B", sharing="weight")


def net(config: object = A) -> nn.Sequential:
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    vd.convert_(model, config)  # type: ignore[arg-type]
    return model


def nll(value: float = 0.7) -> Tensor:
    return torch.tensor(value, requires_grad=True)


# --- the divergence ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "scalars"),
    [
        (vd.VariationalDropout(type="A", sharing="layer", alpha=0.5), 4 + 8),
        (vd.VariationalDropout(type="A", sharing="neuron", alpha=0.5), 4 + 8),
        (vd.VariationalDropout(type="B", sharing="layer", alpha=0.5), 32 + 16),
        (vd.VariationalDropout(type="B", sharing="neuron", alpha=0.5), 32 + 16),
        (vd.VariationalDropout(type="B", sharing="neuron", unit="output", alpha=0.5), 32 + 16),
        (vd.VariationalDropout(type="B", sharing="weight", alpha=0.5), 32 + 16),
        (vd.GaussianDropout(type="A", alpha=0.5), 4 + 8),
        (vd.GaussianDropout(type="B", alpha=0.5), 32 + 16),
    ],
    ids=str,
)
def test_the_divergence_counts_once_for_every_random_scalar(config: object, scalars: int) -> None:
    one = vd.kl.log_uniform(torch.tensor(math.log(0.5), dtype=torch.float64)).item()
    assert vd.kl_divergence(net(config)).item() == pytest.approx(scalars * one, rel=1e-4)


def test_the_gaussian_divergence_agrees_with_torch() -> None:
    layer = nn.Linear(4, 3).double()
    vd.convert_(layer, vd.GaussianPosterior(std=0.3, prior_std=0.7))
    q = torch.distributions.Normal(layer._parameters["weight"], layer.weight_log_variance.exp().sqrt())
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 0.7)).sum()
    torch.testing.assert_close(vd.kl_divergence(layer), expected)


PADDED = (
    vd.VariationalDropout(),
    vd.VariationalDropout(type="B", sharing="weight", alpha=0.3),
    vd.VariationalDropout(type="B", sharing="neuron", unit="output", prior="gaussian"),
    vd.VariationalDropout(type="B", sharing="layer", prior="gaussian"),
    vd.SparseVariationalDropout(),
    vd.GaussianPosterior(std=0.3),
)


@pytest.mark.parametrize("padding", [0, 3, 6])
@pytest.mark.parametrize("config", PADDED, ids=repr)
def test_the_row_of_padding_is_no_weight_of_the_divergence(config: object, padding: int) -> None:
    torch.manual_seed(0)
    padded, plain = nn.Embedding(7, 7, padding_idx=padding), nn.Embedding(6, 7)
    with torch.no_grad():
        padded.weight[padding] = 1.0
        plain.weight.copy_(torch.cat([padded.weight[:padding], padded.weight[padding + 1 :]]))
    for layer in (padded, plain):
        vd.convert_(layer, config)  # type: ignore[arg-type]
    torch.testing.assert_close(vd.kl_divergence(padded), vd.kl_divergence(plain))
    vd.ELBO(padded, 10)(padded(torch.arange(7)).square().mean()).backward()
    assert not padded._parameters["weight"].grad[padding].any()


def test_a_row_of_padding_that_is_tied_to_an_output_is_a_weight() -> None:
    tied = nn.Sequential(nn.Embedding(7, 4, padding_idx=1), nn.Linear(4, 7, bias=False))
    tied[1].weight = tied[0].weight
    vd.convert_(tied, vd.GaussianPosterior(std=0.3))
    alone = nn.Linear(4, 7)
    alone.weight.data.copy_(tied[0]._parameters["weight"])
    vd.convert_(alone, vd.GaussianPosterior(std=0.3))
    torch.testing.assert_close(vd.kl_divergence(tied), vd.kl_divergence(alone))


def test_the_divergence_is_a_sum_over_modules_and_ignores_biases() -> None:
    model = net(B)
    torch.testing.assert_close(vd.kl_divergence(model), vd.kl_divergence(model[0]) + vd.kl_divergence(model[2]))
    vd.kl_divergence(model).backward()
    assert model[0].bias.grad is None


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
)
def test_the_divergence_is_as_wide_as_the_weights_and_at_least_float32(
    dtype: torch.dtype, expected: torch.dtype
) -> None:
    reference = vd.kl_divergence(net(B)).item()
    divergence = vd.kl_divergence(net(B).to(dtype))
    assert divergence.dtype == expected
    assert divergence.item() == pytest.approx(reference, rel=max(1e-4, 4 * torch.finfo(dtype).eps))


def test_models_of_mixed_precision_have_one_divergence() -> None:
    model = net(B)
    parts = vd.kl_divergence(model[0]).item(), vd.kl_divergence(model[2]).item()
    model[0].double()
    assert vd.kl_divergence(model).dtype == torch.float64
    assert vd.kl_divergence(model).item() == pytest.approx(sum(parts), rel=1e-4)


def test_no_random_weight_has_no_divergence() -> None:
    with pytest.raises(ValueError, match=r"no weight of this Linear is random; call vd\.convert_ first"):
        vd.kl_divergence(nn.Linear(2, 2))


# --- rates ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({"sharing": "layer"}, (1,)),
        ({"sharing": "neuron"}, (4,)),
        ({"type": "B", "sharing": "neuron"}, (4,)),
        ({"type": "B", "sharing": "neuron", "unit": "output"}, (8,)),
        ({"type": "B", "sharing": "weight"}, (8, 4)),
    ],
)
def test_rates(options: dict, shape: tuple[int, ...]) -> None:
    model = net(vd.VariationalDropout(rate=0.25, **options))
    for as_, value in {"rate": 0.25, "alpha": 1 / 3, "log_alpha": math.log(1 / 3)}.items():
        rates = vd.dropout_rates(model, as_=as_)
        assert list(rates) == ["0.weight", "2.weight"]
        torch.testing.assert_close(rates["0.weight"], torch.full(shape, value))
        assert not rates["0.weight"].requires_grad
    vd.dropout_rates(model, as_="log_alpha")["0.weight"].zero_()  # theirs to change
    torch.testing.assert_close(vd.dropout_rates(model)["0.weight"], torch.full(shape, 0.25))


def test_rates_of_variances_are_relative_to_the_weights() -> None:
    layer = nn.Linear(3, 2)
    vd.convert_(layer, vd.GaussianPosterior(std=0.1))
    alpha = vd.dropout_rates(layer, as_="alpha")["weight"]
    torch.testing.assert_close(alpha, 0.01 / layer._parameters["weight"].detach().square())


def test_rates_keep_within_their_bound() -> None:
    layer = nn.Linear(3, 2)
    vd.convert_(layer, A)
    with torch.no_grad():
        layer.weight_log_alpha.fill_(5.0)
    torch.testing.assert_close(vd.dropout_rates(layer)["weight"], torch.full((3,), 0.5))


def test_a_plain_model_has_no_rates() -> None:
    assert vd.dropout_rates(nn.Linear(2, 2)) == {}


def test_rates_of_another_kind() -> None:
    with pytest.raises(ValueError, match="as_ must be one of rate, alpha, log_alpha, got 'p'"):
        vd.dropout_rates(net(), as_="p")


# --- the lower bound --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 0.0, 2])
@pytest.mark.parametrize("config", [A, B], ids=["A", "B"])
def test_the_loss_is_nll_plus_scaled_kl_over_n(config: object, scale: float) -> None:
    model = net(config)
    elbo = vd.ELBO(model, num_data=500, kl_scale=scale)
    divergence = vd.kl_divergence(model)
    loss = elbo(nll(0.7))
    torch.testing.assert_close(loss, 0.7 + scale * divergence / 500)
    assert elbo.last == pytest.approx((0.7, divergence.item(), scale))
    assert elbo.last._fields == ("nll", "kl", "scale")


def test_gradients_come_from_both_parts() -> None:
    model = net(B)
    divergence = torch.autograd.grad(vd.kl_divergence(model), model[0].weight_log_alpha)[0]
    elbo = vd.ELBO(model, num_data=50, kl_scale=1 / 3)
    data = nll()
    elbo(data).backward()
    torch.testing.assert_close(model[0].weight_log_alpha.grad, divergence / 150)
    assert data.grad == 1.0


def test_a_model_without_random_weights_has_the_nll_alone() -> None:
    elbo = vd.ELBO(nn.Linear(2, 2), num_data=10)
    data = nll()
    loss = elbo(data)
    loss.backward()
    assert loss == data
    assert elbo.last.kl == 0.0


def test_accumulated_microbatches_count_the_divergence_once() -> None:
    """The mean of the losses of equal microbatches is the loss of the batch (with one noise: here none)."""
    model = net(B)
    elbo = vd.ELBO(model, num_data=100)
    x, y = torch.randn(12, 4), torch.randint(2, (12,))
    with vd.estimator("none"):
        elbo(F.cross_entropy(model(x), y)).backward()
        whole = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        for rows in torch.arange(12).chunk(3):
            (elbo(F.cross_entropy(model(x[rows]), y[rows])) / 3).backward()
    for p, grad in zip(model.parameters(), whole, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_several_forward_passes_before_one_backward() -> None:
    model = net(B)
    elbo = vd.ELBO(model, num_data=100)
    x = torch.randn(6, 4)
    torch.manual_seed(0)
    losses = [elbo(model(x).square().mean()) for _ in range(3)]
    torch.stack(losses).sum().backward()
    together = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    torch.manual_seed(0)
    for _ in range(3):
        elbo(model(x).square().mean()).backward()
    for p, grad in zip(model.parameters(), together, strict=True):
        torch.testing.assert_close(p.grad, grad)


def test_warm_up_is_linear_in_training_steps() -> None:
    model = net()
    elbo = vd.ELBO(model, num_data=10, kl_scale=0.5, warmup=4)
    scales = []
    for _ in range(6):
        elbo(nll())
        scales.append(elbo.last.scale)
    assert scales == pytest.approx([0.0, 0.125, 0.25, 0.375, 0.5, 0.5])
    model.eval()
    step = elbo.step
    elbo(nll())
    assert elbo.step == step
    assert elbo.scale() == 0.5


@pytest.mark.parametrize("warmup", [None, 0, 0.0])
def test_no_warm_up(warmup: float | None) -> None:
    assert vd.ELBO(net(), num_data=10, warmup=warmup).scale() == 1.0  # type: ignore[arg-type]


def test_warm_up_by_a_function() -> None:
    elbo = vd.ELBO(net(), num_data=10, kl_scale=0.5, warmup=lambda step: min(1.0, max(0.0, (step - 2) / 2)))
    scales = []
    for _ in range(5):
        elbo(nll())
        scales.append(elbo.last.scale)
    assert scales == [0.0, 0.0, 0.0, 0.25, 0.5]


def test_warm_up_goes_on_from_a_checkpoint() -> None:
    elbo = vd.ELBO(net(), num_data=10, warmup=10)
    for _ in range(3):
        elbo(nll())
    state = copy.deepcopy(elbo.state_dict())
    other = vd.ELBO(net(), num_data=10, warmup=10)
    other.load_state_dict(state)
    assert other.scale() == elbo.scale() == pytest.approx(0.3)


def test_it_learns_rates_that_the_data_ask_for() -> None:
    """The weights of useless inputs are nearly all noise, and the useful one has next to none: what rates are for."""
    torch.manual_seed(0)
    x = torch.randn(2000, 4)
    y = 3 * x[:, :1] + 0.1 * torch.randn(2000, 1)
    layer = nn.Linear(4, 1)
    vd.convert_(layer, B)
    elbo = vd.ELBO(layer, num_data=2000)
    optimiser = torch.optim.Adam(layer.parameters(), lr=0.1)
    for _ in range(400):
        optimiser.zero_grad()
        elbo(((layer(x) - y).square() / (2 * 0.1**2)).mean()).backward()
        optimiser.step()
    rates = vd.dropout_rates(layer)["weight"][0]
    assert rates[0] < 0.002
    assert (rates[1:] > 0.05).all()


# --- misuse -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_data", [0, -5, True, None, "100", math.nan, math.inf, torch.tensor(5)])
def test_num_data_must_be_a_positive_number(num_data: object) -> None:
    with pytest.raises(
        ValueError, match=r"num_data must be the number of examples in the training set.*len\(train_set\)"
    ):
        vd.ELBO(net(), num_data=num_data)  # type: ignore[arg-type]


def test_num_data_has_no_default() -> None:
    with pytest.raises(TypeError, match="num_data"):
        vd.ELBO(net())  # type: ignore[call-arg]


@pytest.mark.parametrize("kl_scale", [-1, math.nan, math.inf, None, "1", True])
def test_kl_scale_must_be_finite_and_not_negative(kl_scale: object) -> None:
    with pytest.raises(ValueError, match="kl_scale must be finite and not negative, got"):
        vd.ELBO(net(), num_data=10, kl_scale=kl_scale)  # type: ignore[arg-type]


@pytest.mark.parametrize("warmup", [-1, -0.5, math.nan, math.inf, "10", True])
def test_warmup_must_be_a_number_of_steps(warmup: object) -> None:
    with pytest.raises(ValueError, match="warmup must be a number of steps, 0 or more, or a function of the step, got"):
        vd.ELBO(net(), num_data=10, warmup=warmup)  # type: ignore[arg-type]


@pytest.mark.parametrize("factor", [-0.1, math.nan, None])
def test_warmup_must_return_a_factor(factor: object) -> None:
    elbo = vd.ELBO(net(), num_data=10, warmup=lambda step: factor)  # type: ignore[arg-type,return-value]
    with pytest.raises(ValueError, match="warmup must return a factor, finite and not negative, got"):
        elbo(nll())


@pytest.mark.parametrize("value", [torch.ones(3), torch.ones(1), torch.ones(0), 0.5, None])
def test_the_nll_must_be_a_scalar_tensor(value: object) -> None:
    with pytest.raises(
        ValueError, match=r"expects the mean negative log-likelihood.*did you mean elbo\(nll\.mean\(\)\)"
    ):
        vd.ELBO(net(), num_data=10)(value)  # type: ignore[arg-type]


def test_nothing_to_report_yet() -> None:
    with pytest.raises(ValueError, match="nothing to report yet"):
        _ = vd.ELBO(net(), num_data=10).last


@pytest.mark.parametrize("state", [{}, {"step": -1}, {"step": "3"}, {"step": True}])
def test_a_foreign_state_is_refused(state: dict) -> None:
    with pytest.raises(ValueError, match="state must have a 'step', a whole number of 0 or more, got"):
        vd.ELBO(net(), num_data=10).load_state_dict(state)
