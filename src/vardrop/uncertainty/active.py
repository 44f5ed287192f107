"""Active learning from a pool: fit, look at what is not labelled, have the most telling of it labelled, again."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TextIO

import torch
from torch import Tensor

from vardrop.uncertainty.acquisition import METHODS, acquire


@dataclass(frozen=True)
class Round:
    """One round of :class:`ActiveLearning`.

    Attributes:
        number: from 0, where the model has seen the initial labels only.
        labels: how many it was fitted to.
        score: what ``score`` said about it.
        chosen: pool indices that were labelled next, the most wanted first; none after the last round.
    """

    number: int
    labels: int
    score: float
    chosen: tuple[int, ...]


class ActiveLearning:
    """The loop of :func:`active_learning`: iterate over its rounds; interrupted, it goes on where it was.

    Attributes:
        history: the rounds so far.
    """

    def __init__(
        self,
        fit: Callable[[Tensor], Any],
        predict: Callable[[Any, Tensor], Any],
        score: Callable[[Any], float],
        *,
        pool: int,
        initial: Sequence[int] | Tensor,
        count: int,
        rounds: int,
        method: str = "bald",
        subset: int | None = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> None:
        start = tuple(int(i) for i in initial)
        if not start or len(set(start)) < len(start) or not all(0 <= i < pool for i in start):
            raise ValueError(
                f"vardrop.active_learning: initial must be different indices of the pool, 0 to {pool - 1}, at least "
                f"one, got {len(start)} of them, {len(set(start))} different; leave out the others"
            )
        if method not in METHODS:
            raise ValueError(f"vardrop.active_learning: method must be one of {', '.join(METHODS)}, got {method!r}")
        if count < 1 or rounds < 0 or len(start) + count * rounds > pool:
            raise ValueError(
                f"vardrop.active_learning: {rounds} rounds of {count} labels must fit into the pool of {pool}, "
                f"{len(start)} of which are labelled; ask for at least 1 label a round, and not more than there are"
            )
        if subset is not None and subset < count:
            raise ValueError(
                f"vardrop.active_learning: a subset of {subset} is too small to choose {count} cases from; make it "
                "larger, or None for all"
            )
        self.fit, self.predict, self.score = fit, predict, score
        self.rounds = rounds
        self.progress = progress
        self.history: list[Round] = []
        self._settings: dict[str, Any] = {
            "pool": pool, "initial": list(start), "count": count, "method": method, "subset": subset, "seed": seed,
        }  # fmt: skip

    @property
    def labelled(self) -> Tensor:
        """Pool indices that are labelled now, in the order in which they were."""
        return torch.tensor([*self._settings["initial"], *(i for done in self.history for i in done.chosen)])

    def __iter__(self) -> Iterator[Round]:
        bar = _Bar(self.progress, self.rounds + 1)
        while len(self.history) <= self.rounds:
            made = self._round(len(self.history))
            self.history.append(made)
            bar.show(made)
            yield made

    def _round(self, number: int) -> Round:
        """Everything random in a round, in the user's functions too, follows from the seed and its number."""
        settings, labelled = self._settings, self.labelled
        draws = torch.randint(2**62, (number + 1,), generator=torch.Generator().manual_seed(settings["seed"]))
        seed = int(draws[-1])
        devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            model = self.fit(labelled)
            value = float(self.score(model))
            chosen = self._choose(model, labelled, torch.Generator().manual_seed(seed)) if number < self.rounds else ()
        return Round(number, len(labelled), value, chosen)

    def _choose(self, model: Any, labelled: Tensor, generator: torch.Generator) -> tuple[int, ...]:
        settings = self._settings
        left = torch.ones(settings["pool"], dtype=torch.bool)
        left[labelled] = False
        candidates = left.nonzero().squeeze(1)
        candidates = candidates[torch.randperm(len(candidates), generator=generator)[: settings["subset"]]]
        if settings["method"] == "random":
            return tuple(candidates[: settings["count"]].tolist())
        said = self.predict(model, candidates)
        cases = said.shape[1] if isinstance(said, Tensor) and said.ndim > 1 else len(said)
        if cases != len(candidates):
            raise ValueError(
                f"vardrop.active_learning: predict must say something about every one of {len(candidates)} candidates, "
                f"got {cases}; return a Prediction of them, or probabilities [T, N, C]"
            )
        best = acquire(said, settings["count"], settings["method"], generator=generator)
        return tuple(candidates[best.cpu()].tolist())

    def state_dict(self) -> dict[str, Any]:
        """Settings and history, of numbers, strings, lists and dicts: ``json.dump`` takes it."""
        history = [{**asdict(made), "chosen": list(made.chosen)} for made in self.history]
        return {"settings": dict(self._settings), "history": history}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state; the number of rounds may be another.

        A last round that chose nothing, because it was to be the last, is fitted again if there are more to come.

        Raises:
            ValueError: if the state is that of other settings.
        """
        differ = [name for name, value in self._settings.items() if state["settings"].get(name) != value]
        if differ:
            raise ValueError(
                "vardrop.active_learning: the state must be that of the same settings, got others for "
                f"{', '.join(differ)}; start anew, or set them to {[state['settings'].get(name) for name in differ]}"
            )
        history = [Round(**{**made, "chosen": tuple(made["chosen"])}) for made in state["history"]]
        if history and not history[-1].chosen and len(history) <= self.rounds:
            history.pop()
        self.history = history


def active_learning(
    fit: Callable[[Tensor], Any],
    predict: Callable[[Any, Tensor], Any],
    score: Callable[[Any], float],
    *,
    pool: int,
    initial: Sequence[int] | Tensor,
    count: int,
    rounds: int,
    method: str = "bald",
    subset: int | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> ActiveLearning:
    """Active learning from a pool (Gal, Islam, Ghahramani 2017), as an iterator over its rounds.

    A round fits a model to what is labelled, scores it, lets it look at the rest, or at a random subset of it, and has
    the most telling cases labelled. There is one round more than labels are asked for: the last only fits and scores.

    The three functions run with torch's global generators set from ``seed`` and the number of the round, which are put
    back afterwards, so the same seed gives the same history, resumed or not.

    Args:
        fit: ``fit(labelled)`` -> model, from pool indices ``[n]``; from scratch, or going on with an older one.
        predict: ``predict(model, candidates)`` -> a Prediction of classes, or the probabilities of every pass
            ``[T, len(candidates), C]``. Not called for ``"random"``.
        score: ``score(model)`` -> a number for the history, such as the error on a test set.
        pool: how many cases there are; they are known by their indices.
        initial: indices that are labelled from the beginning.
        count: labels to ask for in a round.
        rounds: how often to ask.
        method: see :func:`vardrop.acquire`.
        subset: how many unlabelled cases to look at in a round, drawn at random; None for all.
        seed: of all that is random.
        progress: a bar on standard error; None for one on a terminal only.

    Returns:
        An :class:`ActiveLearning`: iterate over it, or ``list`` it. Its ``history`` has the rounds, and
        ``state_dict()`` and ``load_state_dict()`` carry it over an interruption.

    Raises:
        ValueError: for settings that contradict each other, or a ``predict`` that leaves cases out.

    Example:
        >>> import torch
        >>> x = torch.linspace(0, 1, 101)  # the label is x > 0.37; thresholds that separate the labelled are equal
        >>> def fit(labelled):
        ...     known = x[labelled]
        ...     return known[known < 0.37].max(), known[known > 0.37].min()
        >>> def predict(model, candidates):
        ...     low, high = model
        ...     passes = torch.linspace(low, high, 50)[:, None] < x[candidates]
        ...     return torch.stack([passes, ~passes], -1).float()
        >>> loop = active_learning(
        ...     fit, predict, lambda m: m[1] - m[0], pool=101, initial=[0, 100], count=1, rounds=5
        ... )
        >>> [round(made.score, 2) for made in loop]  # it asks in the middle
        [1.0, 0.51, 0.26, 0.13, 0.07, 0.03]
    """
    return ActiveLearning(
        fit, predict, score, pool=pool, initial=initial, count=count, rounds=rounds, method=method, subset=subset,
        seed=seed, progress=progress,
    )  # fmt: skip


class _Bar:
    """One line on standard error, so that the functions of a round may show bars of their own."""

    def __init__(self, wanted: bool | None, total: int, stream: TextIO | None = None) -> None:
        self.stream = stream or sys.stderr
        self.wanted = self.stream.isatty() if wanted is None else wanted
        self.total = total

    def show(self, made: Round) -> None:
        if not self.wanted:
            return
        done = made.number + 1
        bar = "━" * round(20 * done / self.total)
        told = f"\r{bar:<20} round {done}/{self.total} · {made.labels} labels · score {made.score:.4g}   "
        self.stream.write(told + ("\n" if done == self.total else ""))
        self.stream.flush()
