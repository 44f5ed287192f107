"""A bar for work that takes its time, where there is a terminal and rich to draw one."""

from __future__ import annotations

import sys
import time
from typing import Any

_PATIENCE = 1.0  # seconds before a bar that nobody asked for appears


class Bar:
    """Passes made so far. Without rich, or without a reason to show anything, it is silent.

    Args:
        wanted: True to show it at once, False for never, None for long work over several batches on a terminal.
        several: whether there are several batches.
        batches: the iterable, whose length is asked if it has one.
        samples: passes over each.
    """

    def __init__(self, wanted: bool | None, several: bool, batches: Any, samples: int) -> None:
        self.wanted = (several and sys.stderr.isatty()) if wanted is None else wanted
        self.delay = _PATIENCE if wanted is None else 0.0
        try:
            self.total: int | None = (len(batches) if several else 1) * samples
        except TypeError:  # a stream
            self.total = None
        self.done = 0
        self.start = 0.0
        self.bar: Any = None
        self.task: Any = None

    def __enter__(self) -> Bar:
        self.start = time.monotonic()
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.stop()

    def advance(self, passes: int) -> None:
        """So many passes more."""
        self.done += passes
        if not self.wanted:
            return
        if self.bar is None and time.monotonic() - self.start >= self.delay:
            self._show()
        if self.bar is not None:
            self.bar.update(self.task, completed=self.done)

    def _show(self) -> None:
        try:
            from rich.console import Console
            from rich.progress import Progress
        except ModuleNotFoundError:
            self.wanted = False
            return
        self.bar = Progress(console=Console(stderr=True), transient=True)
        self.task = self.bar.add_task("passes", total=self.total)
        self.bar.start()
