"""What is known of the channels of every tensor inside a network: which are constant, needed, and so can go.

Three passes over a traced graph. Forwards: a channel is *constant* if it has the same value for every input, at every
position (a neuron without incoming weights, and what follows from it). Backwards: a channel is *needed* if a weight
that matters multiplies it. Last: what is neither needed nor variable may go, unless an operation couples it with a
channel that stays (a sum, the blocks of a flatten); the channels that stay only ever grow in number, so this ends.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.fx import Node


@dataclass
class Channels:
    """Facts about one axis of one tensor.

    Attributes:
        node: the tensor, in the graph.
        dim: its axis of channels, from the front.
        constant: which channels are constants.
        value: of the constants, in float64.
        needed: which channels something multiplies.
        pinned: which channels have to stay, though neither needed nor variable.
        keep: which stay, in the end.
        why: what pins them, in words.
    """

    node: Node
    dim: int
    constant: Tensor
    value: Tensor
    needed: Tensor = field(init=False)
    pinned: Tensor = field(init=False)
    keep: Tensor = field(init=False)
    why: dict[str, None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.needed = torch.zeros_like(self.constant)
        self.pinned = torch.zeros_like(self.constant)
        self.keep = torch.ones_like(self.constant)

    @property
    def size(self) -> int:
        """How many channels."""
        return len(self.constant)

    @property
    def removable(self) -> Tensor:
        """Which could go, for all that their own consumers care."""
        return self.constant | ~self.needed

    def pin(self, why: str, which: Tensor | None = None) -> None:
        """Make channels stay."""
        which = torch.ones_like(self.pinned) if which is None else which
        if (which & ~self.pinned).any():
            self.why[why] = None
        self.pinned |= which

    def stay(self, which: Tensor, others: Sequence[Channels]) -> None:
        """Keep channels that go with those of others, for their reasons."""
        if (which & ~self.keep).any():
            for other in others:
                self.why |= other.why
            self.keep = self.keep | which

    @classmethod
    def variable(cls, node: Node, dim: int) -> Channels:
        """Facts of a tensor of which nothing is known."""
        size = node.meta["shape"][dim]
        return cls(node, dim, torch.zeros(size, dtype=torch.bool), torch.zeros(size, dtype=torch.float64))


class Rule:
    """What one operation does to facts: none of it is known here, so that everything that goes in has to stay."""

    def __init__(self, node: Node, inputs: Sequence[Channels], why: str = "") -> None:
        self.node, self.inputs, self.why = node, list(inputs), why
        self.call = node  # of the module, if it is one
        self.out: Channels | None = None

    def backward(self) -> None:
        """Say which channels of the inputs are needed."""
        for channels in self.inputs:
            channels.needed |= True
            channels.pin(self.why)

    def couple(self) -> bool:
        """Make channels stay that go with others which stay; whether there were any."""
        return False


class Each(Rule):
    """Channel by channel, of one or several tensors: channel c of the output depends on channels c of the inputs."""

    def __init__(self, node: Node, inputs: Sequence[Channels], dim: int, constant: Tensor, value: Tensor) -> None:
        super().__init__(node, inputs)
        self.out = Channels(node, dim, constant, value)

    def backward(self) -> None:
        assert self.out is not None  # noqa: S101
        for channels in self.inputs:
            channels.needed |= self.out.needed & ~self.out.constant

    def couple(self) -> bool:
        assert self.out is not None  # noqa: S101
        every = [self.out, *self.inputs]
        keep = torch.stack([channels.keep for channels in every]).any(0)
        changed = any(bool((keep & ~channels.keep).any()) for channels in every)
        for channels in every:
            channels.stay(keep, every)
        return changed


class Blocks(Rule):
    """Channels of the inputs, one input after the other, each a block of ``width`` channels of the output."""

    def __init__(self, node: Node, inputs: Sequence[Channels], dim: int, width: int) -> None:
        super().__init__(node, inputs)
        self.width = width
        constant, value = (
            torch.cat([getattr(channels, name) for channels in inputs]).repeat_interleave(width)
            for name in ("constant", "value")
        )
        self.out = Channels(node, dim, constant, value)

    def _split(self, which: Tensor) -> Sequence[Tensor]:
        return which.view(-1, self.width).any(1).split([channels.size for channels in self.inputs])

    def backward(self) -> None:
        assert self.out is not None  # noqa: S101
        for channels, needed in zip(self.inputs, self._split(self.out.needed & ~self.out.constant), strict=True):
            channels.needed |= needed

    def couple(self) -> bool:
        assert self.out is not None  # noqa: S101
        changed = False
        for channels, keep in zip(self.inputs, self._split(self.out.keep), strict=True):
            changed |= bool((keep & ~channels.keep).any())
            channels.stay(keep, [self.out])
        keep = torch.cat([channels.keep for channels in self.inputs]).repeat_interleave(self.width)
        changed |= bool((keep & ~self.out.keep).any())
        self.out.stay(keep, self.inputs)
        return changed


class Parts(Rule):
    """Equal parts of the channels of a tensor: channel c of the output depends on channels c of some of the parts.

    Args:
        node: the call.
        source: facts of the input.
        dim: the axis of channels of the output.
        parts: how many there are; what stays of one stays of all, so that they stay equal.
        read: those that the output depends on.
        constant: which channels of the output are constants.
        value: of these.
    """

    def __init__(
        self, node: Node, source: Channels, dim: int, parts: int, read: Sequence[int], constant: Tensor, value: Tensor
    ) -> None:
        super().__init__(node, [source])
        self.source, self.parts, self.read = source, parts, list(read)
        self.out: Channels = Channels(node, dim, constant, torch.where(constant, value, 0.0))

    def backward(self) -> None:
        self.source.needed.view(self.parts, -1)[self.read] |= self.out.needed & ~self.out.constant

    def couple(self) -> bool:
        keep = self.source.keep.view(self.parts, -1).any(0) | self.out.keep
        changed = bool((keep & ~self.out.keep).any() or (keep.repeat(self.parts) & ~self.source.keep).any())
        self.source.stay(keep.repeat(self.parts), [self.out, self.source])
        self.out.stay(keep, [self.source])
        return changed


class Mix(Rule):
    """A linear layer: every channel of the output is a sum over those of the input, with weights, plus a bias.

    Args:
        node: the call.
        source: facts of the input.
        dim: the axis of channels of the output.
        used: ``[out, in]``, which weights are not zero.
        gain: ``[out, in]``, what a constant input adds to a constant output (the sum of a kernel).
        bias: ``[out]``.
        exact: which input channels, if constant, add a constant (at a zero padding only zeros do).

    Constants that do not, because of a border of zeros, differ only by a factor: one of them stays, the ``carrier``,
    and takes over the weights of the others.
    """

    def __init__(
        self, node: Node, source: Channels, dim: int, used: Tensor, gain: Tensor, bias: Tensor, exact: Tensor
    ) -> None:
        super().__init__(node, [source])
        self.source, self.used, self.gain, self.bias = source, used, gain, bias
        self.folds = source.constant & exact  # input channels whose share is a part of the bias
        stuck = source.constant & ~self.folds
        self.stuck = stuck  # constants that are none at the border
        self.carrier = int(torch.where(stuck, source.value.abs(), -1.0).argmax()) if stuck.any() else None
        constant = ~(used & ~self.folds).any(1)
        self.out: Channels = Channels(node, dim, constant, self.folded())

    def folded(self, which: Tensor | None = None) -> Tensor:
        """The bias with the shares of constant inputs, all of them or some."""
        which = self.folds if which is None else self.folds & which
        return self.bias + torch.where(which, self.gain, 0.0) @ torch.where(which, self.source.value, 0.0)

    def backward(self) -> None:
        matters = self.used & (self.out.needed & ~self.out.constant)[:, None]
        self.source.needed |= matters.any(0)
        if self.carrier is not None and (self.stuck & matters.any(0)).any():
            only = torch.zeros_like(self.stuck)
            only[self.carrier] = True
            self.source.pin("one constant other than 0 at a zero padding stays for all of them", only)

    def carried(self) -> Tensor:
        """``[in]``, with what factors the weights of inputs that have gone add to those of the carrier."""
        share = torch.zeros_like(self.source.value)
        if self.carrier is not None:
            gone = self.stuck & ~self.source.keep
            share[gone] = self.source.value[gone] / self.source.value[self.carrier]
        return share


class Convolve(Mix):
    """A convolution: it is computed in blocks of channels, and what is no multiple of a block costs more than one."""

    FEWEST = 16  # fewer than a block are computed as they are, and would grow by more than they gain

    def round_up(self, multiple: int) -> bool:
        """Keep dead channels of the input, so that their number is a multiple; whether there were any to keep."""
        kept = int(self.source.keep.sum())
        more = -kept % multiple
        if not more or kept < self.FEWEST or kept + more > self.source.size:
            return False
        which = torch.zeros_like(self.source.keep)
        which[(~self.source.keep).nonzero().flatten()[:more]] = True
        self.source.pin(f"what a convolution reads is rounded up to a multiple of {multiple}", which)
        self.source.keep = self.source.keep | which
        return True


def settle(rules: Sequence[Rule], facts: Sequence[Channels], round_to: int = 1) -> None:
    """The last two passes: what is needed, and what stays; convolutions read a multiple of some number of channels."""
    for rule in reversed(rules):
        rule.backward()
    for channels in facts:
        channels.keep = ~channels.removable | channels.pinned
        if channels.size and not channels.keep.any():
            channels.keep[0] = True  # layers of width 0 are more trouble than one channel
    convolutions = [rule for rule in rules if isinstance(rule, Convolve)]
    while sum(rule.couple() for rule in rules) or any(rule.round_up(round_to) for rule in convolutions):
        pass  # every rule couples, each time
