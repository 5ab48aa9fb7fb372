"""Pages on a disk: one file without a name, and the one thread that reads and writes it.

1. The file is made where there is room for it, and has no name from the first moment: it is gone
   with its last descriptor, however the process ends.
2. ``submit`` queues a job; reads go before writes, for a sequence waits for them.
3. The thread runs one job after another; what goes wrong is noted in the job, never raised.
4. ``collect`` hands finished jobs back in the caller's thread; ``wait`` sleeps until it would.
5. ``close`` ends the thread after the job it is at; it closes the file.
"""

from __future__ import annotations

import errno
import logging
import os
import shutil
import tempfile
import threading
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from isal.isal_zlib import crc32

from ..types import BlockHash
from .ticket import Buffer
from .tier import Page

logger = logging.getLogger(__name__)

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


def page_checksum(name: BlockHash, content: Buffer) -> int:
    """CRC-32 over a block's name and bytes, so that another block's bytes do not pass for it."""
    return crc32(content, crc32(name))


@dataclass(slots=True, eq=False)
class PageWrite:
    """Bytes on their way to a page's slot; they may not change until the job is back."""

    page: Page
    content: Buffer
    error: str | None = None
    """Why it failed, as a stable word."""

    def run(self, file: int) -> None:
        """Write in full."""
        offset = self.page.slot * self.content.nbytes
        view = self.content.data
        while view:
            written = os.pwrite(file, view, offset)
            view, offset = view[written:], offset + written


@dataclass(slots=True, eq=False)
class PageRead:
    """Pages on their way from their slots into memory, one behind the other."""

    pages: tuple[Page, ...]
    into: Buffer
    num_good: int = 0
    """Leading pages that are here and whose checksum is right."""
    error: str | None = None
    """What is wrong with the one behind them, as a stable word."""
    seconds: float = 0.0
    is_done: bool = False
    """Set in the caller's thread, once the job was collected."""

    def run(self, file: int) -> None:
        """Read and check page after page, up to the first that is damaged."""
        begin = time.perf_counter()
        size = self.into.nbytes // len(self.pages)
        for number, page in enumerate(self.pages):
            content = self.into[number * size : (number + 1) * size]
            if not _read_fully(file, content.data, page.slot * size):
                self.error = "truncated"
                break
            if page_checksum(page.name, content) != page.checksum:
                self.error = "checksum"
                break
            self.num_good += 1
        self.seconds = time.perf_counter() - begin


Job = PageWrite | PageRead


class PageFile:
    """A nameless file of up to ``num_bytes`` in ``folder``, and its thread.

    Raises ``ValueError`` for a folder that cannot be used or has no room.
    """

    def __init__(self, folder: Path | None, num_bytes: int) -> None:
        self._file = _open_nameless(folder, num_bytes)
        self._changed = threading.Condition()
        self._reads: deque[PageRead] = deque()
        self._writes: deque[PageWrite] = deque()
        self._done: deque[Job] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="kv-pages", daemon=True)
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, job: Job) -> None:
        """Queue a job; it comes back through ``collect``, unless the file is closed first."""
        with self._changed:
            if isinstance(job, PageRead):
                self._reads.append(job)
            else:
                self._writes.append(job)
            self._changed.notify_all()

    def collect(self) -> list[Job]:
        """The jobs that have finished since it was last called."""
        if not self._done:
            return []
        with self._changed:
            done, self._done = list(self._done), deque()
        return done

    def wait(self, timeout: float) -> None:
        """Return as soon as ``collect`` would give something, after ``timeout`` seconds at most."""
        with self._changed:
            self._changed.wait_for(lambda: self._done, timeout)

    def close(self, timeout: float = 10.0) -> None:
        """End the thread; jobs that it has not begun are dropped.

        A disk that hangs is left alone after ``timeout`` seconds: the thread goes with the process.
        """
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        self._thread.join(timeout)
        if self._thread.is_alive():
            logger.warning("the disk of the KV pages has not answered for %s s", timeout)

    def _run(self) -> None:
        try:
            while (job := self._next()) is not None:
                self._do(job)
                with self._changed:
                    self._done.append(job)
                    self._changed.notify_all()
        finally:
            os.close(self._file)

    def _next(self) -> Job | None:
        with self._changed:
            self._changed.wait_for(lambda: self._closing or self._reads or self._writes)
            if self._closing:
                return None
            return self._reads.popleft() if self._reads else self._writes.popleft()

    def _do(self, job: Job) -> None:
        what = "read" if isinstance(job, PageRead) else "write"
        try:
            job.run(self._file)
        except OSError as error:
            logger.warning("KV pages: %s failed: %s", what, error)
            job.error = "no_room" if error.errno in _NO_ROOM else f"{what}_failed"
        except Exception:  # else everyone who waits for a job would wait for ever
            logger.exception("KV pages: %s failed", what)
            job.error = f"{what}_failed"


def _read_fully(file: int, view: memoryview, offset: int) -> bool:
    """Whether the file has as many bytes there as the view."""
    while view:
        count = os.preadv(file, [view], offset)
        if count == 0:
            return False
        view, offset = view[count:], offset + count
    return True


def _open_nameless(folder: Path | None, num_bytes: int) -> int:
    where = Path(tempfile.gettempdir()) if folder is None else folder.expanduser()
    try:
        where.mkdir(mode=0o700, parents=True, exist_ok=True)
        free = shutil.disk_usage(where).free
        if free < num_bytes:
            raise ValueError(
                f"kv_paging.disk_bytes is {num_bytes}, but {where} has {free} bytes free; lower "
                "it, or name a folder on another disk as kv_paging.folder"
            )
        # Without a name, for this user alone (0600), and closed in programs that are started.
        with tempfile.TemporaryFile(dir=where) as file:
            # A copy of the descriptor: this process says when it is closed, not the collector.
            return os.dup(file.fileno())
    except OSError as error:
        raise ValueError(f"kv_paging.folder cannot be used: {error}") from error
