"""How much is to go: one goal, checked against the run before anything long begins."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from vardrop.methods import METHODS
from vardrop.sparsity.ranking import Order, groups_of
from vardrop.sparsity.sparsify import SparsityReport, sparsify_

THRESHOLD = 3.0  # log α: a dropout rate above 0.95
_UNBOUNDED = ("sparse-vd", "mean-field")
_LEARNERS = "sparse-vd learns a rate for every weight, without a bound"


@dataclass(frozen=True)
class Goal:
    """What to go by; one of the three, or none for the threshold of 3.

    Attributes:
        threshold: log α above which a weight goes.
        target_sparsity: which part of the weights goes, at least.
        max_error_increase: how much the error on validation rows may grow.
    """

    threshold: float | None = None
    target_sparsity: float | None = None
    max_error_increase: float | None = None

    def __post_init__(self) -> None:
        given = [f"--{name.replace('_', '-')} {value:g}" for name, value in vars(self).items() if value is not None]
        if len(given) > 1:
            raise ValueError(
                "vardrop.prune: one goal at a time, --threshold, --target-sparsity or --max-error-increase, got "
                f"{' and '.join(given)}; leave out all but one"
            )
        threshold, target, increase = self.threshold, self.target_sparsity, self.max_error_increase
        if threshold is not None and not math.isfinite(threshold):
            raise ValueError(f"vardrop.prune: --threshold must be a finite log alpha, got {threshold}; 3 is usual")
        if target is not None and not 0 < target < 1:
            raise ValueError(
                f"vardrop.prune: --target-sparsity must be a share above 0 and below 1, got {target}; 0.9 removes 90 %"
            )
        if increase is not None and not 0 <= increase < math.inf:
            raise ValueError(
                f"vardrop.prune: --max-error-increase must be 0 or more, got {increase}; 0.01 allows one mistake more "
                "in a hundred"
            )

    @property
    def words(self) -> str:
        """What was asked for."""
        if self.target_sparsity is not None:
            return f"a sparsity of at least {self.target_sparsity:g}"
        if self.max_error_increase is not None:
            return f"a validation error at most {self.max_error_increase:g} above that of the dense network"
        return f"a threshold of {self.limit:g} on log α"

    @property
    def limit(self) -> float:
        """The threshold, if that is the goal."""
        return THRESHOLD if self.threshold is None else self.threshold


def sparsify(
    network: nn.Module, goal: Goal, method: str, validate: Callable[[nn.Module], float] | None
) -> SparsityReport:
    """Remove what the goal asks for, in place, or refuse in words of the command line.

    Args:
        network: of a run.
        goal: what to go by.
        method: the run's, for what is said if its network has nothing to remove.
        validate: error on validation rows; None if the run kept none.

    Raises:
        ValueError: if nothing can go by this goal, or a layer would go as a whole. The network is then as it was.
    """
    groups, _ = groups_of(network)
    about = METHODS[method].summary if method in METHODS else method
    if not groups:
        raise ValueError(
            f"vardrop.prune: a run must have learned which weights it needs, got one of the method {method} ({about}), "
            f"which has no learned noise; {_LEARNERS}: train with --method sparse-vd"
        )
    if goal.max_error_increase is not None and validate is None:
        raise ValueError(
            "vardrop.prune: --max-error-increase needs the rows that training kept back, got a run with --validation "
            "0; go by --threshold or --target-sparsity"
        )
    order = Order(groups)
    if goal.max_error_increase is None:
        target = goal.target_sparsity
        count = order.above(goal.limit) if target is None else order.reaching(target)
        _check_something_goes(order, count, goal, method, about)
        _check_no_layer_goes(order, count, goal)
    report = sparsify_(
        network,
        threshold=goal.limit if goal.target_sparsity is None and goal.max_error_increase is None else None,
        target_sparsity=goal.target_sparsity,
        max_error_increase=goal.max_error_increase,
        validation=validate if goal.max_error_increase is not None else None,
    )
    if not report.removed:
        raise ValueError(
            f"vardrop.prune: nothing can be removed for a validation error at most {goal.max_error_increase:g} higher, "
            "got a larger one from the first weights on; allow more, or train longer"
        )
    return report


def _check_something_goes(order: Order, count: int, goal: Goal, method: str, about: str) -> None:
    if count > order.already:
        return
    if order.already and goal.target_sparsity is not None:
        raise ValueError(
            "vardrop.prune: --target-sparsity must be above what is zero already, "
            f"{order.sparsity(order.already):.4g}, got {goal.target_sparsity:g}; ask for more"
        )
    if order.already:
        raise ValueError(
            f"vardrop.prune: nothing more is above the threshold of {goal.limit:g}, got a run that is pruned already "
            f"(largest log alpha left: {order.largest:.3g}); lower --threshold"
        )
    told = f"got {order.largest:.3g} for the largest log alpha of a run of the method {method} ({about})"
    if method in _UNBOUNDED:
        raise ValueError(
            f"vardrop.prune: nothing is above the threshold of {goal.limit:g}, {told}; lower --threshold, or train "
            "longer after the warm-up"
        )
    raise ValueError(
        f"vardrop.prune: no weight was learned to be noise alone, {told}, not above {goal.limit:g}; {_LEARNERS}: train "
        "with --method sparse-vd, or say --target-sparsity to remove the noisiest weights all the same"
    )


def _check_no_layer_goes(order: Order, count: int, goal: Goal) -> None:
    emptied = order.emptied(count)
    if not emptied:
        return
    low, high = order.already, count
    while high - low > 1:  # emptied is monotone in the number that go
        middle = (low + high) // 2
        low, high = (low, middle) if order.emptied(middle) else (middle, high)
    names = " and ".join(emptied)
    if goal.target_sparsity is not None:
        raise ValueError(
            f"vardrop.prune: --target-sparsity must leave a weight in every layer, got {goal.target_sparsity:g}, which "
            f"empties {names}; at most {math.floor(1e4 * order.sparsity(low)) / 1e4:.4f} does not"
        )
    raise ValueError(
        f"vardrop.prune: --threshold must leave a weight in every layer, got {goal.limit:g}, which empties {names}; at "
        f"least {math.ceil(100 * lowest(order)) / 100:.2f} does not"
    )


def lowest(order: Order) -> float:
    """The lowest threshold at which every layer keeps a weight."""
    return max(float(each.log_alpha.min()) for each in order.groups)
