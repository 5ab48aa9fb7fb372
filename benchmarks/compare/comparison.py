"""All systems on one checkpoint, in turns, beside the machine's own rates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ...workers.user_cache import cache_folder
from .. import speed
from ..floor import FloorProbe
from ..report import Row, of_rounds
from .catalog import PeerSpec
from .install import PeerUnavailableError
from .process import PeerProcess

BENCHMARK = "compare"


@dataclass(frozen=True, slots=True)
class Outcome:
    """The figures of a run, and what could not be measured, with the reason."""

    rows: tuple[Row, ...]
    notes: tuple[str, ...]


def compare(
    checkpoint: Path,
    specs: Sequence[PeerSpec],
    precisions: Sequence[str],
    cases: Sequence[speed.Case],
    *,
    threads: int,
    rounds: int,
    command: str,
    progress: Callable[[str], None],
) -> Outcome:
    """Measure every system in every precision that it has; the first is the one of the ratios.

    A system that cannot be installed, loaded or run costs the others nothing: it becomes a note.
    Raises ``CheckpointError`` for a folder that is no checkpoint.
    """
    torch.set_num_threads(threads)
    rows: list[Row] = []
    notes: list[str] = []
    for precision in precisions:
        able = [spec for spec in specs if precision in spec.precisions]
        notes += [f"{s.name} has no {precision} here" for s in specs if s not in able]
        with _started(able, checkpoint, precision, threads, notes, progress) as systems:
            rows += _measure(
                systems, checkpoint, precision, cases, rounds, command, notes, progress
            )
    return Outcome(tuple(rows), tuple(dict.fromkeys(notes)))


@contextmanager
def _started(
    specs: Sequence[PeerSpec],
    checkpoint: Path,
    precision: str,
    threads: int,
    notes: list[str],
    progress: Callable[[str], None],
) -> Iterator[list[PeerProcess]]:
    """Those that came up; all are ended."""
    systems: list[PeerProcess] = []
    try:
        for spec in specs:
            folder = _prepared_folder(spec, checkpoint)
            system = PeerProcess(spec, checkpoint, precision, threads, folder)
            systems.append(system)
            try:
                system.start(progress)
            except PeerUnavailableError as error:
                system.close()
                systems.pop()
                notes.append(f"{spec.name} is not measured in {precision}: {error}")
            else:
                notes.append(f"{spec.name} {system.version}")
        yield systems
    finally:
        for system in systems:
            system.close()


def _measure(
    systems: list[PeerProcess],
    checkpoint: Path,
    precision: str,
    cases: Sequence[speed.Case],
    rounds: int,
    command: str,
    notes: list[str],
    progress: Callable[[str], None],
) -> list[Row]:
    """Rows of one precision; a system that fails on the way is left out, and the rest runs anew."""
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    probe = FloorProbe(torch.device("cpu"), dtype)
    shapes = speed.shapes_of(checkpoint, precision)
    while systems:
        try:
            found = speed.measure(systems, shapes, probe, cases, rounds, progress)
            memory = {system.name: system.peak_bytes() for system in systems}
        except PeerUnavailableError as error:
            failed = [system for system in systems if not system.is_alive]
            for system in failed:
                systems.remove(system)
                system.close()
                notes.append(f"{system.name} is not measured in {precision}: {error}")
            continue
        rows = speed.rows(found, systems, command, benchmark=BENCHMARK)
        rows += _first_token_rows(found, cases, precision, command)
        return rows + [
            Row.of(
                of_rounds([size / 2**20]),
                benchmark=BENCHMARK,
                system=name,
                precision=precision,
                case="peak memory",
                unit="MiB",
                command=command,
            )
            for name, size in memory.items()
        ]
    return []


def _first_token_rows(
    found: speed.Rounds, cases: Sequence[speed.Case], precision: str, command: str
) -> list[Row]:
    """The time behind each prefill rate: what one client waits for its first token."""
    prefill = {case.name: case.size for case in cases if case.kind == "prefill"}
    return [
        Row.of(
            of_rounds([1000 * prefill[case] / r.tokens_per_s for r in got]),
            benchmark=BENCHMARK,
            system=name,
            precision=precision,
            case=f"first token behind {prefill[case]}",
            unit="ms",
            command=command,
        )
        for (case, name), got in found.items()
        if case in prefill
    ]


def _prepared_folder(spec: PeerSpec, checkpoint: Path) -> Path:
    """Where a system keeps its form of this checkpoint; another file or date is another form."""
    files = sorted(checkpoint.glob("*.safetensors"))
    named = [f"{path.resolve()} {path.stat().st_size} {path.stat().st_mtime_ns}" for path in files]
    digest = hashlib.sha256("\n".join(named).encode()).hexdigest()[:12]
    return cache_folder() / "checkpoints" / digest / spec.script.removesuffix("_peer.py")


def fastest_other(rows: Sequence[Row], own: str) -> list[Row]:
    """For each case and precision, the ratio of ``own`` to the best of the others."""
    found = []
    rates = [row for row in rows if row.unit == "tok/s"]
    for row in (row for row in rates if row.system == own):
        others = [
            other
            for other in rates
            if (other.case, other.precision) == (row.case, row.precision) and other.system != own
        ]
        if others:
            best = max(others, key=lambda other: other.median)
            found.append(_ratio(row, best, rows))
    return found


def _ratio(row: Row, best: Row, rows: Sequence[Row]) -> Row:
    """The measured ratio of the two, taken round by round."""
    pair = f"{row.system} / {best.system}"
    return next(
        other
        for other in rows
        if (other.case, other.precision, other.system) == (row.case, row.precision, pair)
    )
