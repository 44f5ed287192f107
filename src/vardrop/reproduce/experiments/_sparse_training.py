"""Training a network until most of its weights are noise, and again what is left of it: for experiments on sparsity.

The recipe was chosen on 5,000 of the training images, that for moved images on 10,000.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.pruning.architecture import describe, rebuild
from vardrop.reproduce.experiment import Config
from vardrop.sparsity.compact import plain_copy
from vardrop.training.averaging import Averages
from vardrop.weights.modules import RandomWeights, noisy_weights

THRESHOLD = 3.0  # of log α: Molchanov et al. 2017
POSTERIOR = vd.SparseVariationalDropout(log_variance=-8.0)
PLAIN_BATCH = 128
TEACHER_PASSES = 20


class Recipe(NamedTuple):
    """How a network is trained; times in epochs, with Adam.

    Args:
        dense: without noise, on a learning rate that falls to zero; what sparse training begins with.
        epochs: with noise, on a learning rate that falls linearly to zero over the last ``decay`` part of them.
        warmup: over which the weight of the divergence grows from 0 to 1.
        decay: see there.
        shrink: between two times at which dead units are taken out of the network in training, which saves
            time and begins the moments of Adam anew.
        finetune: without noise, at each of the sparsities, zeros kept.
        batch: examples, with noise.
        lr: of all of these.
        noise_lr: of log variances, if it is another.
        finetune_lr: of fine-tuning, if it is another.
        shift: pixels, by up to which every image is moved up or down and left or right, anew in every epoch, in all
            of these.
    """

    dense: int
    epochs: int
    warmup: int
    decay: float
    shrink: int
    finetune: int
    batch: int = 128
    lr: float = 1e-3
    noise_lr: float | None = None
    finetune_lr: float | None = None
    shift: int = 0

    def entries(self) -> Config:
        """For a configuration; what is younger than the first results is left out where it changes nothing."""
        younger = {"noise_lr": None, "finetune_lr": None, "shift": 0}
        return {name: value for name, value in self._asdict().items() if younger.get(name, ...) != value}

    @classmethod
    def of(cls, config: Config) -> Recipe:
        """From a configuration, which has more in it."""
        return cls(**{name: config[name] for name in cls._fields if name in config})


def error(net: nn.Module, x: Tensor, y: Tensor) -> float:
    """Misclassified, in percent, in evaluation."""
    training = net.training
    net.eval()
    with torch.no_grad():
        wrong = sum(int((net(a).argmax(1) != b).sum()) for a, b in zip(x.split(1000), y.split(1000), strict=True))
    net.train(training)
    return 100 * wrong / len(x)


def shifted(x: Tensor, far: int, generator: torch.Generator) -> Tensor:
    """Images, each moved by up to ``far`` pixels up or down and left or right; zeros come in.

    Shape:
        ``x`` and the result: ``[examples, channels, height, width]``.
    """
    if not far:
        return x
    n, height, width = len(x), x.shape[2], x.shape[3]
    down, right = (torch.randint(2 * far + 1, (n, 1), generator=generator) for _ in range(2))
    rows, columns = down + torch.arange(height), right + torch.arange(width)
    padded = F.pad(x, (far, far, far, far))
    return padded[torch.arange(n)[:, None, None], :, rows[:, :, None], columns[:, None]].movedim(-1, 1)


class Soft(NamedTuple):
    """What a teacher says: for every example the classes' probabilities, of logits divided by a temperature."""

    probabilities: Tensor
    temperature: float


def said(net: nn.Module, x: Tensor, temperature: float, seed: int) -> Soft:
    r"""What a noisy network says on average, :math:`\frac1T \sum_t \text{softmax}(f(x, \varepsilon_t) / \theta)`."""
    passes = vd.mc_predict(
        net,
        list(x.split(1000)),
        TEACHER_PASSES,
        keep=False,
        generator=torch.Generator().manual_seed(seed),
        progress=False,
        select=lambda logits: (logits / temperature).softmax(-1),
    )
    return Soft(passes.mean, temperature)


def fit(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    epochs: int,
    lr: float,
    seed: int,
    soft: Soft | None = None,
    shift: int = 0,
) -> None:
    """Train without noise on a learning rate that falls to zero; what is left in the network is the steps' average.

    With ``soft`` it learns what a teacher says and not the labels, by the loss of Hinton, Vinyals, Dean (2015). With a
    ``shift`` images are moved, see :class:`Recipe`.
    """
    noise = {id(weight.noise) for weight in noisy_weights(net)}
    parameters = [p for p in net.parameters() if id(p) not in noise]
    adam = torch.optim.Adam(parameters, lr=lr, fused=True)
    averages = Averages(parameters, 0.999)
    order = torch.Generator().manual_seed(seed)
    steps = math.ceil(len(x) / PLAIN_BATCH)
    net.train()
    with vd.estimator("none"):
        for step in range(epochs * steps):
            if step % steps == 0:
                batches = torch.randperm(len(x), generator=order).split(PLAIN_BATCH)
            adam.param_groups[0]["lr"] = lr * (1 - step / (epochs * steps))
            rows = batches[step % steps]
            logits = net(shifted(x[rows], shift, order))
            if soft is None:
                loss = F.cross_entropy(logits, y[rows])
            else:
                heat = soft.temperature
                loss = heat**2 * F.cross_entropy(logits / heat, soft.probabilities[rows])
            adam.zero_grad()
            loss.backward()
            adam.step()
            averages.update()
    for parameter, average in zip(parameters, averages.values, strict=True):
        parameter.data.copy_(average)
    net.eval()


