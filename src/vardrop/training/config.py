"""Everything that decides how a run goes, as one frozen dataclass that lands in ``config.json``."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vardrop.methods import METHODS
from vardrop.weights.estimators import NAMES as ESTIMATORS

ACCELERATORS = ("cpu", "gpu", "cuda", "mps", "auto")
STRATEGIES = ("auto", "ddp", "fsdp2")
PRECISIONS = ("32-true", "64-true", "bf16-mixed", "16-mixed")
# On resuming: none of these changes the steps already taken, and where they were taken does not matter to the next.
MAY_CHANGE = frozenset({"epochs", "tensorboard", "data_dir", "accelerator", "devices", "strategy"})


@dataclass(frozen=True)
class Config:
    """A training run, from the data to the device.

    Args:
        data: name of a data set, or the path of a CSV file; see :func:`vardrop.data.load`.
        model: the network, for example ``"mlp:3x400"``; see :func:`vardrop.models.build`.
        method: how it drops, for example ``"vd-a2"``; see :data:`vardrop.methods.METHODS`.
        sharing: one rate per ``"layer"``, ``"neuron"`` or ``"weight"``; None for the method's own choice.
        estimator: how gradients are estimated; see :class:`vardrop.estimator`.
        epochs: passes over the training examples, at most.
        batch_size: examples of one step, over all devices together.
        lr: learning rate of Adam.
        lr_decay: the last part of the epochs over which the learning rate falls linearly to zero, in [0, 1]; 0 for
            none.
        start: folder of a finished run of the same network, with whichever method, whose weights this one starts from;
            None to start from scratch.
        seed: of the initial weights, the noise, the order of the examples and the validation split.
        validation: examples kept back to choose the epoch: a fraction below 1, or a number; 0 for none.
        patience: epochs without a better validation error before training ends; 0 never ends early.
        average: decay of the average over the weights of all steps, in [0, 1); 0 for none.
        warmup: epochs over which the weight of the KL grows linearly to its full size; None for the method's own
            choice. No epoch before its end is held to be the best, or ends training.
        kl_scale: the weight of the KL in the objective; None for the method's own choice. Below 1 it holds the noise
            back: with hundreds of weights for every example the KL outweighs the data.
        split: which of the predefined train and test splits, where a data set has several.
        accelerator: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"mps"`` or ``"auto"``.
        devices: how many; under torchrun its number of processes counts.
        strategy: ``"auto"``, ``"ddp"``, or ``"fsdp2"``, which shards the parameters.
        precision: of Lightning Fabric, for example ``"32-true"`` or ``"bf16-mixed"``.
        tensorboard: whether to write TensorBoard scalars too.
        data_dir: where to look for data sets first.

    Raises:
        ValueError: for values outside those above.

    Example:
        >>> from vardrop.training import Config
        >>> Config(data="digits", method="vd-b", epochs=20).epochs
        20
    """

    data: str = "digits"
    model: str = "mlp:3x400"
    method: str = "vd-a2"
    sharing: str | None = None
    estimator: str = "local"
    epochs: int = 100
    batch_size: int = 128
    lr: float = 1e-3
    lr_decay: float = 0.0
    start: str | None = None
    seed: int = 0
    validation: float = 0.1
    patience: int = 20
    average: float = 0.999
    warmup: int | None = None
    kl_scale: float | None = None
    split: int = 0
    accelerator: str = "cpu"
    devices: int = 1
    strategy: str = "auto"
    precision: str = "32-true"
    tensorboard: bool = False
    data_dir: str | None = None

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "devices"):
            self._require(getattr(self, name) >= 1, name, "at least 1")
        for name in ("seed", "patience", "warmup", "split"):
            value = getattr(self, name)
            self._require(value is None or value >= 0, name, "0 or more")
        self._require(0 < self.lr < math.inf, "lr", "positive and finite")
        whole = self.validation == int(self.validation) if math.isfinite(self.validation) else False
        self._require(
            0 <= self.validation < 1 or (self.validation > 0 and whole), "validation", "a fraction below 1 or a number"
        )
        self._require(0 <= self.average < 1, "average", "at least 0 and below 1")
        self._require(0 <= self.lr_decay <= 1, "lr_decay", "at least 0 and at most 1")
        if self.kl_scale is not None:
            self._require(0 <= self.kl_scale < math.inf, "kl_scale", "0 or more, and finite")
            if self.method in METHODS and not METHODS[self.method].learns:
                learning = ", ".join(name for name, method in METHODS.items() if method.learns)
                words = f"left out but with the methods that learn noise ({learning}), with {self.method}"
                self._require(False, "kl_scale", words)
        choices = {
            "estimator": ESTIMATORS, "accelerator": ACCELERATORS, "strategy": STRATEGIES, "precision": PRECISIONS
        }  # fmt: skip
        for name, allowed in choices.items():
            self._require(getattr(self, name) in allowed, name, f"one of {', '.join(allowed)}")

    def _require(self, condition: bool, name: str, words: str) -> None:
        if not condition:
            raise ValueError(f"vardrop.training.Config: {name} must be {words}, got {getattr(self, name)!r}")

    def lr_factor(self, epoch: float) -> float:
        """What the learning rate is multiplied with when so many epochs are over."""
        return min(1.0, (1 - epoch / self.epochs) / self.lr_decay) if self.lr_decay else 1.0

    @property
    def warmup_epochs(self) -> int:
        """The warm-up that is asked for, or the method's own."""
        method = METHODS.get(self.method)
        return self.warmup if self.warmup is not None else method.warmup if method else 0

    @property
    def kl_weight(self) -> float:
        """The weight of the KL that is asked for, or the method's own."""
        return METHODS[self.method].kl_scale if self.kl_scale is None else self.kl_scale

    def to_json(self) -> str:
        """All fields, readable."""
        return json.dumps(dataclasses.asdict(self), indent=2)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Config:
        """The config with these fields; another version's unknown fields are an error."""
        unknown = sorted(set(values) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise ValueError(
                f"vardrop.training.Config: knows no option {', '.join(unknown)}; was it written by another version?"
            )
        return cls(**values)

    @classmethod
    def read(cls, path: Path) -> Config:
        """The config in a ``config.json``."""
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"vardrop.training.Config: {path} is not valid JSON ({error})") from error
        if not isinstance(values, dict):
            raise ValueError(f"vardrop.training.Config: {path} must hold an object with the options, got {values!r}")
        return cls.from_dict(values)

    def difference(self, other: Config) -> str:
        """The options in which another run cannot go on from this one, in words; empty if there are none."""
        free = MAY_CHANGE - {"epochs"} if self.lr_decay else MAY_CHANGE  # the decay goes by their number
        fields = [field.name for field in dataclasses.fields(self) if field.name not in free]
        return ", ".join(
            f"{name} {getattr(self, name)!r} there and {getattr(other, name)!r} here"
            for name in fields
            if getattr(self, name) != getattr(other, name)
        )
