"""One engine with any mix of arrivals and aborts, in a pool too small for all of them."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.workers.types import FinishReason, RequestError

MakeDriver = Callable[..., Any]
Prompt = Callable[..., list[int]]

PLAIN = {"ignore_eos": True, "loop_guard": False}
GREEDY = PLAIN | {"temperature": 0.0}


@dataclasses.dataclass(frozen=True)
class Plan:
    """One request of a random run."""

    length: int
    n: int
    max_tokens: int | None
    priority: int
    start: int
    abort_at: int | None


PLANS = st.lists(
    st.builds(
        Plan,
        length=st.integers(1, 60),
        n=st.integers(1, 3),
        max_tokens=st.none() | st.integers(1, 30),
        priority=st.integers(0, 2),
        start=st.integers(0, 12),
        abort_at=st.none() | st.integers(0, 25),
    ),
    min_size=1,
    max_size=6,
)


@pytest.fixture(scope="module")
def alone(make_driver: MakeDriver, prompt: Prompt) -> Callable[[int], list[int]]:
    """The greedy continuation of a prompt to the context limit, computed by itself once."""
    driver = make_driver(max_model_len=80)

    def run(length: int) -> list[int]:
        name = str(length)
        if (name, 0) not in driver.chunks:
            driver.add(name, prompt(length), **GREEDY)
            driver.run()
        tokens: list[int] = driver.tokens(name)
        return tokens

    return run


@settings(max_examples=20, deadline=None)
@given(plans=PLANS, budget=st.sampled_from([4, 11, 64]), blocks=st.integers(12, 20))
def test_any_mix_of_arrivals_and_aborts_in_a_small_pool(
    make_driver: MakeDriver,
    prompt: Prompt,
    alone: Callable[[int], list[int]],
    plans: list[Plan],
    budget: int,
    blocks: int,
) -> None:
    driver = make_driver(
        num_blocks=blocks,
        block_size=8,
        max_model_len=80,
        max_num_seqs=4,
        max_batched_tokens=budget,
        default_reservation=2,
    )
    accepted: dict[str, Plan] = {}
    step = 0
    while step <= 12 or driver.engine.has_work:
        for number, plan in enumerate(plans):
            if plan.start == step:
                params = {"n": plan.n, "max_tokens": plan.max_tokens, **GREEDY}
                # Refusals have their own tests; here a request too large just never comes.
                with contextlib.suppress(RequestError):
                    driver.add(str(number), prompt(plan.length), priority=plan.priority, **params)
                    accepted[str(number)] = plan
            if plan.abort_at == step:
                driver.engine.abort(str(number))
        driver.step()
        step += 1
        assert step < 3000, "no progress"
    driver.run()
    assert set(driver.chunks) == {(k, i) for k, plan in accepted.items() for i in range(plan.n)}
    for name, plan in accepted.items():
        expected = alone(plan.length)[: plan.max_tokens]
        for index in range(plan.n):
            tokens = driver.tokens(name, index)
            if driver.end(name, index) is FinishReason.LENGTH:
                assert tokens == expected
            else:
                assert driver.end(name, index) is FinishReason.ABORT
                assert plan.abort_at is not None
                assert tokens == expected[: len(tokens)]


def test_such_a_small_pool_does_preempt(make_driver: MakeDriver, prompt: Prompt) -> None:
    driver = make_driver(
        num_blocks=12, block_size=8, max_model_len=80, max_num_seqs=4, default_reservation=2
    )
    for name in "abc":
        driver.add(name, prompt(20), **GREEDY)
    driver.run()
    assert driver.engine.stats().preemptions > 0
    assert torch.get_num_threads() == 1
