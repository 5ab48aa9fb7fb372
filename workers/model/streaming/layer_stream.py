"""Layers read from a file round and round, each ahead of its use.

1. ``start`` launches a thread that reads layer after layer into the slot that is free, and begins
   anew behind the last: the first layers of a step are read while the step before it ends.
2. ``layer`` waits for the layer that is wanted next and gives its memory; leaving the block frees
   the slot, and the thread reads on. Layers are wanted in their order; what lies before the wanted
   one, where a step was given up midway, is passed over.
3. What the thread cannot read, it keeps as the error of every later ``layer``, and ends.
4. ``close`` ends the thread, waits for it and closes the file.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import WeightReadError
from .residency import NUM_SLOTS
from .weight_file import WeightFile

_HUGE_PAGE = 2 << 20


@dataclass(frozen=True, slots=True)
class StreamStats:
    """What streaming has cost since the model was loaded."""

    num_bytes: int = 0
    """Read from the disk."""
    wait_s: float = 0.0
    """Time for which a step stood still because its next layer was not there."""


class LayerStream:
    """``num_layers`` layers of a ``WeightFile``, which belongs to the stream from here on.

    One thread calls ``layer``. Progress is two counts over all rounds together: layers read and
    layers done with; layer ``n`` of the count is in slot ``n % NUM_SLOTS``.
    """

    def __init__(self, file: WeightFile, num_layers: int) -> None:
        self._file = file
        self.num_layers = num_layers
        self.layer_bytes = file.layer_bytes
        self.slots = tuple(aligned_memory(file.layer_bytes) for _ in range(NUM_SLOTS))
        """uint8, each of the size of a layer."""
        self._changed = threading.Condition()
        self._num_read = 0
        self._num_done = 0
        self._wait_s = 0.0
        self._failure: Exception | None = None
        self._closing = False
        self._thread = threading.Thread(target=self._read_on, name="weights", daemon=True)

    def start(self) -> None:
        """Begin to read; the file holds every layer."""
        self._thread.start()

    @contextmanager
    def layer(self, index: int) -> Iterator[Tensor]:
        """The memory that holds a layer, until the block is left.

        Raises ``WeightReadError`` where it cannot be read.
        """
        while self._num_done % self.num_layers != index:
            self._wait_for(self._num_done)
            self._finish()
        number = self._num_done
        self._wait_for(number)
        try:
            yield self.slots[number % NUM_SLOTS]
        finally:
            self._finish()

    def stats(self) -> StreamStats:
        """What it has cost so far."""
        return StreamStats(self._num_read * self._file.layer_bytes, self._wait_s)

    def fileno(self) -> int:
        """The open file, as the system numbers it."""
        return self._file.fileno()

    def close(self) -> None:
        """End the thread and give the file's space back."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread.is_alive():
            self._thread.join()
        self._file.close()

    def check_integrity(self) -> None:
        """Raise ``AssertionError`` where the counts cannot be."""
        with self._changed:
            ahead = self._num_read - self._num_done
            assert 0 <= ahead <= NUM_SLOTS, f"{ahead} layers are ahead in {NUM_SLOTS} slots"

    def _wait_for(self, number: int) -> None:
        """Until so many layers and one more were read."""
        with self._changed:
            if self._num_read <= number:
                begin = time.perf_counter()
                self._changed.wait_for(
                    lambda: self._num_read > number or self._failure or self._closing
                )
                self._wait_s += time.perf_counter() - begin
            if self._closing:
                raise WeightReadError(f"{self._file.name} is closed")
            if self._num_read <= number:
                assert self._failure is not None
                raise WeightReadError(str(self._failure)) from self._failure

    def _finish(self) -> None:
        with self._changed:
            self._num_done += 1
            self._changed.notify_all()

    def _read_on(self) -> None:
        views = [slot.numpy().data for slot in self.slots]
        try:
            while self._wait_for_slot():
                number = self._num_read
                view = views[number % NUM_SLOTS]
                self._file.read(number % self.num_layers, view, lambda: self._closing)
                with self._changed:
                    self._num_read += 1
                    self._changed.notify_all()
        except Exception as error:
            with self._changed:
                self._failure = error
                self._changed.notify_all()

    def _wait_for_slot(self) -> bool:
        """Until a slot is free; false once the stream is to end."""
        with self._changed:
            self._changed.wait_for(
                lambda: self._closing or self._num_read - self._num_done < NUM_SLOTS
            )
            return not self._closing


def aligned_memory(size: int) -> Tensor:
    """uint8 at the border of a huge page, on such pages where the system gives them."""
    mapping = mmap.mmap(-1, size + _HUGE_PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    mapping.madvise(mmap.MADV_HUGEPAGE)
    address = ctypes.addressof(ctypes.c_byte.from_buffer(mapping))
    whole = torch.frombuffer(mapping, dtype=torch.uint8)
    skipped = -address % _HUGE_PAGE
    return whole[skipped : skipped + size]
