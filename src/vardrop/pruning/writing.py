"""The files of a pruned run: a run like others, the compact network, and what was found."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch

from vardrop.evaluation.runs import OpenRun
from vardrop.objective import kl_divergence
from vardrop.pruning.folder import COMPACT, RESULT
from vardrop.pruning.layers import layer_rows
from vardrop.pruning.network_file import beside, float32_bytes, write_network
from vardrop.pruning.prune import EXAMPLES as TRACED
from vardrop.pruning.prune import Pruned
from vardrop.sparsity.compressed import compressed_size
from vardrop.sparsity.export import save_sparse
from vardrop.training.evaluation import rate_histograms, telling_examples
from vardrop.training.files import write_tensors
from vardrop.training.folder import CONFIG, EXAMPLES, METRICS, MODEL, SUMMARY
from vardrop.training.model_file import strip
from vardrop.training.task import Gaussian


def about(run: OpenRun) -> dict[str, Any]:
    """What someone who has only the network needs to know of its inputs and outputs."""
    data = run.data
    found: dict[str, Any] = {"input": list(data.shape), "data": data.name, "model": run.config.model}
    if data.scaling is not None:
        found["inputs"] = {"columns": list(data.columns[:-1]), **data.scaling.told()}
    if isinstance(run.task.likelihood, Gaussian):
        mean, std = float(run.task.likelihood.mean), float(run.task.likelihood.std)
        return found | {"target": {"mean": mean, "std": std, "is": "mean + std * output"}}
    return found | {"classes": list(data.classes)}


def write_run(run: OpenRun, pruned: Pruned, folder: Path) -> None:
    """The sparse network as a run that ``vardrop evaluate``, ``predict``, ``report`` and ``export`` open.

    Args:
        run: what was pruned.
        pruned: what came out.
        folder: to write into.
    """
    config = dataclasses.asdict(run.config)
    task, kind = pruned.task, next(pruned.task.parameters()).dtype
    (folder / CONFIG).write_text(run.config.to_json(), encoding="utf-8")
    if (run.path / METRICS).is_file():
        shutil.copyfile(run.path / METRICS, folder / METRICS)
    write_tensors(folder / MODEL, strip(task.state_dict()), {"config": config, "digest": run.data.digest})
    telling = telling_examples(
        task, run.data.test_x.to(kind), run.data.test_y, run.data.images, seed=run.config.seed
    )  # fmt: skip
    write_tensors(folder / EXAMPLES, telling, {"classes": run.data.classes})
    summary = json.loads((run.path / SUMMARY).read_text(encoding="utf-8"))
    last = pruned.stages[list(pruned.stages)[-2]]  # of the sparse network, which the compact one only repeats
    with torch.no_grad():
        kl = kl_divergence(task.network).item()
    summary |= {f"test_{name}": value for name, value in last.items()}
    summary |= {"kl": kl if math.isfinite(kl) else None, "rates": rate_histograms(task.network)}
    summary["pruned"] = {"run": str(run.path), "removed": pruned.report.removed, "weights": pruned.report.weights}
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1), encoding="utf-8")


def write_networks(run: OpenRun, pruned: Pruned, folder: Path) -> dict[str, Any]:
    """The compact network in every format that can be written here.

    Args:
        run: what was pruned.
        pruned: what came out.
        folder: to write into.

    Returns:
        ``layers`` of :func:`vardrop.pruning.layers.layer_rows`, ``files`` (bytes by name, architectures with them),
        and ``bytes`` of the networks before and after in each format.
    """
    sized = pruned.positions[0].bytes is not None
    for form, name in COMPACT.items():
        if form != "compressed" or sized:
            write_network(pruned.small, folder / name, form, about(run))
    whole = folder / ".whole.safetensors"
    save_sparse(pruned.task.network, whole)
    size = compressed_size(pruned.task.network) if sized else None
    kind = next(pruned.task.parameters()).dtype
    x = run.data.train_x[:TRACED].to(kind)
    rows = layer_rows(pruned.task.network, pruned.small, x, whole, size.tensors if size else None)
    csr = whole.stat().st_size
    whole.unlink()
    files = {name: folder / name for name in COMPACT.values() if (folder / name).is_file()}
    return {
        "layers": rows,
        "files": {path.name: path.stat().st_size for file in files.values() for path in (file, beside(file))},
        "bytes": {
            "dense": {"float32": float32_bytes(pruned.task.network)},
            "sparse": {"csr": csr, "compressed": size.bytes if size else None},
            "compact": {
                "float32": float32_bytes(pruned.small),
                "csr": files[COMPACT["safetensors"]].stat().st_size,
                "compressed": files[COMPACT["compressed"]].stat().st_size if sized else None,
            },
        },
    }


def write_result(found: dict[str, Any], folder: Path) -> None:
    """``prune.json``."""
    (folder / RESULT).write_text(json.dumps(found, indent=1, allow_nan=False), encoding="utf-8")


def first_layer(run: OpenRun, pruned: Pruned) -> dict[str, Any]:
    """What the page draws of the first layer: its inputs as pixels or columns, or its filters."""
    weight = next(p for p in pruned.task.network.parameters() if p.ndim > 1).detach()
    if weight.ndim > 2:
        return {"kind": "filters", "weights": [[row.tolist() for row in each] for each in weight.float()]}
    if run.data.images:
        return {"kind": "pixels", "shape": list(run.data.shape)}
    return {"kind": "columns", "shape": list(run.data.shape)}
