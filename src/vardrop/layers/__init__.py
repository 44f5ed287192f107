"""Layers of activation noise, one family a file; the first argument is p, as in torch.nn."""

from vardrop.layers.base import Drop
from vardrop.layers.concrete import ConcreteDropout
from vardrop.layers.dropblock import DropBlock1d, DropBlock2d, DropBlock3d, drop_block
from vardrop.layers.dropout import Dropout, Dropout1d, Dropout2d, Dropout3d
from vardrop.layers.droppath import DropPath, drop_path, survival_rates
from vardrop.layers.fast import FastDropout
from vardrop.layers.gaussian import GaussianDropout
from vardrop.layers.layerdrop import LayerDrop, every_other
from vardrop.layers.moments import propagate_moments
from vardrop.layers.stochastic_depth import StochasticDepth
from vardrop.layers.structured import (
    AttentionDropout,
    DropConnect,
    HeadDropout,
    LockedDropout,
    ResidualDropout,
    TokenDropout,
)

__all__ = [
    "AttentionDropout",
    "ConcreteDropout",
    "Drop",
    "DropBlock1d",
    "DropBlock2d",
    "DropBlock3d",
    "DropConnect",
    "DropPath",
    "Dropout",
    "Dropout1d",
    "Dropout2d",
    "Dropout3d",
    "FastDropout",
    "GaussianDropout",
    "HeadDropout",
    "LayerDrop",
    "LockedDropout",
    "ResidualDropout",
    "StochasticDepth",
    "TokenDropout",
    "drop_block",
    "drop_path",
    "every_other",
    "propagate_moments",
    "survival_rates",
]
