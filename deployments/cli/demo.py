"""``inference-pio demo``: from the start of a server to two streamed answers."""

from __future__ import annotations

import time

from ..application_file import Wishes, load_application
from ..launcher import LocalServer
from ..local_ports import free_port_near
from .console import err, out, progress
from .serve import leave, stopped_by_signals, wait_for_signal
from .show import show_reply
from .talk import Manner
from .talk_http import HttpTalker

THINKING_QUESTION = "What is 47 + 385 - 129 + 208?"
DEFAULT_PORT = 8000
DIRECT_QUESTION = "Which is larger, 412 or 397?"


def run_demo(port: int | None, *, exit_after: bool) -> None:
    """Start the embedded model, ask it once in each mode, then stop or stay."""
    began = time.monotonic()
    wishes = Wishes(model="embedded", host="127.0.0.1", port=port or free_port_near(DEFAULT_PORT))
    application = load_application(None, wishes)
    with stopped_by_signals(), LocalServer(application) as server:
        with progress() as say:
            server.start(say)
        out.print(f"[bold green]ready[/] after {time.monotonic() - began:.1f} s: {server.address}")
        with HttpTalker(server.address) as talker:
            for title, question, thinking in (
                ("thinking", THINKING_QUESTION, True),
                ("non-thinking", DIRECT_QUESTION, False),
            ):
                out.print(f"\n[bold cyan]{title}[/]  {question}")
                message = {"role": "user", "content": question}
                manner = Manner(thinking=thinking, temperature=0.0)
                show_reply(talker.reply([message], manner), out)
        out.print(f"\nboth answered {time.monotonic() - began:.1f} s after the start")
        if not exit_after:
            out.print(f"the server stays up at [bold]{server.address}[/]; Ctrl-C stops it")
            out.print(f"[dim]$[/] inference-pio chat --url {server.address}")
            wait_for_signal(server)
    leave(server)
    if exit_after:
        err.print("the server has ended")
