"""Where this project keeps what can be made anew."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``inference-pio`` in the user's cache (``XDG_CACHE_HOME``, or ``~/.cache``)."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "inference-pio"
