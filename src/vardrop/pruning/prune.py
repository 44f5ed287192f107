"""From a trained run to a folder with a smaller network, and to the numbers that its page shows."""

from __future__ import annotations

import copy
import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import vardrop
from vardrop.data import split_validation
from vardrop.evaluation.runs import OpenRun
from vardrop.pruning.display import Steps
from vardrop.pruning.finetuning import learning_rate, train_on
from vardrop.pruning.goals import Goal, sparsify
from vardrop.pruning.sweep import Position, position, sweep, thresholds, with_chosen
from vardrop.sparsity.compact import compact
from vardrop.sparsity.compaction import Compaction
from vardrop.sparsity.compressed import compressed_size
from vardrop.sparsity.precision import quantize_to_noise
from vardrop.sparsity.sparsify import SparsityReport
from vardrop.training.evaluation import evaluate
from vardrop.training.guessing import notes as guessing
from vardrop.training.task import Task, measure

DIGITS = 8  # significant binary digits of biases, where weights are rounded
EXAMPLES = 2  # that the smaller network is traced with
_SEARCHED = 31  # networks that a search by error looks at, about


@dataclass(frozen=True)
class Options:
    """What is asked for beside the goal.

    Attributes:
        finetune_epochs: of training after the removal.
        finetune_lr: its learning rate; a tenth of the run's if None.
        quantize: whether to round weights to the digits that their noise pays for.
    """

    finetune_epochs: int = 0
    finetune_lr: float | None = None
    quantize: bool = False

    def __post_init__(self) -> None:
        if self.finetune_epochs < 0:
            raise ValueError(f"vardrop.prune: --finetune-epochs must be 0 or more, got {self.finetune_epochs}")
        if self.finetune_lr is not None and not 0 < self.finetune_lr < math.inf:
            raise ValueError(f"vardrop.prune: --finetune-lr must be positive and finite, got {self.finetune_lr}")
        if self.finetune_lr is not None and not self.finetune_epochs:
            raise ValueError(
                f"vardrop.prune: --finetune-lr needs epochs to go with, got {self.finetune_lr} for none; say "
                "--finetune-epochs"
            )


@dataclass
class Pruned:
    """What has become of a run.

    Attributes:
        task: the sparse network and its likelihood; it still has its noise.
        small: the compact network, whose ``compaction`` says what was done.
        report: of the removal.
        goal: what it went by.
        positions: other thresholds.
        tuning: a line for every epoch of fine-tuning.
        stages: name -> test scores, in the order of the work.
        validation: name of a stage -> error on validation rows, where there are any.
        notes: what else there is to know, in sentences.
    """

    task: Task
    small: nn.Module
    report: SparsityReport
    goal: Goal
    positions: list[Position]
    tuning: list[dict[str, Any]] = field(default_factory=list)
    stages: dict[str, dict[str, float]] = field(default_factory=dict)
    validation: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def compaction(self) -> Compaction:
        """What compaction did."""
        return self.small.compaction  # type: ignore[return-value]


def prune(run: OpenRun, goal: Goal, options: Options, steps: Steps) -> Pruned:
    """Remove weights, look at what other thresholds would leave, train on, round, compact, and test all of it.

    Choices are made on the validation rows that the run kept back. The test rows are looked at once, in the end, and
    decide nothing. The network of ``run`` is changed.

    Args:
        run: trained with learned noise.
        goal: how much is to go.
        options: what else is to happen.
        steps: where progress shows.

    Raises:
        ValueError: if the goal cannot be had; see :func:`vardrop.pruning.goals.sparsify`.
    """
    task = run.task
    dense = copy.deepcopy(task)
    held = run.validation()
    notes = [] if held else ["The run kept no validation rows, so there is no error for other thresholds."]
    validate = None if held is None else (lambda network: _mistake(Task(network, task.likelihood), *held))

    steps.begin("look for the threshold", _SEARCHED if goal.max_error_increase is not None else None)

    def counted(network: nn.Module) -> float:
        steps.advance()
        return validate(network)  # type: ignore[misc]

    report = sparsify(task.network, goal, run.config.method, None if validate is None else counted)
    notes += [*report.notes, *(f"{name} was left alone: it {reason}." for name, reason in report.skipped.items())]
    sized = _can_compress(notes)
    chosen = position(task.network, report.threshold, validate, sized, chosen=True)
    others, at = [], thresholds(dense.network)
    steps.begin("other thresholds", len(at))
    for other in sweep(dense.network, at, validate, sized):
        others.append(other)
        steps.advance()

    networks = {"dense": dense, "sparse": copy.deepcopy(task)}
    tuning = _tuned(run, options, held, steps, notes)
    if tuning:
        networks["fine-tuned"] = copy.deepcopy(task)
    if options.quantize:
        task.network = quantize_to_noise(task.network, other_digits=DIGITS)
        networks["rounded"] = copy.deepcopy(task)
    steps.begin("compact and test", len(networks) + 1)
    kind = next(task.parameters()).dtype
    small = compact(task.network, run.data.train_x[:EXAMPLES].to(kind))
    networks["compact"] = Task(small, task.likelihood)
    found = Pruned(task, small, report, goal, with_chosen(others, chosen), tuning, notes=notes)
    for name, each in networks.items():
        scores = evaluate(each, each, run.data.test_x.to(kind), run.data.test_y)
        found.stages[name] = {"nll": scores.nll, measure(run.data.task): scores.mistake}
        if held is not None:
            found.validation[name] = _mistake(each, *held)
        steps.advance()
    found.notes += guessing(run.data, found.stages["dense"][measure(run.data.task)], learned=True)
    return found


