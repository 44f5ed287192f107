"""The networks that are trained until whole units are noise: what the experiment on compaction measures."""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.reproduce.experiment import Config
from vardrop.reproduce.experiments import _cifar
from vardrop.weights.modules import RandomWeights

Pair = tuple[Tensor, Tensor]


class Images(NamedTuple):
    """Inputs [N, 1, H, W] and classes [N]: the first of the training set, those behind them, and the test set."""

    train: Pair
    validation: Pair
    test: Pair


@functools.lru_cache(maxsize=1)
def images(name: str, train: int, validation: int, side: int) -> Images:
    """A data set with its images in the middle of ``side`` pixels; validation images are those behind the training."""
    from vardrop.data import load

    data = load(name)
    if len(data.train_x) < train + validation:
        raise ValueError(
            f"vardrop.reproduce: train and validation must fit into {len(data.train_x)} images, got {train} and "
            f"{validation}; take fewer"
        )
    border = (side - data.train_x.shape[-1]) // 2

    def part(x: Tensor, y: Tensor, rows: slice) -> Pair:
        return F.pad(x[rows], [border] * 4), y[rows]

    first, second = slice(train), slice(train, train + validation)
    train_part, validation_part = (part(data.train_x, data.train_y, rows) for rows in (first, second))
    return Images(train_part, validation_part, part(data.test_x, data.test_y, slice(None)))


class BandEncoder(nn.Module):
    """A transformer encoder over bands of an image, each with a one-hot position, which is a learned embedding.

    Args:
        side: of the image.
        rows: of a band.
        width: of the stream.
        depth: layers.
        heads: of every attention.
        hidden: units of every feed-forward part.
    """

    positions: Tensor

    def __init__(self, side: int, rows: int, width: int, depth: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.rows = rows
        self.register_buffer("positions", torch.eye(side // rows), persistent=False)
        self.embed = nn.Linear(rows * side + side // rows, width)
        layer = nn.TransformerEncoderLayer(
            width, heads, hidden, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, nn.LayerNorm(width), enable_nested_tensor=False)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        bands = x.unflatten(2, (-1, self.rows)).flatten(3).squeeze(1)
        tokens = self.embed(torch.cat([bands, self.positions.expand(bands.shape[0], -1, -1)], 2))
        logits: Tensor = self.head(self.encoder(tokens).mean(1))
        return logits


def lenet5(side: int, widths: tuple[int, int, int]) -> nn.Sequential:
    """Two convolutions of 5 x 5 with pooling, a hidden layer."""
    first, second, hidden = widths
    left = ((side - 4) // 2 - 4) // 2
    convolutions = [nn.Conv2d(1, first, 5), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(first, second, 5), nn.ReLU()]
    dense = [nn.Flatten(), nn.Linear(second * left * left, hidden), nn.ReLU(), nn.Linear(hidden, 10)]
    return nn.Sequential(*convolutions, nn.MaxPool2d(2), *dense)


def mlp(side: int, widths: Sequence[int]) -> nn.Sequential:
    """Hidden layers on the pixels."""
    sizes = [side * side, *widths]
    hidden = [layer for pair in itertools.pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(sizes[-1], 10))


def network(config: Config) -> nn.Module:
    """An untrained network of a configuration, for images of ``side``; the first word of its name is its kind."""
    side, size, kind = config["side"], config["size"], config["network"].split()[0]
    if kind in ("LeNet-300-100", "MLP"):
        return mlp(side, size)
    if kind == "LeNet-5":
        return lenet5(side, size)
    if kind == "ResNet":
        depth, width = size
        return _cifar.resnet(1, {"width": width, "stem": 2, "depth": depth, "device": "cpu"})
    return BandEncoder(side, *size)


def optimizer(net: nn.Module, lr: float, noise_lr: float) -> torch.optim.Adam:
    """Adam, with a learning rate of its own for the noise, which has units to go where a weight has hundredths."""
    noise = {
        id(getattr(module, each.key))
        for module in net.modules()
        if isinstance(module, RandomWeights)
        for each in module.vardrop_noise.values()
    }
    groups = [
        {"params": [p for p in net.parameters() if id(p) not in noise], "lr": lr},
        {"params": [p for p in net.parameters() if id(p) in noise], "lr": noise_lr},
    ]
    return torch.optim.Adam([group for group in groups if group["params"]], fused=True)


def fit(net: nn.Module, data: Pair, config: Config, epochs: int, loss: Callable[[Tensor], Tensor], seed: int) -> None:
    """Adam on a rate that is constant over the first half and falls linearly to zero over the second; in place."""
    x, y = data
    adam = optimizer(net, config["lr"], config["noise_lr"])
    start = [group["lr"] for group in adam.param_groups]
    order = torch.Generator().manual_seed(seed)
    batch = config["batch"]
    steps = math.ceil(len(x) / batch)
    net.train()
    for epoch in range(epochs):
        for step, rows in enumerate(torch.randperm(len(x), generator=order).split(batch)):
            left = 1 - (epoch + step / steps) / epochs
            for group, lr in zip(adam.param_groups, start, strict=True):
                group["lr"] = lr * min(1.0, 2 * left)
            adam.zero_grad()
            loss(F.cross_entropy(net(x[rows]), y[rows])).backward()
            adam.step()
    net.eval()


def posterior(config: Config) -> vd.SparseVariationalDropout:
    """What the weights become."""
    return vd.SparseVariationalDropout(log_variance=-8.0, sharing=config["sharing"], unit=config["unit"])


def train_sparse(net: nn.Module, data: Pair, config: Config) -> None:
    """From a pretrained network to one with learned noise, in place; the divergence grows in over the warm-up."""
    vd.convert_(net, posterior(config))
    steps = math.ceil(len(data[0]) / config["batch"])
    elbo = vd.ELBO(net, len(data[0]), config["kl_scale"], warmup=config["warmup"] * steps)
    fit(net, data, config, config["epochs"], elbo, config["seed"] + 1)


def finetune(net: nn.Module, data: Pair, config: Config) -> None:
    """Train a plain network for a few epochs more, in which zeros stay zero; in place."""
    zeros = any(bool((p == 0).any()) for p in net.parameters() if p.ndim > 1)
    with vd.finetune(net) if zeros else contextlib.nullcontext():
        fit(net, data, config, config["finetune"], lambda loss: loss, config["seed"] + 2)


def error(net: nn.Module, data: Pair) -> float:
    """Misclassified in evaluation, in per cent."""
    net.eval()
    with torch.no_grad():
        wrong = sum(int((net(x).argmax(1) != y).sum()) for x, y in zip(*(t.split(1000) for t in data), strict=True))
    return 100 * wrong / len(data[0])
