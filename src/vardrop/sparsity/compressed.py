"""A network in a small file: positions and digits through a standard entropy coder, checked when it is read."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vardrop.given import check_module
from vardrop.sparsity.coding import decode, encode, pack, unpack
from vardrop.weights.modules import RandomWeights

MAGIC = b"vdc1"
DIGEST = 8  # bytes


@dataclass(frozen=True)
class CompressedSize:
    """How large a model is in a file of :func:`save_compressed`.

    Attributes:
        bytes: of the whole file.
        dense: of the same parameters and buffers in float32, without a header.
        tensors: name -> bytes; what is missing from the sum is the header.
    """

    bytes: int
    dense: int
    tensors: dict[str, int]

    @property
    def ratio(self) -> float:
        """How many times smaller the file is than float32."""
        return self.dense / self.bytes

    def __str__(self) -> str:
        return f"{self.bytes:,} bytes, {self.ratio:.1f} x smaller than {self.dense:,} bytes of float32"


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as it is once it is restored: means, without noise tensors."""
    noise = {
        f"{path}.{each.key}".lstrip(".")
        for path, module in model.named_modules(remove_duplicate=False)
        if isinstance(module, RandomWeights)
        for each in module.vardrop_noise.values()
    }
    return {name: value for name, value in model.state_dict().items() if name not in noise and torch.is_tensor(value)}


def _encoded(model: nn.Module) -> tuple[bytes, dict[str, int]]:
    """The whole file, and what each tensor takes of it."""
    entries: list[list[Any]] = []
    bodies: dict[str, bytes] = {}
    seen: dict[tuple[Any, ...], int] = {}
    for name, value in plain_state(model).items():
        same = (value.data_ptr(), tuple(value.shape), value.stride(), value.dtype) if value.numel() else (name,)
        if same in seen:  # tied
            layout, bodies[name] = f"={seen[same]}", b""
        else:
            seen[same] = len(entries)
            layout, bodies[name] = encode(value)
        entries.append([name, str(value.dtype).removeprefix("torch."), list(value.shape), layout])
    header = pack(json.dumps(entries, separators=(",", ":")).encode())
    content = header + b"".join(bodies.values())
    digest = hashlib.blake2b(content, digest_size=DIGEST).digest()
    return MAGIC + digest + content, {name: len(body) for name, body in bodies.items()}


def compressed_size(model: nn.Module) -> CompressedSize:
    """How large the file is that :func:`save_compressed` would write.

    Args:
        model: any module; a converted one counts as restored.

    Returns:
        Bytes in total and by tensor, and the ratio to float32.

    Raises:
        TypeError: if ``model`` is no module.

    Example:
        >>> import torch, vardrop as vd
        >>> layer = torch.nn.Linear(1000, 100)
        >>> with torch.no_grad():
        ...     layer.weight[torch.rand(100, 1000) > 0.01] = 0.0
        >>> vd.compressed_size(layer).ratio > 30
        True
    """
    check_module(model, "compressed_size")
    data, tensors = _encoded(model)
    dense = 4 * sum(value.numel() for value in plain_state(model).values())
    return CompressedSize(len(data), dense, tensors)


def save_compressed(model: nn.Module, path: str | os.PathLike[str]) -> CompressedSize:
    """Write the parameters and buffers of a model to a small file.

    Zeros cost next to nothing and neither do digits that :func:`vardrop.quantize_to_noise` has rounded away: for every
    tensor the shortest of several layouts is taken, each of them through zstandard. What is read back is equal, to the
    last bit, in the types that the model has. Noise is not kept: what a converted model says in evaluation is.

    Args:
        model: any module.
        path: of the file, which is replaced in one go.

    Returns:
        Its size, as :func:`vardrop.compressed_size` has it.

    Raises:
        TypeError: if ``model`` is no module.
        ModuleNotFoundError: without NumPy and zstandard (``pip install 'vardrop[compress]'``).

    Example:
        >>> import pathlib, tempfile, torch, vardrop as vd
        >>> layer, other = torch.nn.Linear(4, 2), torch.nn.Linear(4, 2)
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.vdc"
        >>> vd.save_compressed(layer, path).bytes == path.stat().st_size
        True
        >>> vd.load_compressed(path, other)
        >>> torch.equal(layer.weight, other.weight)
        True
    """
    check_module(model, "save_compressed(model, path)")
    data, tensors = _encoded(model)
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(data)
    partial.replace(path)
    return CompressedSize(len(data), 4 * sum(value.numel() for value in plain_state(model).values()), tensors)


def load_compressed(path: str | os.PathLike[str], model: nn.Module) -> None:
    """Read a file of :func:`save_compressed` into a model of the same architecture, in place.

    Args:
        path: of the file.
        model: plain or converted (whose noise stays as it is), with tensors of the names, shapes and types of the file.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: if the file is something else, damaged, or of another model; the model is then as it was.

    Example:
        >>> import pathlib, tempfile, torch, vardrop as vd
        >>> path = pathlib.Path(tempfile.mkdtemp()) / "layer.vdc"
        >>> _ = vd.save_compressed(torch.nn.Linear(4, 2), path)
        >>> vd.load_compressed(path, torch.nn.Linear(4, 2))
    """
    check_module(model, "load_compressed(path, model)")
    data = Path(path).read_bytes()
    start = len(MAGIC) + DIGEST
    if data[: len(MAGIC)] != MAGIC:
        raise ValueError(
            f"vardrop.load_compressed: needs a file that vd.save_compressed wrote, got {path}, which begins with "
            f"{data[: len(MAGIC)]!r}"
        )
    if hashlib.blake2b(data[start:], digest_size=DIGEST).digest() != data[len(MAGIC) : start]:
        raise ValueError(
            f"vardrop.load_compressed: the file must be whole, got {path} of {len(data):,} bytes with a checksum of "
            "others; it is damaged or cut short, take another copy"
        )
    header, at = unpack(data, start)
    entries = json.loads(header)
    state = plain_state(model)
    _check_entries(path, entries, state)
    read: list[Tensor] = []
    for _, dtype, shape, layout in entries:
        if layout.startswith("="):
            read.append(read[int(layout[1:])])
            continue
        value, at = decode(layout, data, at, tuple(shape), getattr(torch, dtype))
        read.append(value)
    with torch.no_grad():
        for (name, *_), value in zip(entries, read, strict=True):
            state[name].copy_(value)


def _check_entries(path: Any, entries: list[list[Any]], state: dict[str, Tensor]) -> None:
    """Refuse a file of another model."""
    there = {name: (dtype, tuple(shape)) for name, dtype, shape, _ in entries}
    here = {name: (str(x.dtype).removeprefix("torch."), tuple(x.shape)) for name, x in state.items()}
    different = sorted(name for name in there.keys() | here.keys() if there.get(name) != here.get(name))
    if different:
        name = different[0]
        raise ValueError(
            f"vardrop.load_compressed: the model must have the tensors of the file, got {name!r} with "
            f"{here.get(name, 'nothing')} where {path} has {there.get(name, 'nothing')} (and {len(different) - 1} "
            "more); build the model that was saved, a compact one after vd.compact"
        )
