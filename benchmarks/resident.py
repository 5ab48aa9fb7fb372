"""How much memory this process has: asked of the kernel, and of CUDA's allocator."""

from __future__ import annotations

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

_PROCESS = Path("/proc/self")
_KIB = 1024


@dataclass(frozen=True, slots=True)
class Resident:
    """Bytes at one moment.

    Pages of mapped files count while they are in memory, also where other processes share them.
    """

    total: int
    """Resident set size."""
    proportional: int
    """The same with shared pages divided by the processes that share them (PSS)."""
    peak: int
    """The largest ``total`` since the process began."""
    device: int = 0
    """Allocated by tensors on a CUDA device."""
    device_peak: int = 0


def give_back_free() -> None:
    """Have the C library return what it holds free, where it can (glibc): it may be gigabytes."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def resident(*, cuda: bool = False) -> Resident:
    """What this process has now. Raises ``OSError`` where there is no /proc."""
    gc.collect()
    rollup, status = _kib_fields("smaps_rollup"), _kib_fields("status")
    device = device_peak = 0
    if cuda:
        import torch

        torch.cuda.synchronize()
        device, device_peak = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    return Resident(
        total=rollup["Rss"],
        proportional=rollup["Pss"],
        peak=max(status["VmHWM"], rollup["Rss"]),
        device=device,
        device_peak=device_peak,
    )


def _kib_fields(name: str) -> dict[str, int]:
    """The lines ``Name: number kB`` of a file of the kernel, in bytes."""
    fields = {}
    for line in (_PROCESS / name).read_text().splitlines():
        key, _, value = line.partition(":")
        if value.endswith(" kB"):
            fields[key] = int(value.removesuffix("kB")) * _KIB
    return fields
