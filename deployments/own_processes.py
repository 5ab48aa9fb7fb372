"""The processes that descend from this one, orphans included."""

from __future__ import annotations

import contextlib
import ctypes
import sys

import psutil

_PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent dies.

    Ray's workers start HAProxy and helpers; when a worker is killed they would move to init and
    no longer be found below us. Linux only; elsewhere orphans stay with init.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def descendants() -> list[psutil.Process]:
    """Every living process below this one; zombies are reaped."""
    return [p for p in psutil.Process().children(recursive=True) if is_alive(p)]


def end_descendants(grace_s: float) -> int:
    """End every process below this one: asked first, killed after ``grace_s`` seconds.

    Returns how many there were.
    """
    found: set[psutil.Process] = set()
    while True:
        alive = descendants()
        if not alive:
            return len(found)
        found.update(alive)
        for process in alive:
            _quietly(process, "terminate")
        _, stubborn = psutil.wait_procs(alive, timeout=grace_s)
        for process in stubborn:
            _quietly(process, "kill")
        psutil.wait_procs(stubborn, timeout=grace_s)


def is_alive(process: psutil.Process) -> bool:
    """Whether a process still runs; a zombie does not, and is reaped if it is a child."""
    try:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            return True
        process.wait(timeout=0)
    except psutil.Error:
        pass
    return False


def _quietly(process: psutil.Process, action: str) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        getattr(process, action)()
