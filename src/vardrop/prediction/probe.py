"""Why an output does not vary: what to say instead of giving an uncertainty of 0."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from vardrop.prediction.noise_modules import Source

_SHOWN = 5


def reason(sources: Sequence[Source], left_off: Mapping[str, str], passes: int, reached: bool | None) -> str:
    """The likely cause, in words, and what to do about it.

    Args:
        sources: the noise that was on.
        left_off: name -> reason, for noise that was not.
        passes: how many were compared.
        reached: whether noise reached the output at all; None where nobody knows.
    """
    lively = [source for source in sources if source.rate is None or source.rate > 0]
    off = "; ".join(f"{name} was left off: {why}" for name, why in list(left_off.items())[:_SHOWN])
    if not sources:
        cause = "no noise was found in the model"
        remedy = "give it dropout (vd.replace_dropout_, vd.layers), or random weights (vd.convert_)"
    elif not lively:
        cause = f"the rate of all noise is 0 ({_names(sources)})"
        remedy = "set the rates that it was trained with, or vd.set_rates_"
    elif reached is False:
        cause = f"the noise ({_names(lively)}) does not reach this output"
        remedy = "choose an output behind the noise with select=, or see which modules the forward really calls"
    else:
        cause = f"either nothing of the noise ({_names(lively)}) reaches the output, or what follows it is constant"
        remedy = "look for saturated units, rounding or argmax at the end, or a rate near 0 that needs more samples"
    got = "noise does not reach it" if reached is False else f"got {passes} equal passes"
    return (
        f"vardrop.mc_predict: the outputs must vary between passes, {got}: {cause}{f'; {off}' if off else ''}; {remedy}"
    )


def _names(sources: Sequence[Source]) -> str:
    shown = ", ".join(source.name for source in sources[:_SHOWN])
    return shown + (f" and {len(sources) - _SHOWN} more" if len(sources) > _SHOWN else "")
