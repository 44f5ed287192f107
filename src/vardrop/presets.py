"""Dropout rates that published models were trained with, by role, for :func:`vardrop.set_rates_`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from vardrop.roles import ROLES

__all__ = ["PRESETS", "Preset", "RateOfLayer"]

RateOfLayer = float | Callable[[int, int], float]


@dataclass(frozen=True)
class Preset:
    """Rates by role, and where they are from.

    Args:
        about: the rates in words.
        source: the publication and the place in it.
        rates: role -> rate, or a function ``(index, depth) -> rate`` of the layer; other roles keep what they have.
        optimizer: what belongs to the rates and is the optimiser's: ``weight_decay``, decoupled as AdamW has it, and
            ``clip_norm``, for :func:`torch.nn.utils.clip_grad_norm_`.

    Example:
        >>> from vardrop import presets
        >>> presets.PRESETS["gpt-2"].rates
        {'attention': 0.1, 'residual': 0.1, 'embedding': 0.1}
        >>> [round(presets.PRESETS["deit"].rates["path"](index, 12), 3) for index in (0, 11)]
        [0.0, 0.1]
        >>> presets.PRESETS["large-model"].optimizer
        {'weight_decay': 0.1, 'clip_norm': 1.0}
    """

    about: str
    source: str
    rates: Mapping[str, RateOfLayer]
    optimizer: Mapping[str, float] = field(default_factory=dict)


def _deit_path(index: int, depth: int) -> float:
    return 0.1 * index / max(1, depth - 1)


PRESETS: dict[str, Preset] = {
    "bert": Preset(
        "0.1 everywhere",
        "Devlin et al. 2019, appendix A.2",
        dict.fromkeys(("attention", "residual", "embedding", "hidden", "head"), 0.1),
    ),
    "gpt-2": Preset(
        "0.1 on attention, residual and embedding",
        "Radford et al. 2018, section 4.1, whose setting the configuration of GPT-2 keeps",
        {"attention": 0.1, "residual": 0.1, "embedding": 0.1},
    ),
    "deit": Preset(
        "path from 0 in the first block to 0.1 in the last, no other dropout",
        "Touvron et al. 2021, table 9",
        {**dict.fromkeys(ROLES, 0.0), "path": _deit_path},
    ),
    "large-model": Preset(
        "0 everywhere, where the data outgrow the model; AdamW with weight decay 0.1 and gradients clipped to norm 1.0 "
        "belong to it, and are yours to set",
        "PaLM, Chowdhery et al. 2022, section 5; LLaMA, Touvron et al. 2023, section 2.3",
        dict.fromkeys(ROLES, 0.0),
        {"weight_decay": 0.1, "clip_norm": 1.0},
    ),
}
