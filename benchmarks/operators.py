"""What peers need of torchvision, which misses operators on some CPU builds of torch."""

from __future__ import annotations

import contextlib
import importlib
import warnings

import torch

_DECLARED: list[torch.library.Library] = []  # definitions go when their library does


def importable_torchvision() -> None:
    """Declare the operators whose absence stops torchvision, and what imports it; nothing where it is not installed."""
    with warnings.catch_warnings(action="ignore"), contextlib.suppress(ImportError):
        try:
            importlib.import_module("torchvision")
        except RuntimeError:  # operator torchvision::nms does not exist
            library = torch.library.Library("torchvision", "FRAGMENT")
            for name in ("nms", "qnms"):
                library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
            _DECLARED.append(library)
