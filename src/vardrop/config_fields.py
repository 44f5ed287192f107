"""The dropout rates in the config of a Hugging Face model, which a saved model is built from again."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from torch import nn

from vardrop.roles import Site, is_rate

# Fields of a Hugging Face config: whose rate each is. A field of _GENERAL is that of all its roles for which the config
# has no field of their own.
_FIELDS = {
    "attention": r"(attention|attn)(_probs)?_(p?drop|dropout)(_prob|_rate)?",
    "residual": r"(resid|residual)_(p?drop|dropout)",
    "embedding": r"(embd?|embed|embedding)_(p?drop|dropout)",
    "hidden": r"(activation|ffn?|intermediate|feat_proj|mlp)_dropout",
    "head": r"(classifier|cls|final|head|pooler|seq_classif|qa|summary_first|summary_last)_dropout(_prob|_rate)?",
    "path": r"drop_path_rate|((en|de)coder_)?layerdrop",
}
_GENERAL = {
    r"dropout(_rate|_prob)?": ("attention", "residual", "embedding", "hidden", "head"),
    r"hidden_dropout(_prob|_rate)?": ("residual", "embedding", "hidden", "head"),
}
# Models that read the rate of their head from this field where a config has it, and from hidden_dropout_prob elsewhere.
_ABSENT = {"deberta": "cls_dropout", "deberta-v2": "cls_dropout"}
# Holders of DropPaths that all have the rate of the config. In other models it is that of the last layer, and the rates
# grow linearly from 0.
_CONSTANT_PATH = r"(Dinov2|Dinov3|Eomt|Pixio|Radio|RfDetr|Sapiens2|Tipsv2|Videomt|XCLIP)\w*"


class Place(NamedTuple):
    """A field of a config: of which module, and whose rate it is. One without a value leaves the rate to another."""

    module: str
    config: Any
    field: str
    governed: set[str]
    path: str = "config"  # of the config in the module

    @property
    def name(self) -> str:
        """As reports call it."""
        return ".".join(filter(None, [self.module, self.path, self.field]))

    @property
    def has_value(self) -> bool:
        """Whether it says a rate."""
        return getattr(self.config, self.field, None) is not None

    @property
    def rate(self) -> float:
        """The rate that it says; 0 for none."""
        return float(getattr(self.config, self.field)) if self.has_value else 0.0


def places(model: nn.Module) -> Iterator[Place]:
    """The fields of all configs in a model that are dropout rates; those that are not understood govern nothing."""
    for name, path, config in _configs(model):
        fields = [field for field, value in vars(config).items() if "drop" in field and is_rate(value)]
        absent = _ABSENT.get(getattr(config, "model_type", ""))
        if absent is not None and getattr(config, absent, None) is None:
            fields.append(absent)
        own = {field: role for role, pattern in _FIELDS.items() for field in fields if re.fullmatch(pattern, field)}
        for field in fields:
            wide = next((some for pattern, some in _GENERAL.items() if re.fullmatch(pattern, field)), None)
            if field in own:
                yield Place(name, config, field, {own[field]}, path)
            elif wide is None:
                yield Place(name, config, field, set(), path)
            elif rest := set(wide) - set(own.values()):
                yield Place(name, config, field, rest, path)


def _configs(model: nn.Module) -> Iterator[tuple[str, str, Any]]:
    """Every config once: the module that has it, its path there, and itself. Parts that no module has come last."""
    found = [(name, "config", getattr(module, "config", None)) for name, module in model.named_modules()]
    seen: set[int] = set()
    while found:
        parts: list[tuple[str, str, Any]] = []
        for name, path, config in found:
            if id(config) in seen or not callable(getattr(config, "to_dict", None)):
                continue
            seen.add(id(config))
            yield name, path, config
            parts += [(name, f"{path}.{key}", part) for key, part in vars(config).items() if hasattr(part, "to_dict")]
        found = parts


def common_rate(place: Place, sites: list[Site], wanted: Mapping[str, float]) -> float | str:
    """The rate that all dropouts now have that a field stands for, or why there is none, in a sentence."""
    prefix = f"{place.module}." if place.module else ""
    mine = [site for site in sites if site.role in place.governed and site.name.startswith(prefix)]
    if "path" in place.governed:
        mine = [site for site in mine if ("layerdrop" in site.name) == ("layerdrop" in place.field)]
    if place.governed == {"head"}:
        mine = [site for site in mine if ("pooler" in site.name) == ("pooler" in place.field)]
    if not mine:  # the model may read the field in a forward, as some do
        rates = {rate for role, rate in wanted.items() if role in place.governed}
    elif place.field == "drop_path_rate" and not re.match(_CONSTANT_PATH, type(mine[0].holder).__name__):
        return _last_of_linear({site.layer: site.rate for site in mine})
    else:
        rates = {site.rate for site in mine}
    if not rates:
        return "stands for a rate that is now a function of the layer"
    if not math.isclose(min(rates), max(rates), abs_tol=1e-6):
        return f"stands for rates that now differ ({', '.join(f'{rate:g}' for rate in sorted(rates))})"
    return round(max(rates), 7)  # a rate that is a float32 buffer has odd digits


def _last_of_linear(of_layer: dict[str, float]) -> float | str:
    """The rate of the last layer, if they are those that a model builds from it: linear, from 0 on."""
    rates = list(of_layer.values())
    built = [rates[-1] * index / max(1, len(rates) - 1) for index in range(len(rates))]
    if all(math.isclose(rate, other, abs_tol=1e-6) for rate, other in zip(rates, built, strict=True)):
        return round(rates[-1], 7)
    return "stands for rates that grow linearly from 0 with depth, which those of the model now do not"
