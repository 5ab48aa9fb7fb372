"""Prints the environment in which Ray starts on a node of a cluster, as lines for its shell.

1. A private folder is made for the HAProxy wrapper and HAProxy's own files.
2. The wrapper is written; it names the HAProxy of this node's Python environment.
3. ``export`` lines go to standard output; a variable that is set already is left alone.

Start commands read them, so that no YAML repeats a setting:
``lines=$(python -m inference_pio.deployments.node_environment) && eval "$lines" && ray start …``
"""

from __future__ import annotations

import os
import shlex
import stat
import sys
from collections.abc import Mapping
from pathlib import Path

from . import haproxy
from .ray_settings import cluster_settings, private_files, usable_cores


def private_folder() -> Path:
    """This user's folder for HAProxy, which nobody else may enter.

    It lies in /tmp since its sockets need a short path. Raises ``PermissionError`` where somebody
    else has made it.
    """
    folder = Path(f"/tmp/pio-{os.getuid()}")
    folder.mkdir(mode=0o700, exist_ok=True)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(
            f"{folder} must be a folder of user {os.getuid()} with mode 700; remove what is there"
        )
    return folder


def node_environment(folder: Path, present: Mapping[str, str]) -> dict[str, str]:
    """What a node's Ray needs and ``present`` does not set; writes the wrapper into ``folder``."""
    wanted = cluster_settings(usable_cores()) | private_files(folder)
    if haproxy.BINARY_SETTING not in present:
        wanted[haproxy.BINARY_SETTING] = str(haproxy.write_wrapper(folder))
    return {name: value for name, value in wanted.items() if name not in present}


def export_lines(environment: Mapping[str, str]) -> str:
    """The environment as POSIX shell."""
    return "".join(f"export {name}={shlex.quote(value)}\n" for name, value in environment.items())


if __name__ == "__main__":
    sys.stdout.write(export_lines(node_environment(private_folder(), os.environ)))
