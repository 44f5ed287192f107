"""A small residual network on few images: what the experiments on structured dropout train.

Regularisers matter where data are few. At scale cpu that is 5,000 images of CIFAR-10, mirrored at random and nothing
else, for crops are a regulariser too. Networks of the same seed start from the same weights and see the same images in
the same order, whatever noise they have, so that differences between methods are differences of pairs.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.reproduce.experiment import Config, Row

BASE: dict[str, Config] = {  # what all cells of a scale share
    "smoke": {
        "data": "digits", "train": 128, "validation": 200, "epochs": 2, "batch": 32, "lr": 0.05, "weight_decay": 5e-4,
        "crop": 0, "depth": 1, "width": 4, "stem": 1, "bfloat16": False, "device": "cpu",
    },
    "cpu": {
        "data": "cifar10", "train": 5000, "validation": 4000, "epochs": 32, "batch": 64, "lr": 0.1,
        "weight_decay": 5e-4, "crop": 0, "depth": 2, "width": 16, "stem": 2, "bfloat16": True, "device": "cpu",
    },
    "gpu": {
        "data": "cifar10", "train": 45000, "validation": 5000, "epochs": 200, "batch": 128, "lr": 0.1,
        "weight_decay": 5e-4, "crop": 4, "depth": 2, "width": 64, "stem": 1, "bfloat16": True, "device": "cuda",
    },
}  # fmt: skip
GROUPS = 3
POINTS = 8  # of a curve


class Images(NamedTuple):
    """Inputs [N, C, H, W], standardised by the training images, and classes [N], of the three sets."""

    train: tuple[Tensor, Tensor]
    validation: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


@functools.lru_cache(maxsize=1)  # cells of one seed follow each other, and decoding takes seconds
def images(name: str, train: int, validation: int, seed: int, device: str) -> Images:
    """A data set with the standard test images and so many for training, drawn by the seed; validation stays the same.

    Args:
        name: for :func:`vardrop.data.load`.
        train: how many images to train on.
        validation: how many to choose rates by.
        seed: of the training images.
        device: where to keep them.
    """
    from vardrop.data import load, split_validation

    rest, *aside = split_validation(load(name), validation, seed=0)
    chosen = torch.randperm(len(rest.train_x), generator=torch.Generator().manual_seed(seed))[:train]
    x = rest.train_x[chosen]
    std, mean = torch.std_mean(x, (0, 2, 3), keepdim=True)

    def ready(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        return ((x - mean) / std).to(device, memory_format=torch.channels_last), y.to(device)

    return Images(ready(x, rest.train_y[chosen]), ready(*aside), ready(rest.test_x, rest.test_y))


class Residual(nn.Module):
    """shortcut(x) + branch(x), without a coin."""

    def __init__(self, branch: nn.Module, shortcut: nn.Module | None) -> None:
        super().__init__()
        self.branch = branch
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.branch(x) + (x if self.shortcut is None else self.shortcut(x))
        return y


def resnet(
    channels: int,
    config: Config,
    noise: Callable[[], nn.Module] | None = None,
    path: Sequence[float] | None = None,
    skip: bool = True,
) -> nn.Sequential:
    """A residual network (He et al. 2016) of three groups of blocks, the maps of each half as large and twice as many.

    Args:
        channels: of the images.
        config: ``depth``, the blocks of a group; ``width``, the maps of the first; ``stem``, the first stride.
        noise: makes a layer that stands behind every ReLU of the last two groups, where DropBlock's authors have it.
        path: the probability to drop, of every block; None for plain residual blocks.
        skip: leave dropped branches out (``StochasticDepth``), rather than compute and drop them (``DropPath``).
    """
    rates = iter(path or ())
    inputs = width = config["width"]
    layers: list[nn.Module] = [
        nn.Conv2d(channels, width, 3, config["stem"], padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    ]
    for group in range(GROUPS):
        outputs = width * 2**group
        for block in range(config["depth"]):
            stride = 2 if group and not block else 1
            behind = [noise] if noise and group else []
            branch = nn.Sequential(
                nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(),
                *(make() for make in behind),
                nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
            )
            shortcut = None
            if stride > 1:
                shortcut = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
            if path is None:
                layers.append(Residual(branch, shortcut))
            elif skip:
                layers.append(vd.layers.StochasticDepth(branch, next(rates), shortcut=shortcut))
            else:
                layers.append(Residual(branch.append(vd.layers.DropPath(next(rates))), shortcut))
            layers += [nn.ReLU(), *(make() for make in behind)]
            inputs = outputs
    model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10))
    return model.to(config["device"], memory_format=torch.channels_last)  # type: ignore[call-overload]


def augmented(x: Tensor, crop: int, generator: torch.Generator) -> Tensor:
    """Images mirrored with probability 1/2, and shifted by up to ``crop`` pixels in either direction."""
    coins = torch.rand(len(x), generator=generator).to(x.device) < 0.5
    x = torch.where(coins[:, None, None, None], x.flip(3), x)
    if crop:
        padded = F.pad(x, [crop] * 4)
        n, _, height, width = x.shape
        shift = torch.randint(2 * crop + 1, (2, n, 1, 1), generator=generator).to(x.device)
        rows = shift[0] + torch.arange(height, device=x.device)[:, None]
        columns = shift[1] + torch.arange(width, device=x.device)
        x = padded[torch.arange(n, device=x.device)[:, None, None], :, rows, columns].permute(0, 3, 1, 2)
    return x.contiguous(memory_format=torch.channels_last)


def _loss(model: nn.Module, x: Tensor, y: Tensor, config: Config) -> Tensor:
    with torch.autocast(config["device"], torch.bfloat16, enabled=config["bfloat16"]):
        logits = model(x)
    return F.cross_entropy(logits.float(), y)


def error(model: nn.Module, x: Tensor, y: Tensor, config: Config) -> float:
    """The share of images that is classified wrongly, without noise, in per cent."""
    model.eval()
    with torch.no_grad(), torch.autocast(config["device"], torch.bfloat16, enabled=config["bfloat16"]):
        wrong = sum(int((model(a).argmax(1) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    model.train()
    return 100 * wrong / len(x)


def run_cell(config: Config, build: Callable[[int, Config], nn.Module]) -> list[Row]:
    """Train one network: a row of its errors, and one for every point of its curve.

    Args:
        config: those of :data:`BASE`, with ``method``, ``rate`` and ``seed``.
        build: channels, config -> the network; rates that are scheduled are functions of the step of the optimiser.
    """
    seed, device = config["seed"], config["device"]
    data = images(config["data"], config["train"], config["validation"], seed, device)
    start = time.perf_counter()
    with torch.random.fork_rng(devices=[0] if device == "cuda" else []):
        torch.manual_seed(seed)
        model = build(data.train[0].shape[1], config)
        torch.manual_seed(seed)  # what follows must not depend on how many numbers the weights took
        curve = _fit(model, data, config)
    identity: Row = {key: config[key] for key in ("method", "rate", "seed")}
    row: Row = {
        "table": "networks",
        **identity,
        "train_error": error(model, *data.train, config),
        "validation_error": curve[-1]["validation_error"],
        "test_error": error(model, *data.test, config),
        "seconds": round(time.perf_counter() - start, 1),
    }
    return [row, *({"table": "curves", **identity, **point} for point in curve)]


def _fit(model: nn.Module, data: Images, config: Config) -> list[Row]:
    """Train in place; the curve."""
    x, y = data.train
    batch, epochs = config["batch"], config["epochs"]
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimiser = torch.optim.SGD(
        [{"params": decayed, "weight_decay": config["weight_decay"]}, {"params": others}],
        lr=config["lr"], momentum=0.9, nesterov=True,
    )  # fmt: skip
    scheduler = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, config["lr"], total_steps=steps(config), pct_start=0.1, cycle_momentum=False
    )
    rates = scheduled(model)
    order = torch.Generator().manual_seed(config["seed"])
    curve: list[Row] = []
    model.train()
    for epoch in range(1, epochs + 1):
        losses = []
        shuffled = torch.randperm(len(x), generator=order).to(x.device)
        for chosen in shuffled.split(batch)[: len(x) // batch]:
            loss = _loss(model, augmented(x[chosen], config["crop"], order), y[chosen], config)
            optimiser.zero_grad(set_to_none=True)
            loss.backward()
            optimiser.step()
            scheduler.step()
            if rates is not None:
                rates.step()
            losses.append(loss.detach())
        if epoch % max(1, epochs // POINTS) == 0 or epoch == epochs:
            curve.append({
                "epoch": epoch,
                "train_loss": torch.stack(losses).mean().item(),
                "validation_error": error(model, *data.validation, config),
            })  # fmt: skip
    return curve


def steps(config: Config) -> int:
    """Of the optimiser, in all; a batch that is not full is left out."""
    return int(config["epochs"] * (config["train"] // config["batch"]))


def scheduled(model: nn.Module) -> vd.rates.RateScheduler | None:
    """A scheduler for the rates, if any of them has a schedule."""
    some = any(isinstance(m, vd.rates.Rated) and m.schedule is not None for m in model.modules())
    return vd.rates.RateScheduler(model) if some else None


def step_times(config: Config, build: Callable[[int, Config], nn.Module], methods: Sequence[str]) -> list[Row]:
    """The time of a training step of every method, measured in turn, so that all meet the same machine.

    On a CPU it is the processor's time, which other programs change little. As many rounds as are measured go before,
    in which kernels are made for every number of rows that stochastic depth may keep.

    Args:
        config: as of :func:`run_cell`, with ``rounds`` and no method.
        build: as of :func:`run_cell`.
        methods: the first is what the others are compared with.
    """
    data = images(config["data"], config["train"], config["validation"], config["seed"], config["device"])
    x, y = (part[: config["batch"]] for part in data.train)
    clock = time.perf_counter if x.is_cuda else time.process_time
    seconds: dict[str, list[float]] = {method: [] for method in methods}
    with torch.random.fork_rng(devices=[0] if x.is_cuda else []):
        torch.manual_seed(config["seed"])
        models = {method: build(x.shape[1], {**config, "method": method}).train() for method in methods}
        for _ in range(2 * config["rounds"]):
            for method, model in models.items():
                model.zero_grad(set_to_none=True)
                _wait(x)
                start = clock()
                _loss(model, x, y, config).backward()
                _wait(x)
                seconds[method].append(clock() - start)
    rows: list[Row] = []
    for method, times in seconds.items():
        pairs = list(zip(times, seconds[methods[0]], strict=True))[config["rounds"] :]
        ratios = [ours / base for ours, base in pairs]
        rows.append({
            "table": "step", "method": method, "rate": config["rate"] if method != methods[0] else 0.0,
            "ms_per_step": 1000 * statistics.median(ours for ours, _ in pairs),
            "ratio_to_none": statistics.median(ratios),
            "quartiles": " to ".join(f"{q:.3f}" for q in statistics.quantiles(ratios, n=4, method="inclusive")[::2]),
        })  # fmt: skip
    return rows


def _wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
