"""Unknown keys, with the nearest right one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any

from .plan import Problem


def unknown_keys(data: dict[str, Any], known: Iterable[str], prefix: str) -> tuple[Problem, ...]:
    """A problem for every key of ``data`` that is not known; ``prefix`` is its place."""
    known = list(known)
    return tuple(
        Problem(f"{prefix}{key}", f"unknown key; {nearest(str(key), known)}")
        for key in data
        if key not in known
    )


def nearest(key: str, known: Iterable[str]) -> str:
    """What may have been meant, as words."""
    known = list(known)
    near = difflib.get_close_matches(key, known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
