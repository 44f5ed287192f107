"""What hangs on a flag: told from the code of the module, for networks of other people and of one's own."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import vardrop as vd
from vardrop.prediction.noise_code import uses_of_training

# ruff: noqa: RET505 - the branches are what is read here


class Base(nn.Module):
    def __init__(self, **attributes: Any) -> None:
        super().__init__()
        for name, value in attributes.items():
            setattr(self, name, value)


def call(function: Any, *args: Any, **kwargs: Any) -> Tensor:
    return function(*args, **kwargs)


class Conditional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return call(F.scaled_dot_product_attention, x, x, x, dropout_p=self.rate if self.training else 0.0)


class Keyed(Base):
    def forward(self, x: Tensor) -> Tensor:
        options = {"dropout_p": 0.0 if not self.training else self.attn_drop.p}
        return F.scaled_dot_product_attention(x, x, x, **options)


class Named(Base):
    def forward(self, x: Tensor) -> Tensor:
        training = self.training
        dropout = self.config.attention_dropout if training else 0.0
        return F.scaled_dot_product_attention(x, x, x, None, dropout)


class Positional(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x, None, self.p if self.training else 0.0)


class LayerDrop(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(9):
            if self.training and self.layerdrop > 0.0:
                probability = torch.rand([])
                if probability < self.layerdrop:
                    continue
            x = x + 1
        return x


class LayerDropInOneLine(Base):
    def forward(self, x: Tensor) -> Tensor:
        for _ in range(9):
            skip = self.training and (torch.rand([]) < self.layerdrop)
            x = x if skip else x + 1
        return x


class EarlyReturn(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return x
        return x * torch.bernoulli(torch.full_like(x, 1 - self.drop_prob))


class Reparameterised(Base):
    def forward(self, x: Tensor) -> Tensor:
        return self.sample_latent(x)

    def sample_latent(self, x: Tensor) -> Tensor:
        if self.training:
            return x + torch.randn_like(x)
        else:
            return x


class Jitter(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.jitter_noise > 0:
            x = x * torch.empty_like(x).uniform_(1.0 - self.jitter_noise, 1.0 + self.jitter_noise)
        return x


class InAProperty(Base):
    @property
    def rate(self) -> float:
        return self.dropout if self.training else 0.0

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.rate)


def decorated(function: Any) -> Any:
    def wrapper(self: nn.Module, x: Tensor) -> Tensor:
        return function(self, x)

    return wrapper


class Decorated(Base):
    @decorated
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout if self.training else 0.0)


class Wrapped(Base):
    forward = functools.wraps(EarlyReturn.forward)(decorated(EarlyReturn.forward))


class MyDropout(nn.Dropout):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.clone())


NOISE: list[tuple[nn.Module, str, float | None]] = [
    (Conditional(rate=0.3), "noise in its forward", 0.3),
    (Keyed(attn_drop=nn.Dropout(0.2)), "attn_drop in its forward", 0.2),
    (Named(config=SimpleNamespace(attention_dropout=0.4)), "attention_dropout in its forward", 0.4),
    (Positional(p=0.3), "noise in its forward", 0.3),
    (LayerDrop(layerdrop=0.5), "layerdrop in its forward", 0.5),
    (LayerDropInOneLine(layerdrop=0.5), "layerdrop in its forward", 0.5),
    (EarlyReturn(drop_prob=0.4), "drop_prob in its forward", 0.4),
    (Reparameterised(), "noise in its forward", None),
    (Jitter(jitter_noise=0.1), "noise in its forward", None),
    (InAProperty(dropout=0.4), "dropout in its forward", 0.4),
    (Decorated(dropout=0.4), "dropout in its forward", 0.4),
    (Wrapped(drop_prob=0.4), "drop_prob in its forward", 0.4),
    (MyDropout(0.4), "MyDropout", 0.4),
]


@pytest.mark.parametrize(("module", "kind", "rate"), NOISE, ids=lambda value: type(value).__name__)
def test_noise_is_known_as_noise(module: nn.Module, kind: str, rate: float | None) -> None:
    module.eval()
    x = torch.ones(2, 20, 3)
    with vd.stochastic(module) as noise:
        first = noise.sources[0]
        assert (first.kind, first.rate) == (kind, rate)
        assert len({tuple(module(x).flatten().tolist()) for _ in range(12)}) > 1
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    "module",
    [Conditional(rate=0.0), Keyed(attn_drop=nn.Dropout(0.0)), LayerDrop(layerdrop=0.0), Jitter(jitter_noise=0.0),
     EarlyReturn(drop_prob=0.0)],
    ids=lambda module: type(module).__name__,
)  # fmt: skip
def test_noise_of_rate_0_is_none(module: nn.Module) -> None:
    with vd.stochastic(module.eval()) as noise:
        assert not module.training
    assert (noise.sources, noise.left_off) == ([], {})


class RunningStatistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean = 0.9 * self.mean + 0.1 * torch.rand_like(x)
        return x - self.mean


class InPlaceStatistics(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.mean.add_(torch.rand_like(x))
        return x - self.mean


class Heads(Base):
    def forward(self, x: Tensor) -> Any:
        if self.training:
            return x, torch.rand_like(x)
        return x


class Refuses(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            if len(x) != 7:
                raise ValueError
            x = x * torch.rand_like(x)
        return x


class Tokens(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.patch_drop_rate > 0:
            x = x[torch.rand(len(x)) > self.patch_drop_rate]
        return x


class Probabilities(Base):
    def forward(self, x: Tensor) -> Tensor:
        return x if self.training else x.softmax(-1)


class Masks(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.mask_time_prob > 0 and self.training:
            x = x.masked_fill(x > 0, 0.0)
        return x


class Loss(Base):
    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = self.auxiliary_loss(F.dropout(x, 0.5))
        return x


class Flatten(nn.Flatten):
    """Torch's own module, with dropout that hangs on the flag, and more that does."""

    def forward(self, input: Tensor) -> Tensor:
        return (F.dropout(input, 0.5) if self.training else input) + call(float, self.training)


