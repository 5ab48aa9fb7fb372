"""Ends a replica's process soon after its engine has died, so that Serve starts another at once.

Serve's own health check would take several rounds; a process that is gone is seen in the next one.
A loop that hangs is left to that check, whose patience is configured.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable

from ..workers.async_engine import EngineDeadError
from .detached import detached

PERIOD_S = 0.5
LAST_WORDS_S = 0.5
"""For what the engine's end told its requests to go out."""
EXIT_CODE = 3

logger = logging.getLogger(__name__)

Health = Callable[[float], Awaitable[None]]


def watch_engine(health: Health) -> asyncio.Task[None]:
    """Watch an engine until the task is cancelled; call it in the loop that serves calls."""
    return detached(_watch(health))


async def _watch(health: Health) -> None:
    reason = await _death(health)
    logger.error("this replica ends with its engine: %s", reason)
    await asyncio.sleep(LAST_WORDS_S)
    os._exit(EXIT_CODE)


async def _death(health: Health) -> str:
    """Wait for the engine's end and give its reason."""
    while True:
        try:
            await health(PERIOD_S)
        except EngineDeadError as error:
            return str(error)
        except TimeoutError:
            continue  # a long step, or a hang
        await asyncio.sleep(PERIOD_S)
