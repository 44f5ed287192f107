"""What `keep_freed` does is seen in page faults, which the system counts."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vardrop.memory import keep_freed

FAULTS = """
import resource
import torch
from vardrop.memory import keep_freed

if {kept}:
    keep_freed()

def step():
    blocks = [torch.ones(1 << 18) for _ in range(8)]  # a megabyte each, as activations are: kept, then all freed
    return sum(block[0] for block in blocks)

for _ in range(5):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(kept: bool) -> int:
    settings = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    code = FAULTS.format(kept=kept)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings)
    return int(done.stdout)


@pytest.mark.skipif(
    "CS_GNU_LIBC_VERSION" not in getattr(os, "confstr_names", {}), reason="this system's C library is not glibc"
)
def test_freed_memory_is_not_faulted_in_again() -> None:
    """Eight megabytes are 2048 pages, at every step. Without it that is so in most processes, by chance of the heap."""
    assert any(faults(kept=False) > 10 * 1024 for _ in range(8))
    assert all(faults(kept=True) < 1024 for _ in range(2))


def test_whatever_mode_is_on_when_it_is_called_first() -> None:
    keep_freed.cache_clear()
    with torch.device("meta"):
        keep_freed()
    keep_freed.cache_clear()
    with FakeTensorMode():
        keep_freed()
    keep_freed.cache_clear()
    keep_freed()
