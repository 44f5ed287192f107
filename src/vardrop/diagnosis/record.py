"""A diagnosis and a cure as plain numbers and words, for a file and for a page."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from vardrop.diagnosis.fixes.report import FixReport
from vardrop.diagnosis.report import Diagnosis


def record(diagnosis: Diagnosis, fix: FixReport | None = None, **about: Any) -> dict[str, Any]:
    """What JSON can hold; numbers that are not finite are None.

    Args:
        diagnosis: of the model.
        fix: what was tried, if anything was.
        **about: whatever else belongs on the page: model, data, command.
    """
    found: dict[str, Any] = {
        **about,
        "examples": diagnosis.examples,
        "findings": [dataclasses.asdict(finding) for finding in diagnosis.findings],
        "batchnorms": [
            shift.row() | {"sources": list(shift.sources), "causes": shift.causes, "seen": shift.seen}
            for shift in diagnosis.batchnorms
        ],
        "unjudged": [dataclasses.asdict(entry) for entry in diagnosis.unjudged],
        "cost": None if diagnosis.cost is None else {**dataclasses.asdict(diagnosis.cost), "lost": diagnosis.cost.lost},
        "worst": diagnosis.worst,
        "gap": diagnosis.gap,
        "fix": None,
    }
    if fix is not None:
        found["fix"] = {
            "chosen": fix.chosen,
            "measure": fix.measure,
            "before": fix.before,
            "attempts": [dataclasses.asdict(attempt) for attempt in fix.attempts],
        }
    plain: dict[str, Any] = _plain(found)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
