"""A name for what a model's KV is: what the root of every block hash is made from."""

from __future__ import annotations

import hashlib
from pathlib import Path

from ..config import FULL_ATTENTION, KVCacheDType, QuantizationName
from .loader import weight_files

# Weights are sampled, not read whole: 64 windows a file tell two checkpoints of the same shapes
# apart in milliseconds, and a changed file has a changed sample unless it was made to hide.
WINDOWS = 64
WINDOW_BYTES = 4096


def model_fingerprint(
    path: Path,
    *,
    quantization: QuantizationName = "none",
    kv_cache_dtype: KVCacheDType = "auto",
    attention: str = FULL_ATTENTION,
) -> bytes:
    """SHA-256 over ``config.json``, every weight file's name and header, and a sample of its bytes.

    Weights that are quantized while they are loaded are others, so ``quantization`` is hashed too;
    likewise what keys and values are rounded to, and the label of an ``attention`` that is not
    full, behind whose first layer all keys differ.
    Raises ``CheckpointError`` for a folder without safetensors weights, ``OSError`` for files that
    cannot be read.
    """
    digest = hashlib.sha256()
    _add(digest, (path / "config.json").read_bytes())
    for file in weight_files(path):
        _add(digest, file.name.encode())
        for window in _windows(file):
            _add(digest, window)
    if quantization != "none":
        _add(digest, quantization.encode())
    if kv_cache_dtype != "auto":
        _add(digest, f"KV cache in {kv_cache_dtype}".encode())
    if attention != FULL_ATTENTION:
        _add(digest, attention.encode())
    return digest.digest()


def _windows(file: Path) -> list[bytes]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        header_bytes = int.from_bytes(stream.read(8), "little")
        # A header that claims more than the file holds is read as far as it goes; loading such a
        # file fails elsewhere.
        windows = [stream.read(min(header_bytes, size))]
        data_start = stream.tell()
        stride = max(WINDOW_BYTES, (size - data_start) // WINDOWS)
        for offset in range(data_start, size, stride):
            stream.seek(offset)
            windows.append(stream.read(WINDOW_BYTES))
        stream.seek(max(data_start, size - WINDOW_BYTES))
        windows.append(stream.read(WINDOW_BYTES))
    return windows


def _add(digest: hashlib._Hash, part: bytes) -> None:
    """Length first, so that no two lists of parts hash alike."""
    digest.update(len(part).to_bytes(8, "little"))
    digest.update(part)
