"""Derivatives of gradients: what functions with a gradient written by hand ask in their backward pass."""

from __future__ import annotations

import torch


def graph_wanted() -> bool:
    """Whether the gradients in the making are to be differentiated again, so that they need the plain formulas.

    Under ``torch.func`` that is always so. A compiler has no second derivatives, and traces the fast formulas.
    """
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()
