"""Training runs: one config in, one folder out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vardrop.training.averaging import Averages
from vardrop.training.config import Config

if TYPE_CHECKING:
    from vardrop.training.loop import train
    from vardrop.training.model_file import load_model, load_task

__all__ = ["Averages", "Config", "load_model", "load_task", "train"]


def __getattr__(name: str) -> Any:
    """What needs Lightning Fabric comes when it is asked for: it takes seconds to import."""
    if name == "train":
        from vardrop.training.loop import train

        return train
    if name in ("load_model", "load_task"):
        from vardrop.training import model_file

        return getattr(model_file, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
