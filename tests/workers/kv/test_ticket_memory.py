"""Memory of tickets: lent to one holder at a time, and used again."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.kv.tensor_words import as_tensor
from inference_pio.workers.kv.ticket import Buffer
from inference_pio.workers.kv.ticket_memory import TicketMemory


def address(array: Any) -> int:
    place: int = array.__array_interface__["data"][0]
    return place


def test_memory_is_used_again_for_a_ticket_of_any_size() -> None:
    memory = TicketMemory(100)
    places, others = set(), []
    for size in (100, 3, 60, 100):
        array = memory.take(size)
        array[...] = 7
        assert (array.dtype, array.shape, array.flags.c_contiguous) == (np.uint8, (size,), True)
        places.add(address(array))
        del array
        others.append(np.empty(100, np.uint8))  # takes the place, were it free for anyone
    assert len(places) == 1


HOLDERS: dict[str, Callable[[Buffer], Any]] = {
    "the array": lambda array: array,
    "a view": lambda array: array[10:20],
    "a view of a view": lambda array: array[10:30][2:4],
    "words": lambda array: array.view(np.int16).reshape(2, 8, 4),
    "a tensor": lambda array: as_tensor(array.view(np.int16), "bfloat16")[3:],
    "a memoryview": lambda array: memoryview(array)[5:],
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_memory_stays_lent_for_as_long_as_anyone_can_read_it(holder: str) -> None:
    memory = TicketMemory(128)
    array = memory.take(128)
    place = address(array)
    held = [HOLDERS[holder](array)]
    del array
    gc.collect()
    other = memory.take(128)
    assert address(other) != place
    held.clear()
    stranger = np.empty(128, np.uint8)
    again = memory.take(128)
    assert address(stranger) != place
    assert address(again) == place, "back once the last holder has left"


def test_no_more_than_two_are_kept() -> None:
    memory = TicketMemory(2**20)
    tracemalloc.start()
    try:
        tickets = [memory.take(1) for _ in range(5)]
        assert tracemalloc.get_traced_memory()[0] > 5 * 2**20
        tickets.clear()
        assert 2 * 2**20 < tracemalloc.get_traced_memory()[0] < 3 * 2**20
    finally:
        tracemalloc.stop()


def test_a_ticket_that_is_larger_than_the_largest_is_refused() -> None:
    with pytest.raises(ValueError, match="100 bytes at most, got 101"):
        TicketMemory(100).take(101)


_EVENTS = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(1, 64)),
        st.tuples(st.just("drop"), st.integers(0, 2**16)),
        st.tuples(st.just("keep a view"), st.integers(0, 2**16)),
    ),
    max_size=60,
)


@given(_EVENTS)
def test_what_is_held_is_never_overwritten(events: list[tuple[str, int]]) -> None:
    memory = TicketMemory(64)
    held: list[tuple[Buffer, int]] = []
    for mark, (event, number) in enumerate(events):
        if event == "take":
            array = memory.take(number)
            array[...] = mark
            held.append((array, mark))
            del array
        elif held and event == "drop":
            held.pop(number % len(held))
        elif held:
            array, old = held[number % len(held)]
            held[number % len(held)] = (array[len(array) // 2 :], old)
            del array
        assert all((array == mark).all() for array, mark in held)


def test_tickets_are_dropped_in_other_threads() -> None:
    """The engine's thread takes, others let go."""
    memory = TicketMemory(4096)
    faults: list[str] = []

    def read(array: Buffer, mark: int) -> None:
        for _ in range(20):
            if not (array == mark).all():
                faults.append(f"the ticket of {mark} was overwritten")

    threads = []
    for mark in range(200):
        array = memory.take(4096)
        array[...] = mark % 251
        threads.append(threading.Thread(target=read, args=(array, mark % 251)))
        del array
        threads[-1].start()
        if mark % 4 == 3:
            threads[mark - 3].join()
    for thread in threads:
        thread.join()
    assert faults == []