def shrink(net: nn.Module, example: Tensor) -> nn.Module:
    """The network in training without the units that no weight below the threshold reaches or reads."""
    pruned = copy.deepcopy(net)
    vd.sparsify_(pruned, threshold=THRESHOLD, allow_empty=True)
    small: Any = vd.compact(pruned, example)
    kept = small.compaction.kept
    for name, module in net.named_modules():
        if not isinstance(module, RandomWeights):
            continue
        old: Any = module
        new: Any = small.get_submodule(name)
        new = new[1] if isinstance(new, nn.Sequential) else new  # behind a selection of inputs
        vd.convert_(new, POSTERIOR)
        for key in ("weight", "weight_log_variance"):
            value = old._parameters[key].detach()
            if name in kept:
                outputs, inputs = kept[name]
                value = value[outputs][:, inputs]
            new._parameters[key].data.copy_(value)
    del small.compaction
    small.train(net.training)
    return small


def _adam(net: nn.Module) -> torch.optim.Adam:
    """With a learning rate for the network, and one for the log variances of its weights."""
    noise = {id(weight.noise) for weight in noisy_weights(net)}
    parameters = list(net.parameters())
    groups = [{"params": [p for p in parameters if (id(p) in noise) is which]} for which in (False, True)]
    return torch.optim.Adam(groups, fused=True)


class Unfinished(NamedTuple):
    """A training that is not over, after so many epochs, where a new optimiser begins."""

    epoch: int
    net: nn.Module
    order: Tensor  # the state of the generator that shuffles

    def state(self) -> dict[str, Any]:
        """As tensors and JSON."""
        network = describe(plain_copy(self.net))
        return {"epoch": self.epoch, "network": network, "weights": self.net.state_dict(), "order": self.order}

    @classmethod
    def of(cls, state: dict[str, Any]) -> Unfinished:
        """Back again."""
        net = rebuild(state["network"])
        vd.convert_(net, POSTERIOR)
        net.load_state_dict(state["weights"])
        return cls(state["epoch"], net, state["order"])


def train(
    net: nn.Module,
    x: Tensor,
    y: Tensor,
    recipe: Recipe,
    seed: int,
    watch: Callable[[int, nn.Module], None] = lambda epoch, net: None,
    keep: Callable[[Unfinished], None] = lambda unfinished: None,
    start: Unfinished | None = None,
) -> nn.Module:
    """Train a plain network with sparse variational dropout; gives the converted one, without its dead units.

    ``watch`` is called after every epoch. Where units are taken out Adam's moments begin anew: there ``keep`` is called
    too, with what ``start`` takes to go on from there.
    """
    order = torch.Generator().manual_seed(seed)
    if start is None:
        vd.convert_(net, POSTERIOR)
        start = Unfinished(0, net, order.get_state())
    net = start.net
    order.set_state(start.order)
    steps = math.ceil(len(x) / recipe.batch)
    rates = recipe.lr, recipe.noise_lr or recipe.lr
    net.train()
    adam = _adam(net)
    for epoch in range(start.epoch, recipe.epochs):
        elbo = vd.ELBO(net, len(x), warmup=recipe.warmup * steps)
        elbo.load_state_dict({"step": epoch * steps})
        for step, rows in enumerate(torch.randperm(len(x), generator=order).split(recipe.batch)):
            left = 1 - (epoch + step / steps) / recipe.epochs
            for group, lr in zip(adam.param_groups, rates, strict=True):
                group["lr"] = lr * min(1.0, left / recipe.decay)
            loss = elbo(F.cross_entropy(net(shifted(x[rows], recipe.shift, order)), y[rows]))
            adam.zero_grad()
            loss.backward()
            adam.step()
        fresh = (epoch + 1) % recipe.shrink == 0 and epoch + 1 < recipe.epochs
        if fresh:
            net = shrink(net, x[:2])
            adam = _adam(net)
        watch(epoch + 1, net)
        if fresh or epoch + 1 == recipe.epochs:
            keep(Unfinished(epoch + 1, net, order.get_state()))
    return net
