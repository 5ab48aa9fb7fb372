"""What tells one model's KV from another's."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .loader import weight_files

_SAMPLES = 256
_SAMPLE_BYTES = 1024


def model_fingerprint(folder: Path) -> bytes:
    """SHA-256 over a checkpoint: its config, each weight file's size, and samples of its content.

    Samples (256 of 1 KiB a file, evenly spread, the header's first KiB among them) keep it at
    milliseconds for gigabytes; a fine-tuned copy differs in every tensor, so in every sample.
    """
    digest = hashlib.sha256((folder / "config.json").read_bytes())
    for path in weight_files(folder):
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}".encode())
        step = max(_SAMPLE_BYTES, size // _SAMPLES)
        with path.open("rb") as file:
            for offset in range(0, size, step):
                file.seek(offset)
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.digest()
