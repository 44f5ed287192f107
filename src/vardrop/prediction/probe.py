"""Why an output does not vary: what to say instead of giving an uncertainty of 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import nn

from vardrop.prediction.noise_modules import Source
from vardrop.roles import rate_attribute

_SHOWN = 5


def reason(model: nn.Module, sources: Sequence[Source], left_off: Mapping[str, str], passes: int, silent: bool) -> str:
    """The likely cause, in words, and what to do about it.

    Args:
        model: the model.
        sources: the noise that was on.
        left_off: name -> reason, for noise that was not.
        passes: how many were compared.
        silent: whether it is known that no random operation reaches the output.
    """
    at_zero = [name or type(module).__name__ for name, module in model.named_modules() if _rate(module) == 0]
    lively = [source.name for source in sources if source.rate is None or source.rate > 0]
    off = "; ".join(f"{name} was left off: {why}" for name, why in list(left_off.items())[:_SHOWN])
    if not lively and at_zero:
        cause = f"the rate of all noise is 0 ({_some(at_zero)})"
        remedy = "set the rates that it was trained with, or others with vd.set_rates_"
    elif not lively:
        cause = "no noise was found in the model"
        remedy = "give it dropout (vd.layers), or random weights (vd.convert_)"
    elif silent:
        cause = f"the noise ({_some(lively)}) does not reach this output"
        remedy = "choose an output behind the noise with select=, or see which modules the forward really calls"
    else:
        cause = f"either nothing of the noise ({_some(lively)}) reaches the output, or what follows it is constant"
        remedy = "look for saturated units, rounding or argmax at the end, or a rate near 0 that needs more samples"
    got = "noise does not reach it" if silent else f"got {passes} equal passes"
    return (
        f"vardrop.mc_predict: the outputs must vary between passes, {got}: {cause}{f'; {off}' if off else ''}; {remedy}"
    )


def _rate(module: nn.Module) -> float | None:
    attribute = rate_attribute(module)
    return None if attribute is None else float(getattr(module, attribute))


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")
