"""What the commands say on the terminal, and how they fail: one line, no traceback."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console

DEBUG_VARIABLE = "INFERENCE_PIO_DEBUG"

out = Console(highlight=False)
err = Console(stderr=True, highlight=False)

Say = Callable[[str], None]


@contextmanager
def progress() -> Iterator[Say]:
    """A spinner whose text the block may change; plain lines where there is no terminal."""
    if not err.is_terminal:
        yield lambda text: err.print(f"{text} …", markup=False)
        return
    with err.status("") as status:
        yield lambda text: status.update(f"{text} …")


def report_failure(error: Exception) -> int:
    """Print why a command failed; returns the exit status.

    What a person can cause (a wrong value, a missing file, a refused start) is one line. Anything
    else says so, and how to see where it happened.
    """
    if os.environ.get(DEBUG_VARIABLE):
        traceback.print_exception(error, file=sys.stderr)
    # Imported here: only a failure needs them.
    from ...benchmarks.http_stream import StreamError
    from ..launcher import LaunchError

    expected = isinstance(error, ValueError | OSError | CommandError | LaunchError | StreamError)
    name = "" if expected else f"{type(error).__name__}: "
    hint = "" if expected else f" (set {DEBUG_VARIABLE}=1 for the traceback)"
    err.print("[bold red]error:[/]", end=" ")
    err.print(f"{name}{str(error) or type(error).__name__}{hint}", markup=False)
    return 1


class CommandError(RuntimeError):
    """A command cannot do what it was asked to; the message says why."""
