"""Runs generated code where it can do no harm: a process that may compute, read, and nothing else.

1. A fresh interpreter starts in an empty temporary folder, in a session of its own, with an empty
   environment, without site-packages, and its output goes nowhere.
2. It takes its limits (``sandboxed.py``): processor time, memory, file size; then a system-call
   filter (Linux seccomp) that leaves what computing and reading need. No network, no process or
   thread, no signal to another process, no file opened for writing, renamed or removed.
3. The parts run in one namespace. After the last the runner writes a word, which only it was told,
   to a pipe: code that ends the process early has not passed.
4. Whatever still runs at the deadline is killed, with its session.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

RUNNER = Path(__file__).with_name("sandboxed.py")
SECONDS = 10.0
"""For the whole run; the canonical solutions take under one."""
MEMORY_BYTES = 1 << 30
_READ_BYTES = 4096


class SandboxError(RuntimeError):
    """This system cannot run untrusted code safely; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Run:
    """How a run ended; ``reason`` is empty where it passed."""

    passed: bool
    reason: str
    seconds: float


def run_code(
    parts: Sequence[str], *, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES
) -> Run:
    """Run ``parts`` one after another. Raises ``SandboxError`` where there is no safe way to."""
    word = secrets.token_hex(16)
    task = json.dumps(
        {"parts": list(parts), "word": word, "seconds": seconds, "memory_bytes": memory_bytes}
    )
    begin = time.monotonic()
    read_end, write_end = os.pipe()
    try:
        with tempfile.TemporaryDirectory() as folder:
            timed_out = _run(task.encode(), write_end, folder, seconds)
        os.close(write_end)
        write_end = -1
        said = _said(read_end)
    finally:
        os.close(read_end)
        if write_end >= 0:
            os.close(write_end)
    took = time.monotonic() - begin
    kind, _, detail = said.partition(" ")
    if kind == "unsafe":
        raise SandboxError(f"generated code cannot be run here: {detail}")
    if kind == word and not timed_out:
        return Run(True, "", took)
    if timed_out:
        return Run(False, f"it ran longer than {seconds:g} s", took)
    return Run(False, detail if kind == "failed" else "its process ended", took)


def _run(task: bytes, write_end: int, folder: str, seconds: float) -> bool:
    """Whether it had to be killed."""
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", "-B", str(RUNNER), str(write_end)],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=folder,
        env={},
        pass_fds=(write_end,),
        start_new_session=True,
    )
    try:
        process.communicate(task, timeout=seconds)
    except subprocess.TimeoutExpired:
        return True
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        if process.stdin is not None:
            with suppress(BrokenPipeError):
                process.stdin.close()
    return False


def _said(read_end: int) -> str:
    """What the runner wrote, bounded: generated code may find the pipe and fill it."""
    os.set_blocking(read_end, False)
    try:
        return os.read(read_end, _READ_BYTES).decode(errors="replace")
    except BlockingIOError:
        return ""
