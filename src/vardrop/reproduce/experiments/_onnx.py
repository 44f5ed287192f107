"""Forward passes in onnxruntime, whose calls cost a tenth of torch's: what small networks take at a batch of one."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.optional import needed
from vardrop.sparsity.export import export_onnx


def forward(net: nn.Module, x: Tensor) -> Callable[[], list[Any]]:
    """A call that passes inputs through a network that was exported to ONNX, on as many threads as torch takes.

    Its threads do not spin while they wait: torch has threads of its own on the same cores, and whatever runs there
    between two calls would slow both.

    Args:
        net: any module that ``torch.export`` takes.
        x: its only input, ``[batch, ...]``, on the processor.

    Raises:
        ModuleNotFoundError: without onnx, onnxscript and onnxruntime (``pip install 'vardrop[export]'``).
    """
    runtime = needed("onnxruntime", "reproduce", "export")
    options = runtime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        export_onnx(net, x.new_zeros(2, *x.shape[1:]), path)
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    (node,) = session.get_inputs()
    return partial(session.run, None, {node.name: x.numpy()})
