"""The dropouts that a model has, and the role that each plays: by their classes, their names, their holders' classes.

PyTorch, timm and Hugging Face keep a rate in three ways: in a module (``nn.Dropout.p``, ``DropPath.drop_prob``), in a
number that a forward hands to a function (``MultiheadAttention.dropout``), or nowhere yet (an ``nn.Identity`` or None
where a rate above 0 would have put a module).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from numbers import Real
from typing import NamedTuple

from torch import nn
from torch.nn.modules.dropout import _DropoutNd

from vardrop.rates import Rated

ROLES = {
    "attention": "on attention weights",
    "residual": "on the output of a branch, before it is added to the residual stream",
    "embedding": "on embeddings and positions",
    "hidden": "on hidden units: inside of a feed-forward block, between layers",
    "head": "before the classifier",
    "path": "of whole residual branches or layers: DropPath, stochastic depth, LayerDrop",
    "block": "of blocks of a feature map: DropBlock",
}


class Row(NamedTuple):
    """Whatever matches all three patterns has the role; the first row that matches decides."""

    role: str | None  # None: it is known, and none of the roles is right
    kind: str  # class of the dropout; "number" or "None" for what is no module; matched in full
    holder: str  # class of the module that holds it, or a base of that
    name: str  # the end of its dotted name, from the beginning of a part on


ANY = ".*"
DROP = r"p?drop(out)?(_p|_prob|_rate)?\d*"
TABLE = (
    # what the class of the dropout says
    Row("path", r"\w*DropPath|StochasticDepth|LayerDrop", ANY, ANY),
    Row("block", r"DropBlock\w*", ANY, ANY),
    Row("attention", "AttentionDropout|HeadDropout", ANY, ANY),
    Row("residual", "ResidualDropout", ANY, ANY),
    Row("embedding", "TokenDropout", ANY, ANY),
    Row(None, r"PatchDropout\w*", ANY, ANY),  # makes sequences shorter
    # what its own name says
    Row("path", ANY, ANY, r"\w*drop_?path\d*"),
    Row("path", "number", ANY, r"(\w+_)?layer_?drop"),
    Row("block", ANY, ANY, r"\w*drop_?block\d*"),
    Row("attention", ANY, ANY, rf"(attn|attention)(_weights|_probs)?_?{DROP}"),
    Row("embedding", ANY, ANY, rf"(embd?|embed|embeddings?|pos|position\w*)_?{DROP}"),
    Row("residual", ANY, ANY, rf"(proj|out|output|resid|residual|resid_\w+|post_\w+|\w+_attn)_?{DROP}"),
    Row("hidden", ANY, ANY, rf"(activation|ffn?|intermediate|mlp)_?{DROP}"),
    Row("head", ANY, ANY, rf"(\w*head|classifier|cls|pre_logits)(_|\.){DROP}"),
    Row("head", ANY, ANY, rf"(final|first|last|pooler|seq_classif|qa)(_|\.){DROP}"),
    # PyTorch and torchvision
    Row("head", ANY, "Sequential", r"classifier\.\d+"),
    Row("hidden", ANY, "MLP|MLPBlock", r"mlp\.2"),
    Row("residual", ANY, "MLP|MLPBlock", r"mlp\.4"),
    Row("residual", "number", r"ShiftedWindowAttention\w*", "dropout"),
    Row("embedding", ANY, "(En|De)coder", "dropout"),
    Row("attention", "number", "MultiheadAttention", "dropout"),
    Row("residual", ANY, "Transformer(En|De)coderLayer", r"dropout\d"),
    Row("hidden", ANY, "Transformer(En|De)coderLayer", "dropout"),
    Row("hidden", "number", "RNNBase", "dropout"),  # between the layers of LSTM, GRU, RNN
    # timm
    Row("hidden", ANY, r"\w*Mlp", "drop1?"),
    Row("residual", ANY, r"\w*Mlp", "drop2"),
    Row("head", "number", r"(?!_?DenseLayer)\w+", "^drop_rate"),
    Row("hidden", "number", "_?DenseLayer", "drop_rate"),
    # transformers
    Row("residual", ANY, r"\w+Layer(Self|Cross)Attention|\w+LayerFF", "dropout"),  # T5
    Row("attention", ANY, r"\w*(Self|Cross)Attention", "dropout"),  # BERT
    Row("attention", "number", r"\w*Attention", r"dropout(_p|_prob)?"),  # T5, BART
    Row(None, ANY, r"\w*(Attention|Head)", "dropout"),  # of the weights or of the output
    Row("residual", ANY, r"GPT\w*MLP|FFN", "dropout"),  # behind the second layer
    Row("hidden", ANY, r"\w*(MLP|FeedForward|DenseActDense|DenseGatedActDense)", "dropout"),
    Row("residual", "number", r"\w+(Attention|MLP)", "hidden_dropout"),  # BLOOM
    Row("residual", ANY, r"\w+(Output|Layer|Block)", "(hidden_)?dropout"),  # BERT, ViT, BART
    Row("head", ANY, r"\w+For[A-Z]\w+", "drop(out)?"),
    Row("embedding", ANY, r"\w*(Embeddings?|Positional\w*)", "drop(out)?"),
    Row("embedding", ANY, r"\w+Model", "drop(out)?"),  # GPT-2
    Row("embedding", ANY, r"\w+Stack", "dropout"),  # T5; its last norm's output too
    Row("embedding", "number", r"\w+(Encoder|Decoder)", "dropout"),  # BART
    Row("embedding", ANY, r"Wav2Vec2Encoder\w*", "dropout"),
    # networks of one's own
    Row("hidden", r"\w*Dropout\w*", "Sequential|ModuleList|", r"(\w*?\d+)?"),
    Row("hidden", "(?!number|None|Identity).*", ANY, r"drop(out)?_?\d*"),
)


@dataclass(frozen=True)
class Site:
    """A place where a model drops, or could.

    Attributes:
        name: dotted, of the module or of the number.
        holder: the module that it is an attribute of; None for a model that is a dropout itself.
        owner: the module whose ``attribute`` is the rate; None for a place without a dropout so far.
        attribute: the name of the rate.
        kind: class of the dropout; "number" if it is none.
        role: one of :data:`ROLES`, or None.
        layer: the repeated layer that it belongs to.
    """

    name: str
    holder: nn.Module | None
    owner: nn.Module | None
    attribute: str
    kind: str
    role: str | None
    layer: str

    @property
    def rate(self) -> float:
        """The rate now; 0 where there is no dropout."""
        return 0.0 if self.owner is None else float(getattr(self.owner, self.attribute))

    @property
    def is_number(self) -> bool:
        """Whether a forward hands the rate to a function, so that there is no module to swap."""
        return self.kind == "number"


def sites(model: nn.Module) -> list[Site]:
    """All dropouts of a model, in the order of its modules; a shared one once."""
    modules = dict(model.named_modules())

    def site(name: str, holder: nn.Module | None, owner: nn.Module | None, attribute: str, kind: str) -> Site:
        return Site(name, holder, owner, attribute, kind, _role(kind, holder, name), _layer(modules, name))

    found = []
    for name, module in modules.items():
        path, _, child = name.rpartition(".")
        holder = modules[path] if name else None
        rate = rate_attribute(module)
        if rate is not None:
            found.append(site(name, holder, module, rate, type(module).__name__))
            continue
        if isinstance(module, nn.Identity) and "drop" in child.lower():
            found.append(site(name, holder, None, "", "Identity"))
        for attribute, value in _numbers(module):
            inner = f"{name}.{attribute}" if name else attribute
            if value is None:
                found.append(site(inner, module, None, "", "None"))
            else:
                found.append(site(inner, module, module, attribute, "number"))
    return found


def rate_attribute(module: nn.Module) -> str | None:
    """The name of the attribute that is the rate of a dropout module; None for other modules."""
    if isinstance(module, Rated):
        return "p"
    if not isinstance(module, _DropoutNd) and not re.search("drop|stochasticdepth", type(module).__name__, re.I):
        return None
    return next((name for name in ("p", "drop_prob", "prob") if is_rate(vars(module).get(name))), None)


def unknown(model: nn.Module) -> list[str]:
    """The names of modules that look like dropouts by their class, but have no rate that is known here."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if re.search("drop", type(module).__name__, re.I)
        and rate_attribute(module) is None
        and not list(module.children())
    ]


