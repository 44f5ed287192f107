"""Every function that takes a model says so, where it is given something else."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import vardrop as vd


def _takers() -> dict[str, Callable[..., Any]]:
    """Public functions and classes with a ``model``; a method's own module is another matter."""
    named = {name: getattr(vd, name) for name in vd.__all__} | {
        f"sparsity.{name}": getattr(vd.sparsity, name) for name in vd.sparsity.__all__ if not hasattr(vd, name)
    }
    callables = {name: thing for name, thing in named.items() if callable(thing)}
    return {name: thing for name, thing in callables.items() if "model" in inspect.signature(thing).parameters}


TAKERS = _takers()


def _call(taker: Callable[..., Any], model: object) -> None:
    """With something in the place of every other argument that has no default."""
    given = {
        name: model if name == "model" else []
        for name, parameter in inspect.signature(taker).parameters.items()
        if name == "model" or parameter.default is parameter.empty
    }
    if "config" in given:
        given["config"] = vd.VariationalDropout()
    result = taker(**given)
    if hasattr(result, "__enter__"):
        with result:
            pass


def test_there_are_functions_that_take_a_model() -> None:
    assert {"convert_", "mc_predict", "sparsify_", "load_compressed", "ELBO", "sparsity.load_sparse"} <= set(TAKERS)
    assert len(TAKERS) > 20


@pytest.mark.parametrize("name", sorted(TAKERS))
@pytest.mark.parametrize("model", ["net.pt", None, 3])
def test_what_is_no_model_is_refused_with_words(name: str, model: object) -> None:
    short = name.rpartition(".")[2]
    with pytest.raises(TypeError, match=rf"vardrop.*{short}.*model must be a torch.nn.Module.*got"):
        _call(TAKERS[name], model)


def test_a_class_in_place_of_a_network_is_to_be_called() -> None:
    with pytest.raises(TypeError, match=r"vardrop.sparsify_: model must be .*, got type \(Linear: call it\)"):
        vd.sparsify_(nn.Linear)  # type: ignore[arg-type]


def test_a_file_and_a_model_the_wrong_way_round() -> None:
    with pytest.raises(TypeError, match=r"vardrop.load_compressed\(path, model\): model must be .*, got str"):
        vd.load_compressed(nn.Linear(2, 2), "net.vdc")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"vardrop.save_compressed\(model, path\): model must be .*, got str"):
        vd.save_compressed("net.vdc", nn.Linear(2, 2))  # type: ignore[arg-type]


@pytest.mark.parametrize("example", [None, 3, "x", {"x": torch.zeros(1, 2)}])
def test_arguments_of_a_model_are_a_tensor_or_a_tuple(example: object) -> None:
    with pytest.raises(TypeError, match=r"vardrop.compact: example_input must be a tensor, or all .* in a tuple, got"):
        vd.compact(nn.Linear(2, 2), example)  # type: ignore[arg-type]
    assert vd.compact(nn.Linear(2, 2), [torch.zeros(1, 2)])(torch.zeros(1, 2)).shape == (1, 2)
