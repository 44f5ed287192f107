"""Types of numbers: what half precision loses of a small step, and where its digits do not do."""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn import functional as F

HALVES = (torch.float16, torch.bfloat16)


def real_type(x: Tensor) -> torch.dtype:
    """The type of x, or of its real part.

    Example:
        >>> import torch
        >>> from vardrop.half import real_type
        >>> real_type(torch.ones(2, dtype=torch.complex64))
        torch.float32
    """
    return x.real.dtype if x.is_complex() else x.dtype


def wide_type(x: Tensor) -> torch.dtype:
    """The type of a factor of x that keeps its digits: float32 for the half types.

    Example:
        >>> import torch
        >>> from vardrop.half import wide_type
        >>> wide_type(torch.ones(2, dtype=torch.float16)), wide_type(torch.ones(2, dtype=torch.complex128))
        (torch.float32, torch.float64)
    """
    return torch.float64 if real_type(x) == torch.float64 else torch.float32


def lost_step(x: Tensor) -> float:
    """The largest step that is lost to every entry: half of the gap between the smallest and the next number.

    Args:
        x: of any shape, with an entry at least.

    Example:
        >>> import torch
        >>> from vardrop.half import lost_step
        >>> x = torch.full((3,), -10.0, dtype=torch.bfloat16)
        >>> step = lost_step(x)
        >>> step, torch.equal(x + 0.9 * step, x), torch.equal(x + 1.1 * step, x)
        (0.03125, True, False)
    """
    size = float(x.detach().abs().min())
    up = torch.tensor(size, dtype=x.dtype)
    return (float(torch.nextafter(up, torch.full_like(up, torch.inf))) - float(up)) / 2


@functools.cache
def rms_norm_eps(dtype: torch.dtype) -> float:
    """The ε that torch's RMS norm takes where none is given: in half precision that of the type, or of float32.

    Torch's pages say the first, torch 2.13 does the second: so it is asked.

    Example:
        >>> import torch
        >>> from vardrop.half import rms_norm_eps
        >>> rms_norm_eps(torch.float64) == torch.finfo(torch.float64).eps
        True
    """
    x = torch.full((1,), 1e-4, dtype=dtype)
    found = float(F.rms_norm(x, [1]))
    choices = (torch.finfo(wide_type(x)).eps, torch.finfo(dtype).eps)
    return min(choices, key=lambda eps: abs(float(F.rms_norm(x, [1], eps=eps)) - found))
