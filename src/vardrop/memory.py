"""What the C library does with memory that is freed and asked for again at every step."""

from __future__ import annotations

import functools

import torch

_LARGEST = (32 << 20) - (1 << 16)  # bytes: glibc learns from freed blocks of up to 32 MB, with its own words in them


@functools.cache
def keep_freed() -> None:
    """Have freed memory used again, not given back to the system; once in a process, before work in many equal steps.

    Each step frees what the next one asks for. glibc gives freed memory back from a size on that depends on the largest
    block freed so far, and then every page of it is faulted in again: that can be a third of the time of a step. So one
    block of the largest size that it learns from is asked for and freed here, and never touched. From then on up to
    64 MB stay; what a step holds beyond that is given back as before. Where the C library is another one this does
    nothing.

    Example:
        >>> from vardrop.memory import keep_freed
        >>> keep_freed()
    """
    torch.empty(_LARGEST, dtype=torch.uint8, device="cpu")
