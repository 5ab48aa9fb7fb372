"""One line of JSON for each answered item, so that an interrupted run goes on where it ended.

The first line says what decides the answers (model, sampling, seed, limits); a file of another run
is refused. A last line that was cut is dropped. Which items are asked may grow between runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from .item import Mode, Reply, ToolCall, Verdict

SCHEMA = 1


@dataclass(frozen=True, slots=True)
class Result:
    """An item's answer in one mode, judged."""

    task: str
    id: str
    category: str
    mode: Mode
    reply: Reply
    verdict: Verdict

    @property
    def key(self) -> tuple[str, str, str]:
        return self.task, self.id, self.mode


class Results:
    """The results of a run, and its file where it has one; a context manager."""

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._header = {"schema": SCHEMA, **settings}
        self._results: dict[tuple[str, str, str], Result] = {}
        self._path = path
        self._file: IO[str] | None = None

    def __enter__(self) -> Self:
        """Read what is there. Raises ``ValueError`` for a file that is of another run."""
        if self._path is None:
            return self
        if self._path.exists():
            whole = _whole_lines(self._path)
            if whole:
                self._check_header(whole[0])
                for line in whole[1:]:
                    result = _read(self._path, line)
                    self._results[result.key] = result
        self._file = self._path.open("a", encoding="utf-8")
        if self._file.tell() == 0:
            self._write(self._header)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._file is not None:
            self._file.close()

    def __iter__(self) -> Iterator[Result]:
        return iter(self._results.values())

    def __contains__(self, key: tuple[str, str, str]) -> bool:
        return key in self._results

    def __getitem__(self, key: tuple[str, str, str]) -> Result:
        return self._results[key]

    def add(self, result: Result) -> None:
        """Keep a result; it is in the file when this returns."""
        self._results[result.key] = result
        self._write(asdict(result))

    def _write(self, document: Mapping[str, Any]) -> None:
        if self._file is not None:
            self._file.write(json.dumps(document, ensure_ascii=True) + "\n")
            self._file.flush()

    def _check_header(self, line: str) -> None:
        found = json.loads(line)
        wanted = json.loads(json.dumps(self._header))
        if found != wanted:
            keys = [k for k in {**wanted, **found} if wanted.get(k) != found.get(k)]
            told = ", ".join(f"{k} {found.get(k)!r} (now {wanted.get(k)!r})" for k in keys)
            raise ValueError(
                f"{self._path} has results of another run: {told}; name another file, or ask as "
                "that run did"
            )


def _whole_lines(path: Path) -> list[str]:
    """The lines of a file, which is cut behind the last one that ends."""
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        with path.open("r+b") as file:
            file.truncate(end)
    return content[:end].decode().split("\n")[:-1]


def _read(path: Path, line: str) -> Result:
    try:
        found = json.loads(line)
        reply = dict(found["reply"])
        reply["tool_calls"] = tuple(ToolCall(**call) for call in reply["tool_calls"])
        return Result(**{**found, "reply": Reply(**reply)})
    except (ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} has a line that is no result: {error}") from None
