from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.config import Mode
from inference_pio.deployments.routing.pool_choice import (
    PoolLoad,
    hindrance,
    in_turn,
    least_full,
    serves,
)
from inference_pio.workers.types import ThinkingMode

LOADS = st.lists(
    st.builds(
        PoolLoad,
        inside=st.integers(0, 40),
        limit=st.integers(1, 40),
        has_replica=st.booleans(),
    ),
    max_size=8,
)


@given(LOADS)
def test_the_least_full_pool_is_what_trying_all_finds(loads: list[PoolLoad]) -> None:
    best: int | None = None
    for with_replica in (True, False):
        for place, load in enumerate(loads):
            if load.inside >= load.limit or load.has_replica is not with_replica:
                continue
            if best is None or Fraction(load.inside, load.limit) < Fraction(
                loads[best].inside, loads[best].limit
            ):
                best = place
        if best is not None:
            break
    assert least_full(loads) == best


def test_the_first_of_equals_is_taken() -> None:
    assert least_full([PoolLoad(1, 3), PoolLoad(2, 6), PoolLoad(0, 1)]) == 2
    assert least_full([PoolLoad(1, 3), PoolLoad(2, 6)]) == 0
    assert least_full([PoolLoad(1, 1), PoolLoad(7, 7)]) is None


@given(LOADS)
def test_a_hindrance_is_what_the_chosen_pool_lacks(loads: list[PoolLoad]) -> None:
    place = least_full(loads)
    expected = "full"
    if place is not None:
        expected = None if loads[place].has_replica else "unavailable"
    assert hindrance(loads) == expected


@given(st.lists(LOADS.filter(bool), min_size=1, max_size=3))
def test_a_request_is_refused_only_where_nothing_could_take_it(
    routes: list[list[PoolLoad]],
) -> None:
    kept = [hindrance(loads) for loads in routes]
    places = in_turn(kept)
    assert places == sorted(set(places))  # the preference stays
    if None in kept:
        assert [kept[place] for place in places] == [None] * kept.count(None)
    else:
        # One is waited for or refuses, and it refuses only where every pool is full.
        (place,) = places
        every_full = all(load.inside >= load.limit for loads in routes for load in loads)
        assert (least_full(routes[place]) is None) == every_full
        assert place == (0 if every_full else kept.index("unavailable"))


THINK, ANSWER = ThinkingMode.THINKING, ThinkingMode.NON_THINKING


@pytest.mark.parametrize(
    ("modes", "asked", "opened"),
    [
        (("thinking", "non_thinking"), {THINK, ANSWER}, set()),
        (("thinking",), {THINK}, set()),
        (("thinking", "auto"), {THINK}, {THINK}),
        (("auto",), set(), {THINK, ANSWER}),
        (("thinking", "non_thinking", "auto"), {THINK, ANSWER}, {THINK, ANSWER}),
    ],
)
def test_what_a_pools_modes_mean(
    modes: tuple[Mode, ...], asked: set[ThinkingMode], opened: set[ThinkingMode]
) -> None:
    assert {mode for mode in ThinkingMode if serves(modes, mode, is_open=False)} == asked
    assert {mode for mode in ThinkingMode if serves(modes, mode, is_open=True)} == opened
