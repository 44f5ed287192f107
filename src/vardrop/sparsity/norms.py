"""Norms of tensors from which constant channels have been taken out: they still count in the mean and the variance."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vardrop.half import HALVES, rms_norm_eps
from vardrop.sparsity.rebuild import Select
from vardrop.sparsity.stream import Norm

_SMALL = 1e-6
Statistics = tuple[Tensor, Tensor, Tensor]
_FEW = 1 << 13  # entries, up to which calls cost more than memory


class CompactLayerNorm(nn.Module):
    r"""Layer or RMS normalisation of n channels, d of which are constants that are not stored.

    With mean μ and variance s² of the k = n - d others, and mean c and sum of squared deviations q of the constants
    (Chan, Golub, LeVeque 1983),

    .. math:: m = \mu + \tfrac{d}{n}(c - \mu), \qquad v = \tfrac{k}{n} s^2 + \tfrac{q}{n} + \tfrac{kd}{n^2}(c - \mu)^2

    Args:
        norm: the module to take weights from, ``nn.LayerNorm`` or ``nn.RMSNorm`` of one axis.
        stored: ``[n]``, which channels of the input are there.
        gone: values of the others.
        outputs: ``[n]``, which channels of the output are wanted, of stored channels or of constants.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    gone: Tensor
    centre: Tensor
    spread: Tensor
    take: Tensor | None
    inserted: Tensor | None
    places: Tensor | None

    def __init__(self, norm: Any, stored: Tensor, gone: Tensor, outputs: Tensor) -> None:
        super().__init__()
        self.size, self.stored, self.eps = len(stored), int(stored.sum()), _eps(norm)
        self.centred = isinstance(norm, nn.LayerNorm)
        values = gone[~stored]
        centre = values.mean() if self.centred and len(values) else values.new_zeros(())
        self.register_buffer("gone", values)
        self.register_buffer("centre", centre)
        self.register_buffer("spread", (values - centre).square().sum() / self.size)  # q / n
        _outputs(self, norm, stored, gone, outputs)
        order = torch.cat([stored.nonzero().flatten(), (~stored).nonzero().flatten()])  # constants behind the others
        places = torch.empty_like(order).scatter_(0, order, torch.arange(self.size))[outputs]
        self.register_buffer("places", None if self.take is None and self.inserted is None else places)
        self.to(next(norm.parameters(), gone))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in HALVES else x
        eps = self.eps
        weight, bias = (None if t is None else t.to(wide.dtype) for t in (self.weight, self.bias))
        # the fewest operations are the fastest for few entries; and torch has no gradient of the statistics of its norm
        if self.centred and (torch.compiler.is_compiling() or not _is_inference() or x.numel() <= _FEW):
            return self._with_all(wide, eps, weight, bias).to(x.dtype)
        normalise = self._centred if self.centred else self._root_mean_square
        if self.take is None and self.inserted is None:
            return normalise(wide, eps, weight, bias)[0].to(x.dtype)
        y, mean, scale = normalise(wide, eps, None, None)
        if self.inserted is not None:
            constants = (self.inserted.to(wide.dtype) - mean) * scale
            y = torch.cat([y, constants], -1)
        if self.take is not None:
            y = y.index_select(-1, self.take)
        return _scaled(y, weight, bias).to(x.dtype)

    def _with_all(self, x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        """The norm of all channels, with the constants put back."""
        whole, size = torch.cat([x, self.gone.to(x.dtype).expand(*x.shape[:-1], -1)], -1), [self.size]
        if self.places is not None:
            y = F.layer_norm(whole, size, None, None, eps).index_select(-1, self.places)
            return _scaled(y, weight, bias)
        if torch.compiler.is_compiling():  # what is padded is a constant of the graph
            weight, bias = (None if t is None else F.pad(t, (0, self.size - self.stored)) for t in (weight, bias))
            return F.layer_norm(whole, size, weight, bias, eps)[..., : self.stored]
        return _scaled(F.layer_norm(whole, size, None, None, eps)[..., : self.stored], weight, bias)

    def _centred(self, x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Statistics:
        """Outputs of what is stored, mean of all and 1 / standard deviation of all."""
        n, k = self.size, self.stored
        d = n - k
        if not d:
            return torch.native_layer_norm(x, [k], weight, bias, eps)
        # of the k, whose share of the variance is k / n
        y, own_mean, own_scale = torch.native_layer_norm(x, [k], weight, None, eps * n / k)
        apart = own_mean - self.centre
        variance = torch.add(self.spread, own_scale.pow(-2), alpha=k / n)
        scale = torch.addcmul(variance, apart, apart, value=k * d / n**2).rsqrt()
        to_mean = apart * (d / n)
        shift = _scaled(to_mean * scale, weight, bias)
        return torch.addcmul(shift, y, scale / own_scale), own_mean - to_mean, scale

    def _root_mean_square(self, x: Tensor, eps: float, weight: Tensor | None, bias: Tensor | None) -> Statistics:
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square()
        scale = (squares / self.size + self.spread + eps).rsqrt()
        return _scaled(x * scale, weight, bias), torch.zeros_like(scale), scale

    def extra_repr(self) -> str:
        return f"{self.stored} of {self.size} channels"


def _eps(norm: Any) -> float:
    """What is added to the variance."""
    if norm.eps is not None:
        return float(norm.eps)
    return rms_norm_eps(next(norm.parameters(), torch.empty(())).dtype)


def _is_inference() -> bool:
    """Whether nothing asks for a gradient, nor could."""
    return not torch.is_grad_enabled() and torch._C._functorch.peek_interpreter_stack() is None


def _scaled(y: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    """y times a weight for every channel, and a bias."""
    if weight is not None and bias is not None:
        return torch.addcmul(bias, y, weight)
    return y if weight is None else y * weight


class CompactGroupNorm(nn.Module):
    """Group normalisation of channels some of which are constants that are not stored.

    The variance of a group is the mean over its channels of their own variance and of the squared distance of their
    mean from that of the group.

    Args:
        norm: the module to take weights from.
        stored: ``[n]``, which channels of the input are there.
        gone: values of the others.
        outputs: ``[n]``, which channels of the output are wanted, of stored channels or of constants.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    member: Tensor
    missing: Tensor
    centre: Tensor
    spread: Tensor
    home: Tensor
    group: Tensor
    take: Tensor | None
    inserted: Tensor | None

    def __init__(self, norm: nn.GroupNorm, stored: Tensor, gone: Tensor, outputs: Tensor) -> None:
        super().__init__()
        groups, self.size, self.eps = norm.num_groups, norm.num_channels, norm.eps
        self.width = self.size // groups
        member = torch.eye(groups, dtype=gone.dtype).repeat_interleave(self.width, 0)
        away = member[~stored]
        values = gone[~stored]
        centre = values @ away / away.sum(0).clamp_min(1)
        self.register_buffer("member", member[stored])
        self.register_buffer("missing", away.sum(0))
        self.register_buffer("centre", centre)
        self.register_buffer("spread", (values - away @ centre).square() @ away)
        self.register_buffer("home", member[stored].argmax(1))
        self.register_buffer("group", member[outputs].argmax(1))
        _outputs(self, norm, stored, gone, outputs)
        self.to(next(norm.parameters(), gone))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if x.dtype in HALVES else x
        positions = wide.flatten(2) if x.ndim > 2 else wide.unsqueeze(-1)
        if _is_inference():  # torch.var_mean is 50 times as slow, but has a gradient
            _, own, scales = torch.native_layer_norm(positions, positions.shape[2:], None, None, _SMALL)
            within, own = (scales.square().reciprocal() - _SMALL).squeeze(-1), own.squeeze(-1)
        else:
            within, own = torch.var_mean(positions, -1, correction=0)
        member, missing, centre = (t.to(wide.dtype) for t in (self.member, self.missing, self.centre))
        mean = (own @ member + missing * centre) / self.width
        apart = (own - mean.index_select(1, self.home)).square()
        of_constants = self.spread.to(wide.dtype) + missing * (centre - mean).square()
        variance = ((within + apart) @ member + of_constants) / self.width
        scale = (variance + self.eps).rsqrt().index_select(1, self.group)
        scale = scale if self.weight is None else scale * self.weight
        shift = -mean.index_select(1, self.group) * scale
        shift = shift if self.bias is None else shift + self.bias
        if self.inserted is not None:
            constants = self.inserted.to(wide.dtype).view(-1, *[1] * (x.ndim - 2))
            wide = torch.cat([wide, constants.expand(x.shape[0], -1, *x.shape[2:])], 1)
        if self.take is not None:
            wide = wide.index_select(1, self.take)
        shape = (*scale.shape, *[1] * (x.ndim - 2))
        return (wide * scale.view(shape) + shift.view(shape)).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{len(self.home)} of {self.size} channels"


def _outputs(small: nn.Module, norm: Any, stored: Tensor, gone: Tensor, outputs: Tensor) -> None:
    """Where the outputs come from: their places among the stored channels, with constants that are read behind them."""
    inserted = outputs & ~stored
    place = stored.long().cumsum(0) - 1
    place[inserted] = int(stored.sum()) + torch.arange(int(inserted.sum()))
    take = place[outputs]
    as_they_are = not inserted.any() and len(take) == int(stored.sum())
    small.register_buffer("take", None if as_they_are else take)
    small.register_buffer("inserted", gone[inserted] if inserted.any() else None)
    for name in ("weight", "bias"):
        tensor = getattr(norm, name, None)
        if tensor is not None:
            cut = tensor.detach()[outputs.to(tensor.device)].clone()
            small.register_parameter(name, nn.Parameter(cut, tensor.requires_grad))
        else:
            small.register_parameter(name, None)


def smaller_norm(norm: Any, rule: Norm, like: Tensor) -> nn.Module | None:
    """What a norm becomes, with buffers like a tensor of the network; None if it stays as it is."""
    stored, outputs = rule.source.keep, rule.out.keep
    if stored.all() and outputs.all():
        return None
    small: nn.Module
    if stored.all():  # torch's own is faster than ours
        index = outputs.nonzero().flatten()
        small = nn.Sequential(norm, Select(index, rule.out.dim - len(rule.node.meta["shape"])))
    elif isinstance(norm, nn.RMSNorm) and norm.weight is not None and torch.equal(stored, outputs):
        small = _smaller_rms_norm(norm, stored, rule.source.value[~stored])
    else:
        gone = torch.where(rule.source.constant, rule.source.value, 0.0)
        kind = CompactGroupNorm if isinstance(norm, nn.GroupNorm) else CompactLayerNorm
        small = kind(norm, stored, gone, outputs)
    return small.to(like).train(norm.training)


def _smaller_rms_norm(norm: nn.RMSNorm, stored: Tensor, gone: Tensor) -> nn.RMSNorm:
    """Torch's own, where only what is stored is read: with k of n channels √(n/k) γ and ε' = (nε + Σ gone²) / k."""
    n, k = len(stored), int(stored.sum())
    small = nn.RMSNorm(k, (n * _eps(norm) + float(gone.square().sum())) / k)
    weight = norm.weight.detach()[stored.to(norm.weight.device)] * math.sqrt(n / k)
    small.weight = nn.Parameter(weight, norm.weight.requires_grad)
    return small
