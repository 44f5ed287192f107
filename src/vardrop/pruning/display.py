"""What a person sees while a run is pruned: a bar on standard error, where that is a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class Steps:
    """One bar for every long step, one after the other; nothing at all if that is no terminal or it is not wanted.

    Args:
        wanted: whether to show bars.
    """

    def __init__(self, wanted: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not (wanted and console.is_terminal),
            transient=True,
        )
        self._task: Any = None

    def __enter__(self) -> Steps:
        self._progress.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._progress.stop()

    def begin(self, what: str, total: int | None) -> None:
        """A step that takes so many parts; None where nobody knows."""
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(what, total=total)

    def advance(self) -> None:
        """One part is done."""
        self._progress.advance(self._task)
