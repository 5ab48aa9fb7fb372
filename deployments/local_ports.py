"""Ports and addresses of this machine."""

from __future__ import annotations

import http.client
import socket
import urllib.error
import urllib.request
from contextlib import ExitStack


def free_ports(count: int) -> list[int]:
    """``count`` different TCP ports that nobody listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [int(held.getsockname()[1]) for held in sockets]


def require_free_port(host: str, port: int) -> None:
    """Raise ``OSError``, with what to do, where the service could not listen."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise OSError(
                f"cannot listen on {host}:{port} ({error.strerror or error}); "
                "choose another with --host and --port"
            ) from error


def free_port_near(wanted: int) -> int:
    """``wanted`` where nobody listens on it, else another free port of this machine."""
    try:
        require_free_port("127.0.0.1", wanted)
    except OSError:
        return free_ports(1)[0]
    return wanted


def is_answering(url: str, timeout_s: float = 2.0) -> bool:
    """Whether a GET of ``url`` is answered with 200."""
    # Without proxies: the machine's own address never lies behind one.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=timeout_s) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, http.client.HTTPException, OSError):
        return False
