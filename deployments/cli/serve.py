"""``inference-pio serve``: the server in the foreground until a signal ends it."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

from ..application_file import Wishes, load_application
from ..launcher import LaunchError, LocalServer
from .console import err, progress


class StopRequested(BaseException):
    """A signal asked this process to end; not an ``Exception``, so nothing swallows it."""


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Turn the first SIGINT or SIGTERM into ``StopRequested``, which ends the block quietly.

    Later signals change nothing: stopping is under way then, and bounded in time.
    """
    seen = threading.Event()

    def on_signal(_number: int, _frame: FrameType | None) -> None:
        if not seen.is_set():
            seen.set()
            raise StopRequested

    previous = {
        number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    except (StopRequested, SystemExit):
        pass  # SystemExit is how Ray's own SIGTERM handler answers, in place while Ray starts
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def run_server(config: Path | None, wishes: Wishes) -> None:
    """Start, say where it is, wait, stop."""
    started = time.monotonic()
    application = load_application(config, wishes)
    with stopped_by_signals(), LocalServer(application, show_logs=True) as server:
        with progress() as say:
            server.start(say)
        err.print(
            f"[bold green]ready[/] {application.config.model_name} at [bold]{server.address}[/] "
            f"with {', '.join(server.kernels())} kernels "
            f"after {time.monotonic() - started:.1f} s; Ctrl-C stops it"
        )
        for pool, attention in application.config.approximations.items():
            err.print(
                f"[bold yellow]approximate[/] pool {pool}: attention is {attention}, its answers "
                "are approximations of the model"
            )
        wait_for_signal(server)
    leave(server)


def leave(server: LocalServer) -> None:
    """Return, or end this process at once where an ordinary exit would hang."""
    if not server.stopped_orderly:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)


def wait_for_signal(server: LocalServer) -> NoReturn:
    """Sleep until a signal ends it, and say that the end has begun.

    Raises ``LaunchError`` when Ray died meanwhile.
    """
    try:
        while server.is_alive:
            time.sleep(1.0)
    except StopRequested:
        err.print("stopping …")
        raise
    raise LaunchError("Ray ended unexpectedly; the service has gone with it")
