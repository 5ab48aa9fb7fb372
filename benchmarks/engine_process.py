"""An engine in a fresh process of its own, which is stopped while others are measured."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import IO, Any, Self

from ..workers.config import EngineConfig
from .divergence import Divergence
from .resident import Resident
from .staged_engine import Filled, Stages


class EngineProcessError(RuntimeError):
    """The engine's process could not do what it was asked to; the message says why."""


class EngineProcess:
    """One configuration under a name; a context manager. A ``speed.System``.

    Between requests it is stopped: threads that spin while they wait for work would take the cores
    from the one whose turn it is.
    """

    def __init__(self, name: str, config: EngineConfig, *, group: Path | None = None) -> None:
        """``group`` is the folder of a cgroup that the process is to be in."""
        self.name = name
        self.precision = name
        self.dtype = ""
        self.stages: Stages
        self._config = config
        self._group = group
        self._process: subprocess.Popen[str]
        self._log: IO[bytes]

    def __enter__(self) -> Self:
        """Load the engine. Raises ``ValueError`` for a configuration that it refuses."""
        threads = str(self._config.num_threads or len(os.sched_getaffinity(0)))
        self._log = tempfile.TemporaryFile()
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"{__package__}.engine_server", self._config.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": threads, "TOKENIZERS_PARALLELISM": "false"},
            start_new_session=True,
        )
        try:
            if self._group is not None:
                (self._group / "cgroup.procs").write_text(str(self.pid))
            loaded = self._answer()
        except BaseException:
            self.__exit__()
            raise
        self._signal(signal.SIGSTOP)
        self.dtype = loaded["precision"]
        self.stages = Stages(**{k: Resident(**v) for k, v in loaded["stages"].items()})
        return self

    def __exit__(self, *_error: object) -> None:
        if self._process.poll() is None:
            self._signal(signal.SIGKILL)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None  # asked for above
            with suppress(BrokenPipeError):
                pipe.close()
        self._process.wait()
        self._log.close()

    @property
    def pid(self) -> int:
        """The process, as the system numbers it."""
        return self._process.pid

    def resident(self) -> Resident:
        """See ``resident.resident``."""
        return Resident(**self._ask("resident"))

    def fill(self) -> Filled:
        """See ``staged_engine.fill``."""
        found = self._ask("fill")
        return Filled(Resident(**found["full"]), found["tokens"], found["capacity"])

    def decode_rate(self, batch: int, prompt: int, steps: int) -> float:
        """See ``speed.System``."""
        return float(self._ask("decode_rate", batch, prompt, steps))

    def prefill_rate(self, length: int) -> float:
        """See ``speed.System``."""
        return float(self._ask("prefill_rate", length))

    def write_reference(self, path: Path) -> None:
        """See ``divergence.write_reference``."""
        self._ask("write_reference", str(path))

    def compare_with(self, path: Path) -> Divergence:
        """See ``divergence.compare_with``."""
        found = self._ask("compare_with", str(path))
        return Divergence(tuple(found["kl"]), tuple(found["changed"]))

    def _ask(self, action: str, *arguments: object) -> Any:
        assert self._process.stdin is not None  # asked for above
        self._signal(signal.SIGCONT)
        try:
            self._process.stdin.write(json.dumps({"action": action, "arguments": arguments}) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._ended() from None
        value = self._answer()
        self._signal(signal.SIGSTOP)
        return value

    def _answer(self) -> Any:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise self._ended()
        answer = json.loads(line)
        if "error" in answer:
            raise ValueError(answer["error"])
        return answer["value"]

    def _ended(self) -> EngineProcessError:
        self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        return EngineProcessError(f"{self.name}: {lines[-1] if lines else 'its process ended'}")

    def _signal(self, number: signal.Signals) -> None:
        os.killpg(self._process.pid, number)
