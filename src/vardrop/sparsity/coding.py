"""One tensor as few bytes, without loss: where its entries are not zero, and what they are there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vardrop.optional import needed

LEVEL = 19  # of zstandard
BY = "save_compressed"

# The layout of a tensor is three letters: the order in which its entries are read (r: rows, c: columns), how the places
# of the non-zero ones are kept (d: they are not, g: gaps between them, b: one bit for each entry), and the values
# (t: numbers of a table of the distinct ones, p: bytes of the same significance together).
SPARSE, DENSE = 0.05, 0.5  # parts that are not zero: no bits for each entry below, no gaps and one order above


def numpy() -> Any:
    """NumPy, which is not needed for anything but files."""
    return needed("numpy", BY, "compress")


def pack(data: bytes) -> bytes:
    """Through zstandard if that is shorter, with the length and the choice in front."""
    zstandard = needed("zstandard", BY, "compress")
    parameters = zstandard.ZstdCompressionParameters.from_level(
        LEVEL, format=zstandard.FORMAT_ZSTD1_MAGICLESS, write_content_size=True, write_checksum=False
    )
    packed = zstandard.ZstdCompressor(compression_params=parameters).compress(data)
    is_shorter = len(packed) < len(data)
    body = packed if is_shorter else data
    return number(2 * len(body) + is_shorter) + body


def unpack(data: bytes, at: int) -> tuple[bytes, int]:
    """The bytes that begin at a place, and the place behind them."""
    zstandard = needed("zstandard", BY, "compress")
    length, at = read_number(data, at)
    body = data[at : at + length // 2]
    if length % 2:
        body = zstandard.ZstdDecompressor(format=zstandard.FORMAT_ZSTD1_MAGICLESS).decompress(body)
    return body, at + length // 2


def number(value: int) -> bytes:
    """A whole number, seven bits to a byte, the lowest first."""
    out = bytearray()
    while value >= 128:
        out.append(value % 128 + 128)
        value //= 128
    return bytes([*out, value])


def read_number(data: bytes, at: int) -> tuple[int, int]:
    """The number that begins at a place, and the place behind it."""
    value, shift = 0, 0
    while data[at] >= 128:
        value, shift, at = value + ((data[at] - 128) << shift), shift + 7, at + 1
    return value + (data[at] << shift), at + 1


def gaps(places: Any) -> bytes:
    """The gaps between places, a byte each; 255 stands for so many entries and no place."""
    np = numpy()
    gap = np.diff(places, prepend=-1) - 1
    lengths = gap // 255 + 1
    out = np.full(int(lengths.sum()), 255, dtype=np.uint8)
    out[np.cumsum(lengths) - 1] = gap % 255
    return bytes(out.tobytes())


def places(data: bytes) -> Any:
    """The places that have these gaps."""
    np = numpy()
    steps = np.frombuffer(data, dtype=np.uint8)
    last = steps != 255
    return np.cumsum(steps, dtype=np.int64)[last] + np.arange(int(last.sum()))


def planes(bits: Any, dtype: torch.dtype) -> bytes:
    """Bytes of the same significance together; of the common types exponents apart from signs and fractions."""
    np = numpy()
    width = bits.dtype.itemsize
    shift = {torch.float32: 16, torch.bfloat16: 0}.get(dtype)
    if shift is not None:
        top = bits >> shift
        swapped = ((top >> 7 & 255) << 8) | ((top & 127) << 1) | (top >> 15)
        bits = (swapped << shift) | (bits & ((1 << shift) - 1))
    return bytes(np.ascontiguousarray(bits.astype(f">u{width}").view(np.uint8).reshape(-1, width).T).tobytes())


def from_planes(data: bytes, width: int, dtype: torch.dtype) -> Any:
    """The inverse of :func:`planes`."""
    np = numpy()
    bits = np.ascontiguousarray(np.frombuffer(data, np.uint8).reshape(width, -1).T).view(f">u{width}")[:, 0]
    bits = bits.astype(f"u{width}")
    shift = {torch.float32: 16, torch.bfloat16: 0}.get(dtype)
    if shift is not None:
        top = bits >> shift
        swapped = ((top & 1) << 15) | ((top >> 8) << 7) | (top >> 1 & 127)
        bits = (swapped << shift) | (bits & ((1 << shift) - 1))
    return bits


def _bits(tensor: Tensor) -> Any:
    """The entries as whole numbers, in the order of the tensor."""
    tensor = torch.where(tensor == 0, torch.zeros_like(tensor), tensor)  # no negative zeros
    width = min(tensor.element_size(), 8)
    return tensor.contiguous().flatten().view(torch.uint8).numpy().view(f"u{width}")


def _encoded_values(bits: Any, dtype: torch.dtype) -> tuple[str, bytes]:
    np = numpy()
    plain = "p", b"".join(pack(plane) for plane in _cut(planes(bits, dtype), bits.dtype.itemsize))
    table, which = np.unique(bits, return_inverse=True)
    if len(table) > min(65536, len(bits)):
        return plain
    index = which.astype(np.uint8 if len(table) <= 256 else np.uint16)
    coded = (
        "t",
        b"".join(
            [
                *(pack(plane) for plane in _cut(planes(table, dtype), bits.dtype.itemsize)),
                number(index.dtype.itemsize),
                *(pack(plane) for plane in _cut(planes(index, torch.uint8), index.dtype.itemsize)),
            ]
        ),
    )
    return min(plain, coded, key=lambda found: len(found[1]))


def _cut(data: bytes, parts: int) -> list[bytes]:
    size = len(data) // parts
    return [data[i * size : (i + 1) * size] for i in range(parts)]


def _decoded_values(kind: str, data: bytes, at: int, width: int, dtype: torch.dtype) -> tuple[Any, int]:
    def read(width: int, dtype: torch.dtype, at: int) -> tuple[Any, int]:
        parts = []
        for _ in range(width):
            part, at = unpack(data, at)
            parts.append(part)
        return from_planes(b"".join(parts), width, dtype), at

    values, at = read(width, dtype, at)
    if kind == "t":
        size, at = read_number(data, at)
        index, at = read(size, torch.uint8, at)
        values = values[index]
    return values, at


def encode(tensor: Tensor) -> tuple[str, bytes]:
    """The layout and the bytes of a tensor: the shortest there is.

    Args:
        tensor: of any type; negative zeros become zeros.
    """
    np = numpy()
    tensor = tensor.detach().cpu()
    density = float(torch.count_nonzero(tensor)) / max(1, tensor.numel())
    found = []
    for order in "rc" if tensor.ndim > 1 and density < DENSE else "r":
        bits = _bits(tensor if order == "r" else tensor.flatten(1).T)
        mask = bits != 0
        where = {}
        if density < DENSE:
            where["g"] = gaps(np.flatnonzero(mask))
        if SPARSE < density < 1:
            where["b"] = np.packbits(mask).tobytes()
        for place, data in where.items():
            kind, values = _encoded_values(bits[mask], tensor.dtype)
            found.append((order + place + kind, pack(data) + values))
        if density >= DENSE:
            kind, values = _encoded_values(bits, tensor.dtype)
            found.append((order + "d" + kind, values))
    return min(found, key=lambda each: len(each[1]))


def decode(layout: str, data: bytes, at: int, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, int]:
    """The inverse of :func:`encode`, for bytes that begin at a place; and the place behind them."""
    np = numpy()
    order, place, kind = tuple(layout)
    size = torch.empty((), dtype=dtype).element_size()
    width, count = min(size, 8), int(np.prod(shape, dtype=np.int64)) * max(1, size // 8)
    where = None
    if place != "d":
        packed, at = unpack(data, at)
        where = places(packed) if place == "g" else np.flatnonzero(np.unpackbits(np.frombuffer(packed, np.uint8)))
    values, at = _decoded_values(kind, data, at, width, dtype)
    bits = np.zeros(count, dtype=f"u{width}")
    bits[slice(None) if where is None else where] = values
    if not count:
        return torch.zeros(shape, dtype=dtype), at
    flat = torch.from_numpy(bits.view(np.uint8).copy()).view(dtype)
    if order == "c":
        return flat.view(-1, shape[0]).T.reshape(shape), at
    return flat.view(shape), at
