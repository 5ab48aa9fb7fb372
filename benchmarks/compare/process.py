"""A peer in a process of its own, which sleeps while others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .catalog import PEERS, PeerSpec
from .install import PeerUnavailableError, interpreter

RUNNER = PEERS / "runner.py"
PREPARED = ".prepared"


class PeerProcess:
    """A loaded system that answers one request at a time.

    Between requests its whole process group is stopped: threads that spin while they wait for work
    would take the cores from the system whose turn it is.
    """

    def __init__(
        self, spec: PeerSpec, checkpoint: Path, precision: str, threads: int, folder: Path
    ) -> None:
        self.name = spec.name
        self.precision = precision
        self._spec = spec
        self._checkpoint = checkpoint
        self._threads = threads
        self._folder = folder
        self._log = folder / f"{precision}.log"
        self._process: subprocess.Popen[str] | None = None
        self.version = ""

    def start(self, progress: Callable[[str], None]) -> None:
        """Install, convert and load what is missing. Raises ``PeerUnavailableError``."""
        python = interpreter(self._spec, progress)
        self._folder.mkdir(parents=True, exist_ok=True)
        marker = self._folder / f"{PREPARED}-{self.precision}"
        if not marker.exists():
            progress(f"{self.name}: preparing the checkpoint in {self.precision}")
            with self._log.open("w", encoding="utf-8") as log:
                done = subprocess.run(
                    self._command(python, "prepare"),
                    stdout=log,
                    stderr=log,
                    env=self._environment(),
                )
            if done.returncode != 0:
                raise PeerUnavailableError(self._why("could not prepare the checkpoint"))
            marker.touch()
        progress(f"{self.name}: loading")
        with self._log.open("w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                [*self._command(python, "serve"), str(self._threads)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                env=self._environment(),
                start_new_session=True,
            )
        self.version = str(self._answer()["version"])
        self._signal(signal.SIGSTOP)

    def decode_rate(self, batch: int, prompt: int, steps: int) -> float:
        """See ``benchmarks.speed.System``."""
        return batch * steps / float(self._ask("decode_seconds", batch, prompt, steps))

    def prefill_rate(self, length: int) -> float:
        """See ``benchmarks.speed.System``."""
        return length / float(self._ask("first_token_seconds", length))

    def peak_bytes(self) -> int:
        """The most memory that its process had at a time."""
        return int(self._ask("peak_bytes"))

    @property
    def is_alive(self) -> bool:
        """Whether it still answers."""
        return self._process is not None and self._process.poll() is None

    def close(self) -> None:
        """End it."""
        if self._process is None:
            return
        if self.is_alive:
            self._signal(signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None  # asked for in start()
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()

    def _ask(self, action: str, *arguments: int) -> Any:
        assert self._process is not None, "start() comes first"
        assert self._process.stdin is not None  # asked for in start()
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"action": action, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise PeerUnavailableError(self._why("ended")) from None
        value = self._answer()["value"]
        self._signal(signal.SIGSTOP)
        return value

    def _answer(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            raise PeerUnavailableError(self._why("ended"))
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        os.killpg(self._process.pid, number)

    def _command(self, python: Path, action: str) -> list[str]:
        return [
            str(python),
            str(RUNNER),
            str(self._spec.path),
            action,
            str(self._checkpoint),
            self.precision,
            str(self._folder),
        ]

    def _environment(self) -> dict[str, str]:
        threads = str(self._threads)
        return {**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"}

    def _why(self, what: str) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return f"{what}: {lines[-1] if lines else 'it printed nothing'}"
