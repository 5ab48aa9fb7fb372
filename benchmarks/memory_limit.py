"""A limit of memory that the system enforces: every page counts, cached pages of files too.

Cached pages are taken back when the limit is reached; a process that needs more is killed.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def memory_cgroup(limit: int) -> Iterator[Path]:
    """A new cgroup with that limit, for processes that join it, all of which end before it does.

    Raises ``OSError`` where none can be made.
    """
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {tuple(line.split(":")[1].split(",")): line.split(":", 2)[2] for line in lines}
    name = f"inference-pio-{uuid.uuid4().hex[:8]}"
    if ("memory",) in own:  # version 1: below our own
        group = Path("/sys/fs/cgroup/memory", own["memory",].lstrip("/"), name)
        file = "memory.limit_in_bytes"
    else:  # version 2: beside our own, since one with processes has no children that are limited
        group = Path("/sys/fs/cgroup", own.get(("",), "/").lstrip("/")).parent / name
        file = "memory.max"
    group.mkdir()
    try:
        (group / file).write_text(str(limit))
        yield group
    finally:
        _remove(group)


def _remove(group: Path) -> None:
    for _ in range(100):  # a process that was killed leaves a moment later
        try:
            group.rmdir()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"{group} cannot be removed")
