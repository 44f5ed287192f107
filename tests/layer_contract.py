"""One list of the layers of activation noise, a line for each, and how to make and feed them.

A new layer is one line in ``LAYERS``; `test_layer_contract.py` has what is asked of all of them.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vardrop import layers
from vardrop.rates import Rate, Rated


@dataclass(frozen=True)
class Layer:
    """A layer that multiplies its input with noise of mean 1.

    Attributes:
        name: in the names of tests.
        make: rate -> layer.
        shape: of an input.
        shared: axes along which a draw is shared.
        dependent: axes along which draws depend on each other; along all others they are independent.
        call: how the layer is called, if not with its input alone.
        gaussian: whether the noise is Gaussian: then p = 1 is refused.
        silent: whether nothing is drawn at rate 0.
    """

    name: str
    make: Callable[[Rate], Rated]
    shape: tuple[int, ...]
    shared: tuple[int, ...] = ()
    dependent: tuple[int, ...] = ()
    call: Callable[..., Tensor] | None = None
    gaussian: bool = False
    silent: bool = True

    def __repr__(self) -> str:
        return self.name

    def run(self, module: nn.Module, x: Tensor, generator: torch.Generator | None = None) -> Tensor:
        extra = {} if generator is None else {"generator": generator}
        return module(x, **extra) if self.call is None else self.call(module, x, **extra)


def _with_all_words(module: nn.Module, x: Tensor, **extra: torch.Generator) -> Tensor:
    """Every word once in a sequence: then draws by word type are draws by position."""
    return module(x, torch.arange(x.shape[-2], device=x.device).expand(x.shape[:-1]), **extra)


def _with_residual(module: nn.Module, x: Tensor, **extra: torch.Generator) -> Tensor:
    return module(x, torch.zeros_like(x), **extra)


LAYERS = [
    Layer("dropout", layers.Dropout, (6, 5, 4)),
    Layer("dropout1d", layers.Dropout1d, (6, 5, 4), (2,)),
    Layer("dropout1d-unbatched", layers.Dropout1d, (30, 4), (1,)),
    Layer("dropout2d", layers.Dropout2d, (6, 5, 3, 2), (2, 3)),
    Layer("dropout2d-unbatched", layers.Dropout2d, (30, 3, 2), (1, 2)),
    Layer("dropout3d", layers.Dropout3d, (6, 5, 2, 3, 2), (2, 3, 4)),
    Layer("gaussian", layers.GaussianDropout, (6, 5, 4), gaussian=True),
    Layer("gaussian-channels", lambda p: layers.GaussianDropout(p, shared=(2, 3)), (6, 5, 3, 2), (2, 3), gaussian=True),
    Layer("token", layers.TokenDropout, (6, 5, 4), (2,)),
    Layer("token-by-type", lambda p: layers.TokenDropout(p, num_types=8), (6, 5, 4), (2,), call=_with_all_words),
    Layer("locked", layers.LockedDropout, (6, 3, 5), (1,)),
    Layer("locked-time-first", lambda p: layers.LockedDropout(p, dim=0), (3, 6, 5), (0,)),
    Layer("attention", layers.AttentionDropout, (3, 2, 5, 4)),
    Layer("head", layers.HeadDropout, (6, 5, 3, 2), (2, 3)),
    Layer("head-last", lambda p: layers.HeadDropout(p, dim=-2), (6, 3, 5, 2), (1, 3)),
    Layer("drop-path", layers.DropPath, (30, 4, 3), (1, 2), silent=False),
    Layer("drop-block1d", lambda p: layers.DropBlock1d(p, 3), (6, 5, 7), dependent=(2,), silent=False),
    Layer("drop-block2d", lambda p: layers.DropBlock2d(p, 3), (6, 5, 5, 4), dependent=(2, 3), silent=False),
    Layer("drop-block3d", lambda p: layers.DropBlock3d(p, 2), (6, 5, 3, 2, 3), dependent=(2, 3, 4), silent=False),
    Layer("residual", layers.ResidualDropout, (6, 5, 4), call=_with_residual),
]


def copies(module: nn.Module, fresh: nn.Module) -> Iterator[nn.Module]:
    """A module by deepcopy, pickle, a file, and as the state of a fresh one."""
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    fresh.load_state_dict(module.state_dict())
    yield copy.deepcopy(module)
    yield pickle.loads(pickle.dumps(module))
    yield torch.load(file, weights_only=False)
    yield fresh
