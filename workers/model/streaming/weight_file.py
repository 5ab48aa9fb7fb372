"""Packed layers on a disk, in a file without a name.

Nothing else can cut the file off or change it, and the system frees it however the process ends.
Reads and writes go past the page cache where the file system allows that (``O_DIRECT``): the cache
would hold a second copy of what is read once a step, at the cost of the memory that streaming is
to save, and of a copy by the CPU for each byte.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from .errors import WeightReadError

BLOCK = 4096
"""Offsets, lengths and addresses are multiples of it: what direct access asks of any disk today."""
CHUNK = 8 << 20
"""Bytes of one read: large enough for the full rate of a disk, small enough to be stopped between
two. On the machine of the figures in docs/offload.md, 1 MiB gave half the rate of 8 MiB."""
_IN_MEMORY = {"tmpfs", "ramfs"}


class WeightFile:
    """Room for ``num_layers`` layers of ``layer_bytes`` each, a multiple of ``BLOCK``.

    Raises ``ValueError`` where ``folder`` has no room or is itself in memory.
    """

    def __init__(self, folder: Path, *, num_layers: int, layer_bytes: int) -> None:
        assert layer_bytes % BLOCK == 0
        self.layer_bytes = layer_bytes
        self.name = f"the file of streamed weights in {folder}"
        folder.mkdir(parents=True, exist_ok=True)
        if _file_system(folder) in _IN_MEMORY:
            raise ValueError(
                f"{folder} is in memory ({_file_system(folder)}): weights put there save none; "
                "set XDG_CACHE_HOME to a folder on a disk"
            )
        self._fd, path = tempfile.mkstemp(dir=folder)
        os.unlink(path)
        size = num_layers * layer_bytes
        try:
            os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            os.close(self._fd)
            raise ValueError(
                f"{folder} has no room for {size} bytes of streamed weights ({error.strerror}); "
                "raise weight_memory_bytes, or set XDG_CACHE_HOME to a larger disk"
            ) from error
        self.is_direct = self._go_past_the_cache()

    def write(self, index: int, layer: memoryview) -> None:
        """Write a whole layer from memory at a multiple of ``BLOCK``."""
        start = index * self.layer_bytes
        for offset in range(0, self.layer_bytes, CHUNK):
            part = layer[offset : offset + CHUNK]
            if os.pwritev(self._fd, [part], start + offset) != len(part):
                raise WeightReadError(f"{self.name} took only a part of layer {index}")
        if not self.is_direct:
            os.fsync(self._fd)  # only pages that are on the disk can be dropped
            self._drop_from_cache(start)

    def read(self, index: int, into: memoryview, stopped: Callable[[], bool]) -> None:
        """Read a whole layer into memory at a multiple of ``BLOCK``; gives up where ``stopped``.

        Raises ``WeightReadError``.
        """
        start = index * self.layer_bytes
        for offset in range(0, self.layer_bytes, CHUNK):
            if stopped():
                return
            part = into[offset : offset + CHUNK]
            try:
                count = os.preadv(self._fd, [part], start + offset)
            except OSError as error:
                raise WeightReadError(f"{self.name} cannot be read: {error}") from error
            if count != len(part):
                raise WeightReadError(
                    f"{self.name} ended at byte {start + offset + count}; streamed layer {index} "
                    f"goes on to {start + self.layer_bytes}"
                )
        if not self.is_direct:
            self._drop_from_cache(start)

    def fileno(self) -> int:
        """The open file, as the system numbers it."""
        return self._fd

    def close(self) -> None:
        """Give the disk's space back; once is enough."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd = -1  # the number may soon be another file's

    def _go_past_the_cache(self) -> bool:
        flags = fcntl.fcntl(self._fd, fcntl.F_GETFL)
        with contextlib.suppress(OSError):  # as file systems without it answer
            fcntl.fcntl(self._fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        return bool(fcntl.fcntl(self._fd, fcntl.F_GETFL) & os.O_DIRECT)

    def _drop_from_cache(self, start: int) -> None:
        os.posix_fadvise(self._fd, start, self.layer_bytes, os.POSIX_FADV_DONTNEED)


def _file_system(folder: Path) -> str:
    """The kind of file system that a folder is on, as the system calls it."""
    device = folder.stat().st_dev
    wanted = f"{os.major(device)}:{os.minor(device)}"
    for line in Path("/proc/self/mountinfo").read_text().splitlines():
        fields = line.split()
        if fields[2] == wanted:
            return fields[fields.index("-") + 1]
    return "unknown"
