"""Environments of peers: each has one of its own, made once and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import venv
from collections.abc import Callable
from pathlib import Path

from ...workers.user_cache import cache_folder
from .catalog import PeerSpec

COMPLETE = ".complete"
"""Written last: an environment without it is made anew."""


class PeerUnavailableError(RuntimeError):
    """A peer that cannot be measured here; the text says why."""


def interpreter(spec: PeerSpec, progress: Callable[[str], None]) -> Path:
    """The Python that has the peer, installed where it is missing.

    Raises ``PeerUnavailableError`` with pip's own last words.
    """
    if not spec.requirements:
        return Path(sys.executable)
    parts = (*spec.requirements, "-", *spec.unwanted, *map(str, spec.build_environment.items()))
    named = "\n".join(parts)
    digest = hashlib.sha256(f"{sys.version}\n{named}".encode()).hexdigest()[:12]
    folder = cache_folder() / "peers" / f"{spec.script.removesuffix('_peer.py')}-{digest}"
    python = folder / "bin" / "python"
    if (folder / COMPLETE).exists():
        return python
    progress(f"{spec.name}: making an environment")
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, with_pip=True)
    _pip(spec, python, folder / "install.log", progress, "install", *spec.requirements)
    if spec.unwanted:
        _pip(spec, python, folder / "uninstall.log", progress, "uninstall", "-y", *spec.unwanted)
    (folder / COMPLETE).touch()
    return python


def _pip(
    spec: PeerSpec, python: Path, log: Path, progress: Callable[[str], None], *arguments: str
) -> None:
    command = [str(python), "-m", "pip", *arguments]
    last = ""
    with (
        log.open("w", encoding="utf-8") as written,
        subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, "PIP_PROGRESS_BAR": "off", **spec.build_environment},
        ) as pip,
    ):
        assert pip.stdout is not None  # asked for above
        for line in pip.stdout:
            written.write(line)
            if line.strip():
                last = line.strip()
                progress(f"{spec.name}: {last[:90]}")
    if pip.returncode != 0:
        raise PeerUnavailableError(f"pip could not {' '.join(arguments)}: {last}")
