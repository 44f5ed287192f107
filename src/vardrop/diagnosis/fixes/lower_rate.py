"""A lower rate: k² − 1 is proportional to p / (1 − p), so theory says how low."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from vardrop.diagnosis.fixes.plan import Changes, Offender, site_of
from vardrop.diagnosis.theory import rate_for

TARGET = 0.05  # k² − 1 that is left
HIGHEST = 0.1  # the largest rate before a BatchNorm


def lower_rate(model: nn.Module, found: Sequence[Offender]) -> Changes:
    """Lower the rates of what shifts a BatchNorm, to 0.1 or to what theory asks for.

    Args:
        model: is changed.
        found: what shifts it.
    """
    changes = Changes()
    for offender in found:
        site = site_of(model, offender.name)
        if isinstance(site, str):
            changes.left[offender.name] = site
            continue
        now = site.rate
        new = round(min(HIGHEST, rate_for(max(offender.excess, 1e-9), min(now, 0.999), TARGET / offender.share)), 4)
        if new >= now:
            changes.left[offender.name] = f"p = {now:g} is low enough"
            continue
        setattr(site.owner, site.attribute, new)
        changes.changed[offender.name] = f"p = {new:g}, was {now:g}"
    return changes
