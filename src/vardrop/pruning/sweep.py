"""What every threshold would leave: weights in every layer, the error on validation rows, bytes of the file."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import nn

from vardrop.pruning.goals import lowest
from vardrop.sparsity.compressed import compressed_size
from vardrop.sparsity.ranking import Order, groups_of
from vardrop.sparsity.search import remove
from vardrop.weights.modules import noisy_weights

AT_MOST = 40  # positions of a slider
_STEPS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 5.0, 10.0, 20.0)


@dataclass(frozen=True)
class Position:
    """A threshold and what it leaves.

    Attributes:
        threshold: log α above which everything is removed.
        kept: weights that are left in every layer.
        error: on validation rows, without fine-tuning; None if there are none.
        bytes: of the compressed file, without rounding; None without zstandard.
        inputs: weights of the first layer that are left at each of its inputs.
        chosen: whether it is the one that was asked for.
    """

    threshold: float
    kept: list[int]
    error: float | None
    bytes: int | None
    inputs: list[int]
    chosen: bool = False


def thresholds(network: nn.Module) -> list[float]:
    """Round numbers from the largest log α of a network down to where a layer would lose all of its weights."""
    groups, _ = groups_of(network)
    order = Order(groups)
    low, high = lowest(order), order.largest
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        return []
    step = next((step for step in _STEPS if (high - low) / step <= AT_MOST), (high - low) / AT_MOST)
    return [round(step * i, 6) for i in range(math.ceil(high / step), math.ceil(low / step) - 1, -1)]


def sweep(
    network: nn.Module, at: list[float], validate: Callable[[nn.Module], float] | None, sized: bool
) -> Iterator[Position]:
    """Remove more and more of a copy of a network, and look at it on the way.

    Args:
        network: converted, in evaluation mode; it is not changed.
        at: thresholds, falling.
        validate: error on validation rows, if there are any.
        sized: whether to measure compressed files.
    """
    less = copy.deepcopy(network)
    groups, _ = groups_of(less)
    order = Order(groups)
    for threshold in at:
        remove(groups, order.masks(order.above(threshold)))
        yield position(less, threshold, validate, sized)


def position(
    network: nn.Module,
    threshold: float,
    validate: Callable[[nn.Module], float] | None,
    sized: bool,
    chosen: bool = False,
) -> Position:
    """A network as it is, as a position."""
    means = [weight.mean.detach() for weight in noisy_weights(network) if weight.config.learned]
    inputs = (means[0] != 0).flatten(1).sum(0).tolist()
    return Position(
        threshold=threshold,
        kept=[int((mean != 0).sum()) for mean in means],
        error=None if validate is None else validate(network),
        bytes=compressed_size(network).bytes if sized else None,
        inputs=inputs,
        chosen=chosen,
    )


def with_chosen(positions: list[Position], chosen: Position) -> list[Position]:
    """All positions by rising threshold, the one that was asked for in the place of its equal."""
    same = [math.isclose(each.threshold, chosen.threshold, abs_tol=1e-6) for each in positions]
    others = [each for each, is_same in zip(positions, same, strict=True) if not is_same or each.kept != chosen.kept]
    return sorted([*others, chosen], key=lambda each: (each.threshold, sum(each.kept)))
