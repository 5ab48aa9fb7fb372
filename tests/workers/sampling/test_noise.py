from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.sampling.noise import choice_seed, uniform

seeds = st.integers(-(2**63), 2**64)


@given(seeds, st.integers(0, 2**31))
def test_is_a_function_of_seed_and_step_in_the_unit_interval(seed: int, step: int) -> None:
    assert 0.0 <= uniform(seed, step) < 1.0
    assert uniform(seed, step) == uniform(seed, step)


def test_fills_the_unit_interval_evenly_along_steps_and_along_seeds() -> None:
    for numbers in (
        [uniform(0, step) for step in range(20_000)],
        [uniform(seed, 0) for seed in range(20_000)],
        [uniform(choice_seed(7, index), 3) for index in range(20_000)],
    ):
        counts, _ = np.histogram(numbers, bins=100, range=(0.0, 1.0))
        # 99 degrees of freedom: 160 is passed by chance once in ten thousand such lists.
        assert ((counts - 200) ** 2 / 200).sum() < 160


def test_neighbours_are_not_alike() -> None:
    table = np.array([[uniform(seed, step) for step in range(200)] for seed in range(200)])
    for one, other in ((table[:-1], table[1:]), (table[:, :-1], table[:, 1:])):
        assert abs(np.corrcoef(one.ravel(), other.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(table[:-1, 1:].ravel(), table[1:, :-1].ravel())[0, 1]) < 0.02


@given(seeds, st.integers(0, 127))
def test_a_given_seed_decides_alone(seed: int, index: int) -> None:
    first = choice_seed(seed, index, engine_seed=1, request_id="a")
    assert first == choice_seed(seed, index, engine_seed=2, request_id="b")


def test_without_a_seed_engine_and_request_decide() -> None:
    given_seeds = {
        choice_seed(None, index, engine_seed=engine_seed, request_id=request_id)
        for index in range(3)
        for engine_seed in range(3)
        for request_id in ("a", "b", "c")
    }
    assert len(given_seeds) == 27
    assert choice_seed(None, 1, engine_seed=1, request_id="a") in given_seeds
