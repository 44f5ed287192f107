"""One network of a run in one file for other programs, checked, with its size."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vardrop.evaluation.output import make_ready
from vardrop.evaluation.runs import OpenRun
from vardrop.optional import needed
from vardrop.pruning.network_file import beside, float32_bytes, load_network, write_network
from vardrop.pruning.writing import about
from vardrop.sparsity.compact import INFERENCE_MULTIPLE, compact, plain_copy
from vardrop.sparsity.export import export_onnx
from vardrop.training.folder import CHECKPOINT, EXAMPLES, MODEL

ENDINGS = {"onnx": ".onnx", "safetensors": ".safetensors", "compressed": ".vdc"}
_NEEDS = {
    "onnx": (("onnx", "export"), ("onnxscript", "export"), ("onnxruntime", "export")),
    "safetensors": (("safetensors", "export"),),
    "compressed": (("numpy", "compress"), ("zstandard", "compress")),
}
TOLERANCE = 1e-3  # of the largest output: another runtime adds up in another order
ROWS = 256  # that outputs are compared on


class Exported(NamedTuple):
    """A file that was written.

    Attributes:
        path: of it.
        also: the architecture beside it, for formats that need one.
        bytes: of the file.
        dense: of the run's network in float32.
        parameters: of the run's network, and of what was written.
        difference: the largest difference of outputs to those of the run's network, over ``rows`` rows.
        largest: the largest output.
        rows: how many examples were compared.
        zeros: weights that are zero, of the run's network.
    """

    path: Path
    also: Path | None
    bytes: int
    dense: int
    parameters: tuple[int, int]
    difference: float
    largest: float
    rows: int
    zeros: int


def check_format(form: str) -> None:
    """Refuse a format that there is none of, or whose packages are missing.

    Raises:
        ValueError: if there is no such format.
        ModuleNotFoundError: if a package is missing.
    """
    if form not in ENDINGS:
        raise ValueError(f"vardrop.export: --format must be one of {', '.join(ENDINGS)}, got {form!r}; choose one")
    for module, extra in _NEEDS[form]:
        needed(module, "export", extra)


def place(run: OpenRun, form: str, out: Path | None, small: bool) -> Path:
    """Where the file goes: to ``out``, or into the folder of the run.

    Raises:
        ValueError: if the name ends as that of another format, or is that of the run's own model.
        OSError: if nothing can be written there.
    """
    path = out or run.path / f"{'compact' if small else 'network'}{ENDINGS[form]}"
    if path.suffix != ENDINGS[form]:
        raise ValueError(
            f"vardrop.export: --out of the format {form} must end in {ENDINGS[form]}, got {path}; rename it"
        )
    if path.is_dir():
        raise ValueError(f"vardrop.export: --out must be a file, got the folder {path}; name a file in it")
    if path.parent.resolve() == run.path.resolve() and path.name in (MODEL, EXAMPLES, CHECKPOINT):
        raise ValueError(f"vardrop.export: --out must leave the run's own files alone, got {path}; choose another name")
    make_ready(path.parent)
    return path


def export(run: OpenRun, form: str, path: Path, small: bool) -> Exported:
    """Write the network of a run, read it back, and compare what both say.

    Args:
        run: any run.
        form: ``"onnx"`` (in single precision), ``"safetensors"`` or ``"compressed"``.
        path: of the file, which is replaced in one go.
        small: whether to take out what has no function first.

    Raises:
        RuntimeError: if what was written says something else; it is not kept then.
        ModuleNotFoundError: if a package of the format is missing.
    """
    dense = plain_copy(run.task.network)
    kind = next(dense.parameters()).dtype
    x = run.data.test_x[:ROWS].to(kind)
    with torch.no_grad():
        wanted = dense(x)
    multiple = INFERENCE_MULTIPLE if form == "onnx" else 1
    network = compact(dense, x[:2], round_to=multiple) if small else dense
    draft = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if form == "onnx":
            x32 = x.float()  # of double precision onnxruntime has no convolutions
            export_onnx(network.float(), x32[:2], draft, {"vardrop": json.dumps(about(run))})
            outputs = _by_onnxruntime(draft, x32)
        else:
            write_network(network, draft, form, about(run))
            with torch.no_grad():
                outputs = load_network(draft)(x)
        difference, largest = float((outputs - wanted).abs().max()), float(wanted.abs().max())
        if not difference <= TOLERANCE * max(largest, 1e-30):
            raise RuntimeError(
                f"vardrop.export: the file must say what the network says, got outputs that differ by {difference:.2g} "
                f"where the largest is {largest:.2g}; it was not kept, please report the run"
            )
        also = None
        if form != "onnx":
            also = beside(path)
            beside(draft).replace(also)
        draft.replace(path)
    finally:
        for left in (draft, beside(draft)):
            left.unlink(missing_ok=True)
    zeros = sum(int((p == 0).sum()) for p in dense.parameters() if p.ndim > 1)
    numbers = tuple(sum(p.numel() for p in each.parameters()) for each in (dense, network))
    size = path.stat().st_size
    return Exported(path, also, size, float32_bytes(dense), numbers, difference, largest, len(x), zeros)  # type: ignore[arg-type]


def _by_onnxruntime(path: Path, x: Tensor) -> Tensor:
    """The outputs of an ONNX file."""
    runtime: Any = needed("onnxruntime", "export", "export")
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    (outputs,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(outputs)
