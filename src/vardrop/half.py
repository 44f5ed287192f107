"""What half precision loses of a small step."""

from __future__ import annotations

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)


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
