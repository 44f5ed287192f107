r"""Residual streams in coordinates in which the layer norms that were made smaller are plain ones.

Of the n channels of a stream k are left, as z; the others are constants of mean c, with sum q of squared deviations.
With the symmetric L = I - β 1 1ᵀ whose square is I - 1 1ᵀ / n,

.. math:: w = L (z - c), \qquad z - m = L w, \qquad n v = |w|^2 + q

for the mean m and the variance v of all n. Vectors Q w of mean zero, for an isometry Q, have the norm of w, so that a
layer norm over these p = k + 1 numbers divides by the same if its ε is (q + n ε) / p. So where all that writes a stream
is linear, and all that reads its norms, the writers write Q w, the readers multiply by √(n/p) L Qᵀ, and the norm is
torch's own. If a reader has weights for a constant, which the norm makes vary, one number that stands still is carried
along in w, and counted off ε.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import Node

from vardrop.layers.base import Drop
from vardrop.sparsity.attention import CompactAttention
from vardrop.sparsity.channels import Each, Mix, Rule
from vardrop.sparsity.facts import Unknown, name_of
from vardrop.sparsity.norms import CompactLayerNorm
from vardrop.sparsity.rebuild import replace, selecting
from vardrop.sparsity.rules import Reader
from vardrop.sparsity.stream import Attend, Own

_SUMS = {"add", "iadd", "add_"}
_AVERAGES = set("mean getitem transpose permute unsqueeze contiguous detach clone dropout cat concat".split())


@dataclass
class _Stream:
    """A stream and all that has to do with it.

    Attributes:
        sources: its tensors -> the tensors they are sums or averages of; none if a module writes them.
        norms: calls of its norms -> the calls of linear layers and of attention that read them.
    """

    sources: dict[Node, list[Node]] = field(default_factory=dict)
    norms: dict[Node, list[Node]] = field(default_factory=dict)

    @property
    def writers(self) -> list[Node]:
        """The tensors that are no sums."""
        return [node for node, sources in self.sources.items() if not sources]

    def times(self, writer: Node, node: Node) -> float:
        """How often what a writer writes is contained in a tensor; nan if that is not the same at every position."""
        if node is writer:
            return 1.0
        found = [self.times(writer, each) for each in self.sources[node]]
        if name_of(node) in _SUMS:
            return sum(found)
        return math.nan if len(set(found)) > 1 else found[0] if found else 0.0


class PlainNorms:
    """Makes the layer norms of a traced module plain where its streams allow it, in place.

    Args:
        module: what was traced, with its modules made smaller already.
        reader: the rules of its graph, settled.
    """

    def __init__(self, module: nn.Module, reader: Reader) -> None:
        self.module, self.reader = module, reader
        self.rules: dict[Node, Rule] = {rule.node: rule for rule in reader.rules} | dict(reader.own)
        self.attention = {rule.call: rule for rule in reader.rules if isinstance(rule, Attend)}
        self.mixed: set[str] = set()  # paths of the layers whose channels are others now
        self.left: dict[str, str] = {}  # path of a norm -> why it is none of torch's

    def run(self) -> None:
        """Treat every norm."""
        nodes: list[Node] = list(self.reader.facts)
        for node in nodes:
            if type(self._at(node)) is not CompactLayerNorm or str(node.target) in self.left:
                continue
            if not self._is_norm(node):
                self.left[str(node.target)] = "its constants stay as numbers, as it is an RMS norm"
                continue
            stream = _Stream()
            try:
                self._follow(stream, node.args[0])
                self._rewrite(stream)
            except Unknown as reason:
                for each in stream.norms or [node]:
                    self.left[str(each.target)] = f"its constants stay as numbers, as {reason}"

    def _at(self, node: Node) -> Any:
        return self.module.get_submodule(str(node.target)) if node.op == "call_module" else None

    def _is_norm(self, node: Node) -> bool:
        module = self._at(node)
        return type(module) is CompactLayerNorm and module.centred

    def _shown(self, node: Node) -> str:
        return str(node.target) if node.op in ("call_module", "get_attr") else f"{name_of(node)}()"

    # ------------------------------------------------------------------------------------------------- who takes part

    def _passes(self, node: Node, names: set[str]) -> bool:
        """Whether a call gives sums or averages of what it gets, the same for every channel."""
        if not isinstance(self.rules.get(node), Each):
            return False
        if node.op == "call_module":
            return isinstance(self._at(node), nn.Identity | nn.Dropout | Drop)
        sums_numbers = name_of(node) in _SUMS and not all(isinstance(each, Node) for each in node.args)
        return name_of(node) in names and not sums_numbers

    def _writes(self, node: Node) -> bool:
        """Whether a tensor is what a linear layer, attention, a table or a parameter gives."""
        rule = self.rules.get(node)
        if isinstance(rule, Mix):
            return type(selecting(self._at(node))[1]) is nn.Linear
        if isinstance(rule, Attend):
            return type(self._at(rule.call)) is CompactAttention
        return isinstance(rule, Own)

    def _follow(self, stream: _Stream, start: Any) -> None:
        """Find all tensors of a stream, from one of them."""
        open_: list[Any] = [start]
        every = _SUMS | _AVERAGES
        while open_:
            node = open_.pop()
            if node in stream.sources:
                continue
            if self._writes(node):
                stream.sources[node] = []
            elif self._passes(node, every):
                stream.sources[node] = _inputs(node)
                open_ += stream.sources[node]
            else:
                raise Unknown(f"{self._shown(node)} writes the stream, and is no linear layer, attention or table")
            for user in node.users:
                if self._is_norm(user):
                    stream.norms[user] = []
                elif self._passes(user, every):
                    open_.append(user)
                else:
                    raise Unknown(f"{self._shown(user)} reads the stream past its norms")
        for norm, readers in stream.norms.items():
            readers += self._readers(norm)

    def _readers(self, norm: Node) -> list[Node]:
        """The linear layers and the attention that read a norm."""
        found, open_ = [], [norm]
        width = int(self.reader.facts[norm].keep.sum())
        while open_:
            node = open_.pop()
            for user in node.users:
                select, reader = selecting(self._at(user))
                linear = type(reader) is nn.Linear and isinstance(self.rules.get(user), Mix)
                if linear and (select is not None or reader.in_features == width):
                    found.append(user)
                elif user in self.attention and type(reader) is CompactAttention:
                    if any(channels.node is not node for channels in self.attention[user].sources):
                        raise Unknown(f"{self._shown(user)} attends to something else too")
                    found.append(user)
                elif self._passes(user, _AVERAGES) and len(_inputs(user)) == 1:
                    open_.append(user)
                else:
                    raise Unknown(f"{self._shown(user)} reads a norm, and is no linear layer or attention")
        return list(dict.fromkeys(found))

    # -------------------------------------------------------------------------------------------------- other numbers

    def _rewrite(self, stream: _Stream) -> None:
        facts = self.reader.facts
        inputs: dict[Node, Any] = {norm: norm.args[0] for norm in stream.norms}
        stored = facts[next(iter(inputs.values()))].keep
        n, k = len(stored), int(stored.sum())
        constants = {norm: facts[node].value[~stored] for norm, node in inputs.items()}
        sizes = {
            norm: float((values - values.mean()).square().sum()) + n * self._at(norm).eps
            for norm, values in constants.items()
        }
        still, carrier = 0.0, None
        if any(bool((facts[norm].keep & ~stored).any()) for norm in stream.norms):
            every = [w for w in stream.writers if all(stream.times(w, node) == 1 for node in inputs.values())]
            if not every:
                raise Unknown("nothing that writes the stream is in front of all of its norms")
            still, carrier = math.sqrt(min(sizes.values()) / 2), every[0]
        isometry = _mean_zero(k + (carrier is not None))
        p = len(isometry)
        if p > n:
            raise Unknown(f"a plain norm would have {p} channels for {n}")
        less = torch.eye(k, dtype=torch.float64) - (1 - math.sqrt(1 - k / n)) / k
        into = isometry[:, :k] @ less
        for writer in stream.writers:
            offset = into.sum(1) * -facts[writer].value[~stored].mean()
            if writer is carrier:
                offset = offset + still * isometry[:, -1]
            self._write(writer, into, offset)
        for norm, readers in stream.norms.items():
            wanted = facts[norm].keep
            back = torch.empty(n, p, dtype=torch.float64)
            back[stored] = into.T
            back[~stored] = -isometry[:, :k].sum(1) / (n * math.sqrt(1 - k / n))
            if carrier is not None:
                apart = constants[norm] - constants[norm].mean()
                back[~stored] += torch.outer(apart / still, isometry[:, -1])
            old = self._at(norm)
            scale, shift = (_exact(tensor) for tensor in (old.weight, old.bias))
            back = back[wanted] * math.sqrt(n / p)
            back = back if scale is None else back * scale[:, None]
            for reader in readers:
                self._read(reader, back, shift)
            replace(self.module, old, _plain_norm(old, p, (sizes[norm] - still**2) / p))

    def _write(self, node: Node, into: Tensor, offset: Tensor) -> None:
        """Make what writes a tensor write the new numbers: ``into @ old + offset``."""
        rule = self.rules[node]
        if isinstance(rule, Own):
            self._write_table(node, rule, into, offset)
            return
        _, module = selecting(self._at(rule.call))
        linear = module.out_proj if isinstance(rule, Attend) else module
        weight, bias = _exact(linear.weight), _exact(linear.bias)
        _set(linear, into @ weight, offset if bias is None else into @ bias + offset)
        self.mixed.add(str(rule.call.target))

    def _write_table(self, node: Node, rule: Own, into: Tensor, offset: Tensor) -> None:
        owner, name = self._at(node), "weight"
        if owner is None:
            path, _, name = str(node.target).rpartition(".")
            owner = self.module.get_submodule(path)
        table = getattr(owner, name)
        new = (table.detach().double().cpu().movedim(rule.axis, -1) @ into.T + offset).movedim(-1, rule.axis).to(table)
        setattr(owner, name, nn.Parameter(new, table.requires_grad) if isinstance(table, nn.Parameter) else new)
        if isinstance(owner, nn.Embedding):
            owner.embedding_dim = len(into)

    def _read(self, node: Node, back: Tensor, shift: Tensor | None) -> None:
        """Make what reads the outputs of a norm read the new numbers: old outputs are ``back @ new + shift``."""
        select, module = selecting(self._at(node))
        if select is not None:  # all new numbers are read
            back, shift = back[select], None if shift is None else shift[select]
            replace(self.module, self._at(node), module)
        linear: Any = module.in_proj if isinstance(module, CompactAttention) else module
        weight, bias = _exact(linear.weight), _exact(linear.bias)
        if shift is not None:
            bias = weight @ shift if bias is None else bias + weight @ shift
        _set(linear, weight @ back, bias)
        self.mixed.add(str(node.target))


def _inputs(node: Node) -> list[Node]:
    """The tensors that go into a sum or an average, as often as they do."""
    if node.op != "call_module" and name_of(node) in _SUMS:
        return [each for each in node.args if isinstance(each, Node)]
    return list(node.all_input_nodes)


def _plain_norm(old: CompactLayerNorm, width: int, eps: float) -> nn.LayerNorm:
    """Torch's norm, with weights of 1: without any it takes twice the time on a processor (580 for 300 µs)."""
    new = nn.LayerNorm(width, eps, bias=False).to(old.gone).train(old.training)
    new.weight.requires_grad_(old.weight is not None and old.weight.requires_grad)
    return new


def _mean_zero(size: int) -> Tensor:
    """An isometry of vectors onto those with one entry more and mean zero, ``[size + 1, size]``: of a reflection."""
    normal = torch.full((size + 1,), -1 / math.sqrt(size + 1), dtype=torch.float64)
    normal[-1] += 1
    reflection = torch.eye(size + 1, dtype=torch.float64) - 2 * torch.outer(normal, normal) / normal.dot(normal)
    return reflection[:, :-1]


def _exact(tensor: Any) -> Any:
    """A parameter in float64, or None."""
    return None if tensor is None else tensor.detach().double().cpu()


def _set(linear: nn.Linear, weight: Tensor, bias: Tensor | None) -> None:
    """Other weights for a linear layer, and a bias if it has one or needs one."""
    old, shift = linear.weight, linear.bias
    linear.out_features, linear.in_features = weight.shape
    linear.weight = nn.Parameter(weight.to(old), old.requires_grad)
    if bias is not None and (shift is not None or bias.any()):
        trained = old.requires_grad if shift is None else shift.requires_grad
        linear.bias = nn.Parameter(bias.to(old), trained)