def is_rate(value: object) -> bool:
    """Whether a value could be a dropout rate."""
    return isinstance(value, Real) and not isinstance(value, bool) and 0 <= float(value) <= 1


def _numbers(module: nn.Module) -> Iterator[tuple[str, float | None]]:
    """The attributes of a module that are rates, and the missing DropPaths."""
    for name, value in vars(module).items():
        if "drop" in name.lower() and not name.startswith("vardrop") and is_rate(value):
            yield name, value
        elif value is None and re.fullmatch(r"drop_path\d*", name):
            yield name, None


def _role(kind: str, holder: nn.Module | None, name: str) -> str | None:
    classes = [""] if holder is None else [base.__name__ for base in type(holder).__mro__]
    for row in TABLE:
        start = row.name if row.name.startswith("^") else rf"(^|\.)({row.name})"
        if (
            re.fullmatch(row.kind, kind)
            and re.search(rf"{start}$", name)
            and (row.holder == ANY or any(re.fullmatch(row.holder, base) for base in classes))
        ):
            return row.role
    return None


def _layer(modules: dict[str, nn.Module], name: str) -> str:
    """The innermost of a list of modules of one class that something is part of; itself if there is none."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        if parts[end - 1].isdigit():
            siblings = {type(child) for child in modules[".".join(parts[: end - 1])].children()}
            if len(siblings) == 1:
                return ".".join(parts[:end])
    return name
