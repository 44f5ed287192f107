"""Monte Carlo prediction: `vd.mc_predict` of T = 100 passes against a loop of T forwards of the same model.

The loop is plain torch: the model in training mode, so that its own dropouts draw, without gradients.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import vardrop as vd
from benchmarks.networks import cnn, mlp
from benchmarks.operators import importable_torchvision
from benchmarks.timing import Row, interleaved, summarise

PASSES = 100


class Recurrent(nn.Module):
    """Two LSTM layers with dropout between them, and a linear layer on the last step."""

    def __init__(self, width: int = 128) -> None:
        super().__init__()
        self.lstm = nn.LSTM(32, width, 2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def noisy_mlp(inputs: int = 784, width: int = 1000) -> nn.Module:
    """Dropout everywhere: 0.2 on the input, 0.5 on hidden units."""
    layers: list[nn.Module] = []
    for layer in mlp(inputs, width):
        layers += [nn.Dropout(0.5 if layers else 0.2), layer] if isinstance(layer, nn.Linear) else [layer]
    return nn.Sequential(*layers)


def noisy_head() -> nn.Module:
    """A convolutional network with dropout in front of its last layer only."""
    *body, last = cnn()
    return nn.Sequential(*body, nn.Dropout(0.5), last)


def encoder(width: int = 128) -> nn.Module:
    """Two layers of a transformer with dropout 0.1, and a linear layer on the mean of the tokens."""
    layer = nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.1, batch_first=True)
    layers = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d((1, None)), nn.Flatten(), nn.Linear(width, 10))


def converted_mlp(inputs: int = 784, width: int = 1000) -> nn.Module:
    """Every weight with a noise variance of its own."""
    net = mlp(inputs, width)
    vd.convert_(net, vd.VariationalDropout(type="B", sharing="weight"))
    return net


@dataclass(frozen=True)
class Case:
    """A model, its input, and what we want of the ratio."""

    name: str
    model: Callable[[], nn.Module]
    shape: tuple[int, ...]
    goal: float
    quick: bool = False


CASES = [
    Case("CNN, noise in its head, batch 100", noisy_head, (100, 3, 32, 32), 0.05),
    Case("CNN, noise in its head, batch 1", noisy_head, (1, 3, 32, 32), 0.15, quick=True),
    Case("MLP, noise everywhere, batch 100", noisy_mlp, (100, 784), 0.65),
    Case("MLP, noise everywhere, batch 1", noisy_mlp, (1, 784), 0.15, quick=True),
    Case("transformer encoder, batch 16", encoder, (16, 32, 128), 1.0),
    Case("transformer encoder, batch 1", encoder, (1, 32, 128), 1.0),
    Case("LSTM, batch 32", Recurrent, (32, 20, 32), 1.0),
    Case("LSTM, batch 16", Recurrent, (16, 20, 32), 1.0),
    Case("LSTM, batch 1", Recurrent, (1, 20, 32), 1.0),
    Case("MLP with random weights, batch 100", converted_mlp, (100, 784), 1.0),
]


def loop(model: nn.Module, x: Tensor) -> Tensor:
    """T forwards in training mode, stacked."""
    model.train()
    with torch.no_grad():
        passes = torch.stack([model(x) for _ in range(PASSES)])
    model.eval()
    return passes


def _baal(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    """Its module wrapper, which keeps what stands before the first dropout; the fastest of its forms."""
    importable_torchvision()
    from baal.bayesian import caching_utils  # noqa: F401 - older versions have no cache
    from baal.bayesian.dropout import MCDropoutModule
    from baal.modelwrapper import ModelWrapper, TrainingArgs

    wrapper = ModelWrapper(MCDropoutModule(model), TrainingArgs(use_cuda=False))
    return lambda: wrapper.predict_on_batch(x, iterations=PASSES)


def _torch_uncertainty(model: nn.Module, x: Tensor) -> Callable[[], Any]:
    importable_torchvision()
    mc = importlib.import_module("torch_uncertainty.methods.mc_dropout").mc_dropout(
        model, num_estimators=PASSES, on_batch=False
    )
    mc.eval()

    def run() -> Tensor:
        with torch.no_grad():
            return mc(x)

    return run


PEERS: dict[str, Callable[[nn.Module, Tensor], Callable[[], Any]]] = {
    "baal": _baal,
    "torch-uncertainty": _torch_uncertainty,
}


def measure(cases: list[Case], rounds: int, warmup: int) -> list[Row]:
    """A row for every case, and one for every peer that can be imported and runs it."""
    rows: list[Row] = []
    missing: dict[str, str] = {}
    for case in cases:
        model, x = case.model().eval(), torch.randn(case.shape)
        variants: dict[str, Callable[[], Any]] = {case.name: partial(vd.mc_predict, model, x, PASSES)}
        for peer, make in PEERS.items():
            try:
                run = make(case.model().eval(), x)
                run()
            except Exception as error:  # a peer that does not suit this torch may raise anything
                first = (str(error) or "no message").splitlines()[0]
                missing.setdefault(peer, f"cannot be used here: {type(error).__name__}: {first}")
            else:
                variants[f"{case.name}: {peer}"] = run
        how = vd.mc_predict(model, x, PASSES)
        notes = {case.name: f"{how.engine}, {how.chunk} at once"}
        for name, pairs in interleaved(variants, partial(loop, model, x), rounds, warmup).items():
            goal = case.goal if name == case.name else None
            rows.append(summarise("mc-predict", name, pairs, goal=goal, note=notes.get(name, "")))
    return rows + [Row("mc-predict", peer, note=reason) for peer, reason in missing.items()]
