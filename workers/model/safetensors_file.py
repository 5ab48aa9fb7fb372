"""One memory-mapped safetensors file: its header checked, its tensors as views of the mapping.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes
(https://huggingface.co/docs/safetensors).
"""

from __future__ import annotations

import json
import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .config import CheckpointError

FLOAT_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""What weights are trained in; the others only occur in quantized checkpoints."""
STORED_DTYPES = FLOAT_DTYPES | {
    "F8_E4M3": torch.float8_e4m3fn,
    "I64": torch.int64,
    "I32": torch.int32,
    "I8": torch.int8,
    "U8": torch.uint8,
}
MAX_HEADER_BYTES = 100 * 2**20


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


class SafetensorsFile:
    """The tensors of one file, by name.

    Raises ``CheckpointError`` for a file that is cut off or whose header is not sound.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self.size = path.stat().st_size
                header = _read_header(file.read(8), file, self.size, path)
                self._data_start = file.tell()
                # Copy-on-write: torch wants a writable buffer, the file must never change.
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error}") from error
        self.entries = {
            name: _entry(name, raw, self.size - self._data_start, path)
            for name, raw in header.items()
            if name != "__metadata__"
        }

    def offset(self, name: str) -> int:
        """Where a tensor begins in the file, in bytes."""
        return self._data_start + self.entries[name].start

    def view(self, name: str) -> Tensor:
        """The tensor as stored, without a copy: pages are read as they are touched."""
        entry = self.entries[name]
        if entry.dtype not in STORED_DTYPES:
            raise CheckpointError(
                f"{self.path}: {name} is stored as {entry.dtype}; "
                f"supported are {', '.join(STORED_DTYPES)}"
            )
        dtype = STORED_DTYPES[entry.dtype]
        start = self.offset(name)
        data: mmap.mmap | bytearray = self._map
        if start % dtype.itemsize:  # the format does not promise alignment, torch needs it
            data, start = bytearray(self._map[start : self._data_start + entry.end]), 0
        count = math.prod(entry.shape)
        return torch.frombuffer(data, dtype=dtype, count=count, offset=start).view(entry.shape)

    def release(self, name: str) -> None:
        """Gives the tensor's pages back; they are read again if it is touched again."""
        entry = self.entries[name]
        page = mmap.PAGESIZE
        start = -(-(self._data_start + entry.start) // page) * page
        length = (self._data_start + entry.end) // page * page - start
        if length > 0:
            self._map.madvise(mmap.MADV_DONTNEED, start, length)


def _read_header(prefix: bytes, file: Any, size: int, path: Path) -> dict[str, Any]:
    length = int.from_bytes(prefix, "little")
    if len(prefix) < 8 or 8 + length > size:
        raise CheckpointError(
            f"{path} is truncated: it has {size} bytes, its header alone needs {8 + length}"
        )
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path} is no safetensors file: its header has {length} bytes")
    try:
        header = json.loads(file.read(length))
    except ValueError as error:
        raise CheckpointError(f"{path} is no safetensors file: {error}") from error
    if not isinstance(header, dict):
        raise CheckpointError(f"{path} is no safetensors file: its header is no object")
    return header


def _entry(name: str, raw: Any, data_bytes: int, path: Path) -> TensorEntry:
    try:
        dtype, shape = str(raw["dtype"]), tuple(int(size) for size in raw["shape"])
        start, end = (int(offset) for offset in raw["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}: the header entry of {name} is broken: {error!r}") from error
    if not 0 <= start <= end or any(size < 0 for size in shape):
        raise CheckpointError(f"{path}: the header entry of {name} is broken: {raw}")
    if end > data_bytes:
        raise CheckpointError(
            f"{path} is truncated: {name} ends at byte {end} of the data, the file has {data_bytes}"
        )
    if dtype in STORED_DTYPES and math.prod(shape) * STORED_DTYPES[dtype].itemsize != end - start:
        raise CheckpointError(
            f"{path}: {name} has {end - start} bytes, {dtype} {list(shape)} needs "
            f"{math.prod(shape) * STORED_DTYPES[dtype].itemsize}"
        )
    return TensorEntry(dtype, shape, start, end)
