"""The nodes that a deployment file describes, and how their sizes are written."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_UNITS |= {"KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?\s*", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class NodeType:
    """Nodes that are alike: at most ``count`` of them.

    ``resources`` are logical, as Ray counts them; ``None`` for memory means that the file does not
    say it.
    """

    name: str
    count: int
    resources: dict[str, float]
    memory: int | None = None
    gpu_memory: int | None = None


def parse_bytes(value: Any) -> int:
    """Bytes of a number or of text such as ``64GiB`` or ``64Gi``. Raises ``ValueError``."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    match = _SIZE.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        raise ValueError(f"{value!r} is no size; write a number of bytes, or 64GiB")
    return int(float(match[1]) * _UNITS[match[2].upper()])


def parse_cpus(value: Any) -> float:
    """Kubernetes' CPUs: ``8``, ``"8"`` or ``"500m"``. Raises ``ValueError``."""
    text = str(value)
    try:
        return float(text[:-1]) / 1000 if text.endswith("m") else float(text)
    except ValueError:
        raise ValueError(f"{value!r} is no number of CPUs; write 8 or 500m") from None


def gib(size: int) -> str:
    """A size for people."""
    return f"{size / 2**30:.2f} GiB"
