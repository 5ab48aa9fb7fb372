"""The kernels' C++ sources, and a digest that tells whether a library was built from them.

Read by the build as well as by the running package: the standard library only.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

SUFFIXES = (".cpp", ".h", ".map")


def source_files(folder: Path) -> list[Path]:
    """Everything that the libraries are built from, sorted by name."""
    return sorted(path for path in folder.iterdir() if path.suffix in SUFFIXES)


def sources_digest(folder: Path) -> str | None:
    """A digest of names and contents; ``None`` where the sources were not installed."""
    files = source_files(folder)
    if not files:
        return None
    digest = hashlib.sha256()
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
