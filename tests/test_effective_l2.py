"""The penalty that dropout is to a last layer: against the formulas of the linear models, and against all masks."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.linear_model.families import LINEAR, LOGISTIC, POISSON, Family
from vardrop.linear_model.penalties import Design, brute_force, multinomial, quadratic

N, D, P = 40, 5, 0.3


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def head(outputs: int, p: float = P) -> nn.Sequential:
    return nn.Sequential(nn.Dropout(p), nn.Linear(D, outputs)).double()


def inputs() -> Tensor:
    return torch.randn(N, D, dtype=torch.float64)


@pytest.mark.parametrize("family", [LOGISTIC, LINEAR, POISSON], ids=lambda family: family.name)
def test_one_output_is_the_quadratic_penalty(family: Family) -> None:
    net, x = head(1), inputs()
    found = vd.effective_l2(net, [x[:30], x[30:]], family=family.name.lower())  # type: ignore[arg-type]
    beta = net[1].weight.detach().T
    expected = quadratic(family, Design(x), beta, net[1](x).detach(), P).mean()
    assert found.shape == (1, D)
    assert torch.isclose(0.5 * (found * beta.T.square()).sum(), expected)


def test_classes_are_the_diagonal_of_the_multinomial_penalty() -> None:
    net, x = head(3), inputs()
    found = vd.effective_l2(net, x)
    eta = net[1](x).detach()
    for c, j in itertools.product(range(3), range(D)):
        alone = torch.zeros(D, 3, dtype=torch.float64)
        alone[j, c] = 2.0
        assert torch.isclose(0.5 * found[c, j] * 4, multinomial(Design(x), alone, eta, P).mean())


def test_it_is_exact_for_a_linear_model_over_all_masks() -> None:
    net, x = head(1), inputs()
    beta, bias = net[1].weight.detach().T, net[1].bias.item()
    expected = brute_force(LINEAR, x, beta, P, bias).mean()
    assert torch.isclose(0.5 * (vd.effective_l2(net, x, family="linear") * beta.T.square()).sum(), expected)


def test_it_is_the_limit_of_all_masks_for_small_weights() -> None:
    net, x = head(1), inputs()
    with torch.no_grad():
        net[1].weight.mul_(0.02)
    beta, bias = net[1].weight.detach().T, net[1].bias.item()
    expected = brute_force(LOGISTIC, x, beta, P, bias).mean()
    found = 0.5 * (vd.effective_l2(net, x) * beta.T.square()).sum()
    assert found.item() == pytest.approx(expected.item(), rel=0.01)


def test_it_is_p_over_one_less_p_times_the_fisher_information() -> None:
    """The Fisher information of softmax by its definition: the mean square of the score, over the model's classes."""
    net, x = head(4).eval(), inputs()
    fisher = torch.zeros(4, D, dtype=torch.float64)
    for row in x:
        for c, probability in enumerate(net(row).softmax(-1).detach()):
            (score,) = torch.autograd.grad(F.log_softmax(net(row), -1)[c], net[1].weight)
            fisher += probability * score.square() / N
    assert torch.allclose(vd.effective_l2(net, x), P / (1 - P) * fisher)


def test_the_last_layer_that_runs_and_the_dropout_in_front_of_it() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(6, 2)  # is made first
            self.body = nn.Linear(D, 6)
            self.early, self.late = nn.Dropout(0.9), vd.layers.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.late(F.relu(self.body(self.early(x)))).flatten(1))

    net, x = Net(), inputs().float()
    rows = F.relu(net.body(x)).detach()
    pi = net.head(rows).softmax(-1).detach()
    expected = torch.einsum("nc,nd->cd", pi * (1 - pi), rows.square()) / N  # α = 1
    assert torch.allclose(vd.effective_l2(net, [x]), expected, atol=1e-6)
    assert torch.allclose(vd.effective_l2(net, [x], p=0.2), expected / 4, atol=1e-6)
    assert net.training


def test_functional_dropout_counts_and_sequences_are_rows() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(D, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(F.dropout(x, P, self.training))

    net, x = Net().double(), inputs()
    assert torch.allclose(vd.effective_l2(net, x.reshape(8, 5, D)), vd.effective_l2(net, x))


def test_no_dropout_in_front_and_other_errors() -> None:
    net = nn.Sequential(nn.Dropout(0.5), nn.Linear(D, 4), nn.Tanh(), nn.Linear(4, 2))
    x = inputs().float()
    with pytest.raises(ValueError, match=r"must be in front of the last linear layer, got none; say which rate"):
        vd.effective_l2(net, x)
    assert vd.effective_l2(net, x, p=0.5).shape == (2, 4)
    with pytest.raises(ValueError, match=r"some nn.Linear must run in the model, got ReLU, none"):
        vd.effective_l2(nn.ReLU(), x)
    with pytest.raises(ValueError, match=r"vardrop.effective_l2: p must be a rate in \[0, 1\), got 1"):
        vd.effective_l2(net, x, p=1)
    with pytest.raises(ValueError, match=r"family must be one of auto, .*, got 'gamma'"):
        vd.effective_l2(net, x, family="gamma")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"vardrop.effective_l2: model must be a torch.nn.Module"):
        vd.effective_l2(3, x)  # type: ignore[arg-type]
