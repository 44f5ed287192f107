"""Files that are whole or not there: written beside their place, then moved into it."""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Say in one sentence what a failed write means: a full disk, a folder that cannot be written to."""
    try:
        yield
    except OSError as error:
        why = error.strerror or str(error)
        raise OSError(
            f"vardrop.train: cannot write {path} ({why}); files written before are kept: make room or choose another "
            "folder, and go on with --resume"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that a kill or a full disk at any moment leaves the old one or the new one, and whole.

    Args:
        path: the file; its folder exists.
        content: all of it.

    Raises:
        OSError: if it cannot be written; the old file is still there and no other is left behind.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
            _sync_folder(path.parent)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise


def _sync_folder(folder: Path) -> None:
    """Make a rename last through a power cut, where the system can."""
    with contextlib.suppress(OSError, AttributeError):
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove_leftovers(folder: Path) -> None:
    """Take away what a killed process had begun to write."""
    for path in folder.glob(".*.tmp"):
        path.unlink(missing_ok=True)


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    total = 0
    for name in sorted(tensors):
        total = zlib.crc32(name.encode(), total)
        flat = tensors[name].contiguous().reshape(-1)
        if flat.numel():
            total = zlib.crc32(flat.view(torch.uint8).numpy().data, total)
    return total


def write_tensors(path: Path, tensors: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
    """Write a safetensors file atomically, with JSON and a checksum in its metadata."""
    held = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {key: json.dumps(value) for key, value in about.items()} | {"crc32": str(_checksum(held))}
    write_atomically(path, save(held, metadata))


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What :func:`write_tensors` wrote.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is damaged, or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"vardrop.training: there is no file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, ValueError, KeyError) as error:
        raise ValueError(
            f"vardrop.training: {path} is damaged or no safetensors file ({error}); remove it to start again"
        ) from error
    if "crc32" not in metadata:
        raise ValueError(f"vardrop.training: {path} was not written by vardrop; remove it to start again")
    if metadata.pop("crc32") != str(_checksum(tensors)):
        raise ValueError(f"vardrop.training: {path} is damaged, its checksum is wrong; remove it to start again")
    return tensors, {key: json.loads(value) for key, value in metadata.items()}


def check_same(source: str, digest: str, about: Mapping[str, Any], path: Path) -> None:
    """Refuse data that are not those of a file's training: another split, other scales, other test rows.

    Args:
        source: the data's name, for those who read the message.
        digest: of the data as they are now.
        about: what the file of tensors says of itself; one that says nothing passes.
        path: of the file of tensors.

    Raises:
        ValueError: if they differ.
    """
    noted = about.get("digest", digest)
    if noted != digest:
        raise ValueError(
            f"vardrop.training: {source} must be the file that {path} was trained on, got another (SHA-256 "
            f"{digest[:12]}… instead of {noted[:12]}…): its rows would be split and scaled in another way; put the old "
            "file back, or train again on the new one (with --start to begin with these weights)"
        )
