"""What users give: a model and its arguments, or else a refusal with words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn


def check_module(model: object, by: str) -> None:
    """Refuse what is no module.

    Args:
        model: what a user gave.
        by: the function that asks, for the message.

    Raises:
        TypeError: if it is something else.
    """
    if not isinstance(model, nn.Module):
        was = f" ({model.__name__}: call it)" if isinstance(model, type) and issubclass(model, nn.Module) else ""
        raise TypeError(f"vardrop.{by}: model must be a torch.nn.Module, got {type(model).__name__}{was}")


def as_arguments(example_input: object, by: str) -> tuple[Any, ...]:
    """All positional arguments of a model.

    Args:
        example_input: a tensor, or a sequence of all arguments.
        by: the function that asks, for the message.

    Raises:
        TypeError: if it is neither.
    """
    if isinstance(example_input, Tensor):
        return (example_input,)
    if isinstance(example_input, Sequence) and not isinstance(example_input, str):
        return tuple(example_input)
    raise TypeError(
        f"vardrop.{by}: example_input must be a tensor, or all positional arguments of the model in a tuple, got "
        f"{type(example_input).__name__}"
    )
