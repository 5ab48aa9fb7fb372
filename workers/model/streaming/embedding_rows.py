"""The embedding table of a checkpoint, read row by row as tokens come."""

from __future__ import annotations

import os
import weakref

import torch
from torch import Tensor

from ..safetensors_file import STORED_DTYPES, SafetensorsFile
from .errors import WeightReadError


class EmbeddingRows:
    """Some rows of a stored table, on the host, in ``dtype``.

    They are read, not mapped: a mapped file that is cut off while it is in use ends the process
    with a signal, a read says what happened. The pages stay in the system's cache, which takes
    them back where memory is short.
    """

    def __init__(self, file: SafetensorsFile, name: str, rows: range, dtype: torch.dtype) -> None:
        entry = file.entries[name]
        self._path = file.path
        self._stored = STORED_DTYPES[entry.dtype]
        self._dtype = dtype
        self.num_rows = len(rows)
        self._width = entry.shape[1]
        self._row_bytes = self._width * self._stored.itemsize
        self._start = file.offset(name) + rows.start * self._row_bytes
        self._fd = os.open(file.path, os.O_RDONLY)
        self._end = weakref.finalize(self, os.close, self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_RANDOM)

    def look_up(self, ids_T: Tensor) -> Tensor:
        """The rows of some ids, [T, width]. Raises ``WeightReadError``."""
        ids, places_T = torch.unique(ids_T, return_inverse=True)
        found = torch.empty(len(ids), self._width, dtype=self._stored)
        view = found.view(torch.uint8).flatten().numpy().data
        fd, size = self._fd, self._row_bytes
        offsets = [self._start + row * size for row in ids.tolist()]
        for offset in offsets:  # all are under way before the first is waited for
            os.posix_fadvise(fd, offset, size, os.POSIX_FADV_WILLNEED)
        for number, offset in enumerate(offsets):
            try:
                count = os.preadv(fd, [view[number * size : (number + 1) * size]], offset)
            except OSError as error:
                raise WeightReadError(f"{self._path} cannot be read: {error}") from error
            if count != size:
                raise WeightReadError(
                    f"{self._path} was cut off while it was in use: a row of the embedding ends "
                    f"at byte {offset + size}, the file at {offset + count}"
                )
        return found.to(self._dtype)[places_T]

    def close(self) -> None:
        """Close the file."""
        self._end()
