"""Packages of the extras, imported when something asks for them."""

from __future__ import annotations

import importlib
from typing import Any


def needed(module: str, by: str, extra: str = "uncertainty") -> Any:
    """A module of an optional package, or an error that says what to install."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"vardrop.{by}: needs {error.name}, got an environment without it; pip install 'vardrop[{extra}]'",
            name=error.name,
        ) from error
