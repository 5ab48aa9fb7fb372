"""Runs one peer in its own interpreter and answers requests, one JSON object a line.

``python runner.py PEER.py prepare CHECKPOINT PRECISION FOLDER`` converts a checkpoint.
``python runner.py PEER.py serve CHECKPOINT PRECISION FOLDER THREADS`` loads it and answers.

This file and the peers beside it run where this project is not installed: they import the standard
library and the peer's own packages only.
"""

from __future__ import annotations

import ctypes
import json
import os
import resource
import runpy
import signal
import sys
from collections.abc import Callable
from typing import Any, TextIO


def main() -> None:
    """See the module."""
    peer_file, action, checkpoint, precision, folder = sys.argv[1:6]
    answers = own_stdout()
    names = runpy.run_path(peer_file)
    if action == "prepare":
        names["prepare"](checkpoint, precision, folder)
        return
    end_with_parent()
    peer = names["Peer"](checkpoint, precision, folder, int(sys.argv[6]))
    say(answers, version=peer.version)
    actions: dict[str, Callable[..., Any]] = {
        "decode_seconds": peer.decode_seconds,
        "first_token_seconds": peer.first_token_seconds,
        "peak_bytes": peak_bytes,
    }
    for line in sys.stdin:
        request = json.loads(line)
        say(answers, value=actions[request["action"]](*request["arguments"]))


def end_with_parent() -> None:
    """Have the kernel end this process with the one that asks: while stopped it sees no end of
    its input."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def own_stdout() -> TextIO:
    """Standard output for answers alone; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def say(answers: TextIO, **fields: object) -> None:
    """One answer."""
    answers.write(json.dumps(fields) + "\n")
    answers.flush()


def peak_bytes() -> int:
    """The most memory that was resident at a time, mapped files included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
