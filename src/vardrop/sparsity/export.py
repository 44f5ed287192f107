"""Other formats: ONNX for what runs elsewhere, safetensors with sparse rows for what stays unstructured."""

from __future__ import annotations

import itertools
import json
import math
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.given import as_arguments, check_module
from vardrop.optional import needed
from vardrop.sparsity.compact import plain_copy
from vardrop.sparsity.compressed import plain_state

SPARSE = 0.5  # the part of a matrix that is zero from which on rows are kept sparse
PARTS = ("crow", "col", "value")


def save_sparse(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a model to safetensors, matrices with many zeros in compressed sparse rows (CSR).

    A weight of more than two axes is a matrix of its first axis against the others. A sparse weight ``name`` stands in
    the file as ``name.crow``, ``name.col`` (32 bits) and ``name.value``, its shape in the metadata, so that any reader
    of safetensors can use it. Noise is not kept.

    Args:
        model: any module.
        path: of the file.

    Raises:
        TypeError: if ``model`` is no module.

    Example:
        >>> import pathlib, tempfile, torch, vardrop as vd
        >>> layer, other = torch.nn.Linear(40, 3), torch.nn.Linear(40, 3)
        >>> with torch.no_grad():
        ...     layer.weight[:, 4:] = 0.0
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.safetensors"
        >>> vd.sparsity.save_sparse(layer, path)
        >>> vd.sparsity.load_sparse(path, other)
        >>> torch.equal(layer.weight, other.weight)
        True
    """
    check_module(model, "sparsity.save_sparse(model, path)")
    safetensors = needed("safetensors.torch", "sparsity.save_sparse", "export")
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, list[int]] = {}
    for name, value in plain_state(model).items():
        value = value.detach().cpu()
        zeros = 1 - float(torch.count_nonzero(value)) / max(1, value.numel())
        if value.ndim < 2 or zeros < SPARSE or not value.is_floating_point() or not value.numel():
            tensors[name] = value.clone().contiguous()
            continue
        rows = value.flatten(1)
        row, column = rows.nonzero(as_tuple=True)
        counts = torch.bincount(row, minlength=len(rows)).cumsum(0)
        tensors[f"{name}.crow"] = torch.cat([counts.new_zeros(1), counts]).to(torch.int32)
        tensors[f"{name}.col"] = column.to(torch.int32)
        tensors[f"{name}.value"] = rows[row, column].contiguous()
        shapes[name] = list(value.shape)
    Path(path).write_bytes(safetensors.save(tensors, metadata={"format": "pt", "csr": json.dumps(shapes)}))


def load_sparse(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Read a file of :func:`save_sparse` into a model of the same architecture, in place.

    Args:
        path: of the file.
        model: plain or converted (whose noise stays as it is).

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if the file is something else or of another model; the model is then as it was.
    """
    check_module(model, "sparsity.load_sparse(path, model)")
    safetensors = needed("safetensors", "sparsity.load_sparse", "export")
    try:
        with safetensors.safe_open(Path(path), framework="pt") as file:
            shapes: dict[str, list[int]] = json.loads((file.metadata() or {}).get("csr", "{}"))
            found: dict[str, Tensor] = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"vardrop.sparsity.load_sparse: needs a whole safetensors file, got {path} ({error}); write it again with "
            "vd.sparsity.save_sparse"
        ) from error
    for name, shape in shapes.items():
        crow, column, value = (found.pop(f"{name}.{part}") for part in PARTS)
        dense = value.new_zeros(shape[0], math.prod(shape[1:]))
        row = torch.repeat_interleave(torch.arange(shape[0]), crow.diff().long())
        dense[row, column.long()] = value
        found[name] = dense.view(shape)
    state = plain_state(model)
    different = sorted(
        name
        for name in found.keys() | state.keys()
        if name not in found or name not in state or found[name].shape != state[name].shape
    )
    if different:
        raise ValueError(
            f"vardrop.sparsity.load_sparse: the model must have the tensors that {path} has, of the same shapes, got "
            f"other ones for {', '.join(different[:5])}; build the model that was saved"
        )
    with torch.no_grad():
        for name, value in found.items():
            state[name].copy_(value)


def export_onnx(
    model: nn.Module,
    example_input: Tensor | Sequence[Any],
    path: str | os.PathLike[str],
    about: Mapping[str, str] | None = None,
) -> None:
    """Write a model to ONNX, in evaluation, for batches of any size.

    The file knows no order in memory: of a model whose channels are last it has the same graph as of any other.

    Args:
        model: any module that ``torch.export`` takes; a converted one is restored in a copy first.
        example_input: a tensor, or all positional arguments in a tuple; the first axis of each is the batch, of at
            least two examples.
        path: of the file.
        about: what to keep in the metadata of the file, such as the names of the classes.

    Raises:
        TypeError: if ``model`` is no module.
        ModuleNotFoundError: without onnx and onnxscript (``pip install 'vardrop[export]'``).
    """
    check_module(model, "sparsity.export_onnx")
    needed("onnx", "sparsity.export_onnx", "export")
    needed("onnxscript", "sparsity.export_onnx", "export")
    given = as_arguments(example_input, "sparsity.export_onnx")
    inputs = tuple(_in_order(x) if isinstance(x, Tensor) else x for x in given)
    plain = plain_copy(model)
    with torch.no_grad():
        for tensor in itertools.chain(plain.parameters(), plain.buffers()):
            tensor.set_(_in_order(tensor))  # type: ignore[call-overload]
    batch = torch.export.Dim("batch")
    shapes = tuple({0: batch} if isinstance(x, Tensor) and x.ndim else None for x in inputs)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*treespec", FutureWarning)  # torch's exporter about torch's trees
        program = torch.onnx.export(plain, inputs, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None  # noqa: S101 - of dynamo=True
    program.model.metadata_props.update(about or {})
    program.save(str(path))


def _in_order(x: Tensor) -> Tensor:
    """A copy with the last axis last in memory, which of a single channel ``contiguous()`` does not make."""
    return x.detach().clone(memory_format=torch.contiguous_format)
