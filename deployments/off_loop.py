"""Keeps long work off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
INLINE_CHARS = 4096
"""Text up to this length is worked on in the event loop: under a millisecond, less than a hop."""


class OffLoop:
    """A few threads for the work of all requests."""

    def __init__(self) -> None:
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")

    async def run(self, work: Callable[[], T], size: int) -> T:
        """Run small work here and large work in a thread; ``size`` in characters."""
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
