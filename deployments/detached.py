"""Tasks outside the context of the request that happens to be served.

Serve 2.60 notes in that context which calls a request makes, and cancels them with it; and all of a
request's calls share one id, so that two to one deployment at a time keep its router busy for ever.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


def detached(work: Coroutine[Any, Any, T]) -> asyncio.Task[T]:
    """Start a task in an empty context: it outlives the request that started it."""
    return asyncio.create_task(work, context=contextvars.Context())
