"""Places in one stretch of memory never overlap, and freed memory is one gap again."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.arena import ALIGNMENT, Arena
from inference_pio.workers.kv.block import IntegrityError

SIZE = 16 * ALIGNMENT


@given(st.lists(st.tuples(st.booleans(), st.integers(1, SIZE + 1)), max_size=60))
def test_places_are_apart_and_everything_comes_back(steps: list[tuple[bool, int]]) -> None:
    arena = Arena(SIZE)
    taken: dict[int, int] = {}
    for wants, number in steps:
        if wants:
            place = arena.take(number)
            if place is None:
                held = sorted((p, -(-n // ALIGNMENT) * ALIGNMENT) for p, n in taken.items())
                edges = [0, *(p + n for p, n in held)]
                gaps = [b - a for a, b in zip(edges, [*(p for p, _ in held), SIZE], strict=True)]
                assert max(gaps) < number, "there was room"
            else:
                assert place % ALIGNMENT == 0
                assert place + number <= SIZE
                assert all(p + n <= place or place + number <= p for p, n in taken.items())
                taken[place] = number
        elif taken:
            place = sorted(taken)[number % len(taken)]
            del taken[place]
            arena.free(place)
        arena.check_integrity()
    for place in taken:
        arena.free(place)
    assert arena.used == 0
    assert arena.take(SIZE) == 0


def test_a_place_is_freed_once() -> None:
    arena = Arena(SIZE)
    place = arena.take(1)
    assert place is not None
    arena.free(place)
    with pytest.raises(KeyError):
        arena.free(place)


def test_wrong_sizes_are_refused() -> None:
    for size in (0, ALIGNMENT + 1):
        with pytest.raises(ValueError, match=f"got {size}"):
            Arena(size)
    with pytest.raises(ValueError, match="at least one byte"):
        Arena(SIZE).take(0)


def test_broken_books_are_noticed() -> None:
    for gaps in ([(0, SIZE - ALIGNMENT)], [(0, ALIGNMENT), (ALIGNMENT, SIZE)]):
        arena = Arena(SIZE)
        arena._gaps = gaps
        with pytest.raises(IntegrityError):
            arena.check_integrity()
