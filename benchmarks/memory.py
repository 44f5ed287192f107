"""Peak memory of building a network and training it one step at M = 4096, each variant in a process of its own.

Counted is what the process holds at its peak above what it held before the network was built: parameters,
gradients and activations, not the data. ``python -m benchmarks.memory VARIANT`` measures one.
"""

from __future__ import annotations

import gc
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from benchmarks import peers
from benchmarks.networks import Workload, mlp
from benchmarks.timing import Pair, Row, summarise
from benchmarks.variants import OURS, REFERENCE, Variant

WORKLOAD = Workload(mlp, 4096, (784,))
_TINY = Workload(partial(mlp, inputs=8, width=8), 4, (8,))  # to have threads and kernels loaded before we count
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_HERE = Path(__file__).resolve().parent.parent


def _now_and_peak() -> tuple[int, int]:
    """Bytes that this process holds now, and has held at most."""
    if _STATUS.exists():
        kib = dict(re.findall(r"(VmRSS|VmHWM):\s+(\d+) kB", _STATUS.read_text()))
        if len(kib) == 2:
            return int(kib["VmRSS"]) * 1024, int(kib["VmHWM"]) * 1024
    import resource  # not on every system

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak *= 1 if sys.platform == "darwin" else 1024
    return peak, peak


def peak_bytes(variant: Variant) -> int:
    """Peak of this process over two training steps, above what it is now. For a fresh process."""
    variant.step(_TINY)()
    data = WORKLOAD.data()
    gc.collect()
    if os.access(_CLEAR, os.W_OK):
        _CLEAR.write_text("5")  # Linux: forget the peak of the imports
    before, _ = _now_and_peak()
    step = variant.step_of(WORKLOAD.network(), *data)
    step()
    step()
    return _now_and_peak()[1] - before


def _named(name: str) -> Variant:
    for variant in (REFERENCE, *OURS):
        if variant.name == name:
            return variant
    return {variant.name: variant for variant in peers.find()[0]}[name]  # imported only where they are measured


def _in_a_process(name: str) -> int:
    # freed blocks of this size and more go back to the system at once, so that the peak is of live memory
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    command = [sys.executable, "-m", "benchmarks.memory", name]
    done = subprocess.run(command, cwd=_HERE, env=environment, capture_output=True, text=True)
    if done.returncode:
        last = (done.stderr.strip() or "no message").splitlines()[-1]
        raise RuntimeError(f"benchmarks: the process that measures the memory of {name!r} failed: {last}")
    return int(done.stdout)


def measure(variants: Sequence[Variant], rounds: int) -> list[Row]:
    """Every variant and the reference once in every round."""
    seen: dict[str, list[Pair]] = {v.name: [] for v in (REFERENCE, *variants)}
    for _ in range(rounds):
        reference = _in_a_process(REFERENCE.name)
        seen[REFERENCE.name].append(Pair(reference, reference))
        for variant in variants:
            seen[variant.name].append(Pair(_in_a_process(variant.name), reference))
    return [summarise("memory-4096", name, pairs, unit="bytes") for name, pairs in seen.items()]


if __name__ == "__main__":
    print(peak_bytes(_named(sys.argv[1])))
