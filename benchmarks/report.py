"""The form of every result: rows with spread and command, and the machine they hold for.

A report names hardware and versions, never hosts or paths, so that it can be published.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

SCHEMA = 1

CPU_FLAGS = (
    "avx2",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_bf16",
    "amx_int8",
    "asimd",
    "bf16",
    "i8mm",
)
"""The instruction sets that decide how fast a forward pass can be."""

PACKAGES = ("torch", "transformers", "ray", "numpy")


@dataclass(frozen=True, slots=True)
class Figure:
    """A median with its spread."""

    median: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Row:
    """One measured figure.

    ``low`` and ``high`` are the smallest and largest round; for latencies of many requests they
    are the 1st and 99th percentile. ``floor_share`` is the share of what the hardware allowed in
    the same rounds (1 is the limit), or ``None`` where no floor was taken.
    """

    benchmark: str
    system: str
    precision: str
    case: str
    unit: str
    median: float
    low: float
    high: float
    floor_share: float | None
    command: str

    @classmethod
    def of(
        cls,
        figure: Figure,
        *,
        benchmark: str,
        system: str,
        precision: str,
        case: str,
        unit: str,
        command: str,
        floor_share: float | None = None,
    ) -> Row:
        """The row of a figure, for whose rounds no floor was taken unless ``floor_share`` says."""
        return cls(
            benchmark=benchmark,
            system=system,
            precision=precision,
            case=case,
            unit=unit,
            **asdict(figure),
            floor_share=floor_share,
            command=command,
        )


@dataclass(frozen=True, slots=True)
class Machine:
    """What the figures hold for."""

    cpu: str
    cores: int
    memory_gib: int
    flags: tuple[str, ...]
    accelerator: str | None
    python: str
    versions: dict[str, str]
    kernels: str = "torch"
    """What computes a bfloat16 model on this CPU; reports without it are older than a choice."""


@dataclass(frozen=True, slots=True)
class Report:
    """All rows of one run."""

    machine: Machine
    rows: tuple[Row, ...]
    notes: tuple[str, ...] = ()
    """Versions of what was measured beside this project, and what could not be, with the reason."""

    def to_json(self) -> str:
        """The report as the JSON that ``--json`` writes."""
        document = {
            "schema": SCHEMA,
            "machine": asdict(self.machine),
            "rows": [asdict(row) for row in self.rows],
            "notes": list(self.notes),
        }
        return json.dumps(document, indent=2, ensure_ascii=False) + "\n"

    def write(self, path: Path) -> None:
        path.write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def read(cls, path: Path) -> Report:
        """Read a report back. Raises ``ValueError`` for another schema or form."""
        document: Any = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict) or document.get("schema") != SCHEMA:
            raise ValueError(f"{path} is not a report of schema {SCHEMA}")
        try:
            machine = document["machine"]
            return cls(
                Machine(**{**machine, "flags": tuple(machine["flags"])}),
                tuple(Row(**row) for row in document["rows"]),
                tuple(str(note) for note in document.get("notes", ())),
            )
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a report of schema {SCHEMA}: {error}") from None


def of_rounds(values: Sequence[float]) -> Figure:
    """Median, smallest and largest of a few rounds."""
    return Figure(statistics.median(values), min(values), max(values))


def of_requests(values: Sequence[float]) -> Figure:
    """Median, 1st and 99th percentile (nearest rank) of many requests."""
    ordered = sorted(values)
    last = len(ordered) - 1
    return Figure(
        statistics.median(ordered), ordered[round(0.01 * last)], ordered[round(0.99 * last)]
    )


def markdown_table(rows: Sequence[Row], notes: Sequence[str] = ()) -> str:
    """The rows as a Markdown table, the commands below it, each once, then the notes."""
    lines = [
        "| benchmark | system | precision | case | median | low to high | unit | of the floor |",
        "|---|---|---|---|---:|---:|---|---:|",
    ]
    for row in rows:
        share = "" if row.floor_share is None else f"{row.floor_share:.2f}"
        lines.append(
            f"| {row.benchmark} | {row.system} | {row.precision} | {row.case} "
            f"| {show_number(row.median)} | {show_number(row.low)} to {show_number(row.high)} "
            f"| {row.unit} | {share} |"
        )
    commands = dict.fromkeys(row.command for row in rows)
    lines += ["", *(f"`{command}`" for command in commands)]
    if notes:
        lines += ["", *(f"- {note}" for note in notes)]
    return "\n".join(lines) + "\n"


def describe_machine() -> Machine:
    """This machine, as far as it matters for speed."""
    return Machine(
        cpu=_cpu_model(),
        cores=psutil.cpu_count(logical=False) or os.cpu_count() or 1,
        memory_gib=round(psutil.virtual_memory().total / 2**30),
        flags=tuple(flag for flag in CPU_FLAGS if flag in _cpu_flags()),
        accelerator=_accelerator(),
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        kernels=_kernels(),
    )


def show_number(value: float) -> str:
    """Three digits: no figure here is more exact."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _cpu_info(*names: str) -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in names:
            return value.strip()
    return ""


def _cpu_model() -> str:
    return _cpu_info("model name") or platform.processor() or platform.machine()


def _cpu_flags() -> frozenset[str]:
    return frozenset(_cpu_info("flags", "Features").split())


def _accelerator() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def _kernels() -> str:
    import torch

    from ..kernels.dispatch import select_kernels

    return select_kernels(torch.device("cpu"), torch.bfloat16).name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"