ELSE = [
    RunningStatistics(mean=0.0), InPlaceStatistics(mean=torch.zeros(4)), Heads(), Refuses(),
    Tokens(patch_drop_rate=0.5), Probabilities(), Masks(mask_time_prob=0.1), Loss(), Flatten(),
]  # fmt: skip


@pytest.mark.parametrize("module", ELSE, ids=lambda module: type(module).__name__)
def test_what_else_training_does_stays_away_and_is_named(module: nn.Module) -> None:
    with vd.stochastic(module.eval()) as noise:
        assert not module.training
    assert noise.sources == []
    assert len(noise.left_off) == 1


class Checkpointing(Base):
    """What hangs on the flag only under a condition that is false here."""

    def forward(self, x: Tensor) -> Tensor:
        if self.gradient_checkpointing and self.training:
            x = x.relu()
        keep = None if not (self.caching and self.training) else x
        other = x if self.frozen or self.training else x.relu()
        return F.dropout(other if keep is None else keep, self.dropout if self.training else 0.0)


def test_conditions_that_are_false_do_not_count() -> None:
    module = Checkpointing(gradient_checkpointing=False, caching=False, frozen=True, dropout=0.5).eval()
    with vd.stochastic(module) as noise:
        assert module.training
    assert noise.left_off == {}
    for name, value in (("gradient_checkpointing", True), ("caching", True), ("frozen", False)):
        other = Checkpointing(gradient_checkpointing=False, caching=False, frozen=True, dropout=0.5).eval()
        setattr(other, name, value)
        with vd.stochastic(other) as noise:
            assert not other.training
        assert "also does something else" in noise.left_off["Checkpointing"]


class NeverRun(Base):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, 0.5, self.training)

    def reset(self) -> None:
        if self.training:
            self.count = 0


def test_only_what_forward_can_reach_is_read() -> None:
    uses = uses_of_training(NeverRun)
    assert uses is not None
    assert [(use.kind, use.number) for use in uses] == [("functional", 0.5)]
    assert uses_of_training(NeverRun) is uses  # read once


class PassesOn(Base):
    def forward(self, x: Tensor) -> Tensor:
        assert self.training or len(x)
        self.inner.train(self.training)
        return F.batch_norm(x, None, None, training=True if self.inner is None else self.training)


def test_passing_the_flag_on_is_nothing() -> None:
    uses = uses_of_training(PassesOn)
    assert uses is not None
    assert all(use.kind == "else" for use in uses)


@pytest.mark.parametrize(
    "module", [nn.BatchNorm2d(3), nn.SyncBatchNorm(3), nn.InstanceNorm1d(3, track_running_stats=True)]
)
def test_norms_are_never_on(module: nn.Module) -> None:
    with vd.stochastic(nn.Sequential(module, nn.Dropout(0.5)).train()):
        assert not module.training


def test_spectral_norm_does_not_iterate() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4)), nn.Dropout(0.5)).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with vd.stochastic(model) as noise:
        model(torch.ones(2, 4))
    assert noise.put_back == []
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, before[name])
