"""What compaction did to a network, and what it could not."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class Compaction:
    """What :func:`vardrop.compact` did; the attribute ``compaction`` of what it returns.

    Attributes:
        changed: name of the module -> before and after, as they print; ``"memory"`` -> the order of axes in memory.
        left: name of the module, or of an operation -> what could not be removed and why, in a sentence.
        parameters: how many there were, and are.
        multiply_adds: on the example input, before and after.
        kept: name of a changed layer with a weight -> indices of its outputs and of its inputs that are still there;
            without layers of streams that are in other coordinates.
    """

    changed: dict[str, tuple[str, str]] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    parameters: tuple[int, int] = (0, 0)
    multiply_adds: tuple[int, int] = (0, 0)
    kept: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def rename(self, names: dict[str, str]) -> None:
        """Tell of modules under other names."""
        self.changed = {names.get(name, name): value for name, value in self.changed.items()}
        self.left = {names.get(name, name): value for name, value in self.left.items()}
        self.kept = {names.get(name, name): value for name, value in self.kept.items()}

    def __str__(self) -> str:
        (before, after), (work, less) = self.parameters, self.multiply_adds
        lines = [f"parameters: {before:,} -> {after:,}", f"multiply-adds: {work:,} -> {less:,}"]
        lines += [f"  {name}: {old} -> {new}" for name, (old, new) in self.changed.items()]
        return "\n".join(lines + [f"left: {name}: {why}" for name, why in self.left.items()])
