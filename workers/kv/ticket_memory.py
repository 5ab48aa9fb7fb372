"""Memory for tickets, used again once nobody holds the ticket that lay in it.

Memory that is fresh from the system is handed out and zeroed page by page as it is first touched,
which costs a multiple of copying a ticket into it. So each array of ``take`` lies over memory that
is lent to it and comes back when the array and all views of it are gone. Whoever still reads a
ticket holds one of them: what is still to be sent cannot be overwritten, and a ticket that is
dropped on its way is not lost to anyone.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np

from .ticket import Buffer

_KEPT = 2
"""One ticket is filled while the one before is copied out. More at once are fresh memory."""


def _new(num_bytes: int) -> Buffer:
    return np.empty(num_bytes, np.uint8)


class TicketMemory:
    """Lends memory for tickets of at most ``max_bytes``. Arrays may be dropped in any thread.

    ``new`` makes fresh memory of so many bytes.
    """

    def __init__(self, max_bytes: int, new: Callable[[int], Buffer] = _new) -> None:
        self._max_bytes = max_bytes
        self._new = new
        self._free: deque[Buffer] = deque(maxlen=_KEPT)

    def take(self, num_bytes: int) -> Buffer:
        """An array of ``num_bytes`` whose content is undefined, and the caller's alone.

        Raises ``ValueError`` for more than ``max_bytes``.
        """
        if num_bytes > self._max_bytes:
            raise ValueError(f"a ticket has {self._max_bytes} bytes at most, got {num_bytes}")
        try:
            memory = self._free.pop()
        except IndexError:
            # All of one size, so that any ticket fits; pages behind its end are never touched.
            memory = self._new(self._max_bytes)
        return np.asarray(_Lent(memory, num_bytes, self._free))


class _Lent:
    """What an array's memory belongs to: it lives as long as the array and its views."""

    def __init__(self, memory: Buffer, num_bytes: int, free: deque[Buffer]) -> None:
        self._memory = memory
        self._num_bytes = num_bytes
        self._free = free

    @property
    def __array_interface__(self) -> dict[str, Any]:
        return self._memory[: self._num_bytes].__array_interface__

    def __del__(self) -> None:
        self._free.append(self._memory)
