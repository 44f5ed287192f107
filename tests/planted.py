"""Small networks with one fault each, and healthy ones, for the diagnosis: models, and data that they were fed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop import rates

Batches = list[Any]


class Case(NamedTuple):
    """A network, the batches for it, and what must be found: (where, rule)."""

    model: nn.Module
    batches: Batches
    expected: list[tuple[str, str]]
    validation: Batches | None = None


def rows(batches: int = 4, size: int = 128, features: int = 8) -> Batches:
    return [(torch.randn(size, features), torch.randint(2, (size,))) for _ in range(batches)]


def maps(batches: int = 3, size: int = 48, smooth: bool = False) -> Batches:
    def images() -> Tensor:
        x = torch.randn(size, 3, 12, 12)
        return 4 * F.avg_pool2d(x, 5, stride=1) if smooth else x[..., :8, :8]

    return [(images(), torch.randint(2, (size,))) for _ in range(batches)]


def settled(model: nn.Module, batches: Batches) -> nn.Module:
    """Running statistics as training leaves them behind: of the inputs with the noise on."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None
    model.train()
    with torch.no_grad():
        for _ in range(6):
            for x, _labels in batches:
                model(x)
    for norm in norms:
        norm.momentum = 0.1
    return model.eval()


class ConstantAttention(nn.Module):
    """Attention that never asks whether it is in training."""

    def __init__(self, constant: bool) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 16)
        self.constant = constant
        self.head = nn.Linear(16, 2)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x).reshape(len(x), 2, 4, 2)
        p = 0.2 if self.constant or self.training else 0.0
        return self.head(F.scaled_dot_product_attention(h, h, h, dropout_p=p).reshape(len(x), 16))


class Residual(nn.Module):
    """A block with its dropout in the branch, before its BatchNorm or behind it."""

    def __init__(self, before: bool) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.drop = nn.Dropout2d(0.4)
        self.conv = nn.Conv2d(8, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.before = before
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        branch = self.bn(self.conv(self.drop(x) if self.before else x))
        y = x + (branch if self.before else self.drop(branch))
        return self.head(F.relu(y).mean((2, 3)))


def healthy_mlp() -> Case:
    data = rows()
    layers = (nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5), nn.Linear(32, 2))
    return Case(settled(nn.Sequential(*layers), data), data, [])


def healthy_residual() -> Case:
    data = maps()
    return Case(settled(Residual(before=False), data), data, [])


def healthy_layer_norm() -> Case:
    layers = (nn.Linear(8, 32), nn.Dropout(0.5), nn.LayerNorm(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 2))
    return Case(nn.Sequential(*layers), rows(), [])


def healthy_attention() -> Case:
    return Case(ConstantAttention(constant=False), rows(), [])


def healthy_maps() -> Case:
    data = maps(smooth=True)
    blocks = (vd.layers.DropBlock2d(0.1, 3), nn.Dropout2d(0.2))
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), *blocks, nn.Flatten(), nn.Linear(8 * 36, 2))
    return Case(settled(nn.Sequential(*layers), data), data, [])


def healthy_learned() -> Case:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    vd.convert_(net, vd.VariationalDropout(type="B", sharing="weight", rate=0.2))
    return Case(net, rows(), [])


def directly_before() -> Case:
    data = rows()
    layers = (nn.Linear(8, 32), nn.Dropout(0.5), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2))
    return Case(settled(nn.Sequential(*layers), data), data, [("1", "variance-shift")])


def before_last_of_block() -> Case:
    data = maps()
    return Case(settled(Residual(before=True), data), data, [("drop", "variance-shift")])


def stale() -> Case:
    data = rows()
    model = settled(nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 2)), data)
    with torch.no_grad():
        model[0].weight.mul_(2)
    return Case(model, data, [("1", "stale-statistics")])


def always_on() -> Case:
    return Case(ConstantAttention(constant=True), rows(), [("ConstantAttention", "noise-in-evaluation")])


def plain_on_maps() -> Case:
    data = maps(smooth=True)
    layers = (nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.Flatten(), nn.Linear(8 * 36, 2))
    return Case(settled(nn.Sequential(*layers), data), data, [("3", "dropout-on-feature-maps")])


def rates_at_bound() -> Case:
    net = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    vd.convert_(
        net, vd.VariationalDropout(type="B", sharing="weight", rate=0.2), where=lambda module, name: name == "0"
    )
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "log_alpha" in name:
                parameter.fill_(0.0)
    return Case(net, rows(), [("0.weight", "rates-at-bound")])


def rates_at_zero() -> Case:
    drop = vd.layers.GaussianDropout(rates.learned(0.2), features=32)
    drop.p = 1e-5
    return Case(nn.Sequential(nn.Linear(8, 32), nn.ReLU(), drop, nn.Linear(32, 2)), rows(), [("2", "rates-at-zero")])


def extreme() -> Case:
    layers = (nn.Linear(8, 32), nn.ReLU(), nn.Dropout(0.9), nn.Linear(32, 2))
    return Case(nn.Sequential(*layers), rows(), [("2", "extreme-rate")])


def on_output() -> Case:
    layers = (nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2), nn.Dropout(0.2))
    return Case(nn.Sequential(*layers), rows(), [("3", "dropout-on-output")])


def underfits() -> Case:
    """A rule that a narrow noisy network has not learned, on training data and on new ones."""

    def draw(batches: int) -> Batches:
        xs = [torch.randn(256, 8) for _ in range(batches)]
        return [(x, (x[:, 0] * 1.2 + torch.randn(len(x)) > 0).long()) for x in xs]

    net = nn.Sequential(nn.Linear(8, 4), nn.Dropout(0.6), nn.Linear(4, 2))
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
        net[0].weight[:, 0] = 1.0
        net[0].weight[:, 1] = torch.tensor([3.0, -3.0, 3.0, -3.0])
        net[2].weight[1] = 1.0
    return Case(net, draw(4), [("Sequential", "dropout-in-a-model-that-underfits")], draw(4))


Build = Callable[[], Case]
HEALTHY: tuple[Build, ...] = (
    healthy_mlp, healthy_residual, healthy_layer_norm, healthy_attention, healthy_maps, healthy_learned,
)  # fmt: skip
PLANTED: tuple[Build, ...] = (
    directly_before, before_last_of_block, stale, always_on, plain_on_maps, rates_at_bound, rates_at_zero, extreme,
    on_output, underfits,
)  # fmt: skip
