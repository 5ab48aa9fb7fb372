"""The memory of an engine's tickets: used again, and never while a ticket is still to be sent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from inference_pio.workers.kv.ticket import Buffer, read_header
from inference_pio.workers.types import PrefillRequest

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]


def tickets(engine: Any, attempt: int, token_ids: list[int]) -> Iterator[Buffer]:
    """Those of one prefill, of which the engine holds none when it is asked for the next."""
    engine.add_prefill(
        PrefillRequest("p", attempt, 1, tuple(token_ids), start=0, cache_salt="", deadline_s=60.0)
    )
    while engine.has_work:
        found = engine.step().tickets
        while found:
            yield found.pop().buffer


def test_tickets_that_are_held_stay_as_they_were(make_driver: MakeDriver, prompt: Prompt) -> None:
    engine = make_driver(max_batched_tokens=16).engine
    held, copied = [], []
    for attempt in range(3):
        for buffer in tickets(engine, attempt, prompt(100, attempt)):
            held.append(buffer)
            copied.append(buffer.copy())
    assert len(held) == 3 * 7
    assert all(np.array_equal(*pair) for pair in zip(held, copied, strict=True))
    assert [read_header(buffer).attempt for buffer in held] == [0] * 7 + [1] * 7 + [2] * 7


def test_memory_of_tickets_that_were_dropped_is_used_again(
    make_driver: MakeDriver, prompt: Prompt
) -> None:
    engine = make_driver(max_batched_tokens=16).engine
    places = [buffer.ctypes.data for buffer in tickets(engine, 0, prompt(100))]
    assert len(places) == 7
    assert len(set(places)) <= 2, "one is made while the one before is sent"