def _tuned(run: OpenRun, options: Options, held: Any, steps: Steps, notes: list[str]) -> list[dict[str, Any]]:
    """The lines of fine-tuning, none where none is wanted."""
    if not options.finetune_epochs:
        return []
    size = run.config.validation
    data = run.data if not size else split_validation(run.data, size if size < 1 else int(size), run.config.seed)[0]
    lr = learning_rate(run.config, options.finetune_lr)
    steps.begin("fine-tune", options.finetune_epochs)
    lines = []
    for line in train_on(run.task, data, held, run.config, options.finetune_epochs, lr):
        lines.append(line)
        steps.advance()
    if not any(line["kept"] for line in lines):
        notes.append("No epoch of fine-tuning was better on the validation rows, so the weights are those before it.")
    return lines


def _mistake(task: Task, x: Tensor, y: Tensor) -> float:
    """Error, or root mean squared error in the units of the target, on some rows."""
    return evaluate(task, task, x.to(next(task.parameters()).dtype), y).mistake


def _can_compress(notes: list[str]) -> bool:
    """Whether compressed files can be written here; a note if not."""
    try:
        compressed_size(nn.Linear(1, 1))
    except ModuleNotFoundError as error:
        notes.append(f"No compressed file was written: {str(error).removeprefix('vardrop.save_compressed: ')}.")
        return False
    return True


def result(run: OpenRun, pruned: Pruned, options: Options, command: str) -> dict[str, Any]:
    """Everything that was found, for ``prune.json``; sizes of layers and files are to be added.

    Args:
        run: what was pruned.
        pruned: what came out.
        options: as given.
        command: the command line.
    """
    best = next((line["epoch"] for line in reversed(pruned.tuning) if line["kept"]), None)
    lr = learning_rate(run.config, options.finetune_lr)
    return {
        "run": str(run.path),
        "data": run.data.name,
        "model": run.config.model,
        "method": run.config.method,
        "task": run.data.task,
        "measure": measure(run.data.task),
        "test_examples": len(run.data.test_x),
        "validation_examples": 0 if (held := run.validation()) is None else len(held[0]),
        "goal": {**vars(pruned.goal), "words": pruned.goal.words},
        "threshold": pruned.report.threshold,
        "weights": pruned.report.weights,
        "removed": pruned.report.removed,
        "layers_removed": [layer._asdict() for layer in pruned.report.layers],
        "test": pruned.stages,
        "validation": pruned.validation,
        "finetuning": {"epochs": len(pruned.tuning), "lr": lr, "best_epoch": best, "lines": pruned.tuning},
        "quantized": options.quantize,
        "compaction": {
            "parameters": list(pruned.compaction.parameters),
            "multiply_adds": [each // EXAMPLES for each in pruned.compaction.multiply_adds],
            "left": pruned.compaction.left,
        },
        "positions": [dataclasses.asdict(each) for each in pruned.positions],
        "notes": pruned.notes,
        "command": command,
        "versions": {"vardrop": vardrop.__version__, "torch": torch.__version__},
    }
