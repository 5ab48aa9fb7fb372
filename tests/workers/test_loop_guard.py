from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.config import LoopGuardConfig
from inference_pio.workers.loop_guard import LoopGuard

configs = st.builds(
    LoopGuardConfig,
    min_repeats=st.integers(2, 5),
    min_tokens=st.integers(8, 20),
    max_period=st.integers(1, 9),
)


def ends_in_loop(token_ids: list[int], config: LoopGuardConfig) -> bool:
    """The definition, by comparing the list with itself shifted."""
    for period in range(1, config.max_period + 1):
        length = max(config.min_repeats * period, config.min_tokens)
        tail = token_ids[-length:]
        if len(tail) == length and tail[period:] == tail[:-period]:
            return True
    return False


@given(configs, st.lists(st.integers(0, 2), max_size=120))
def test_agrees_with_the_definition_after_every_token(
    config: LoopGuardConfig, token_ids: list[int]
) -> None:
    guard = LoopGuard(config)
    for count, token_id in enumerate(token_ids, start=1):
        assert guard.append(token_id) == ends_in_loop(token_ids[:count], config)


@given(configs, st.lists(st.integers(0, 9), max_size=30), st.data())
def test_finds_every_loop_as_soon_as_it_is_long_enough(
    config: LoopGuardConfig, before: list[int], data: st.DataObject
) -> None:
    period = data.draw(st.integers(1, config.max_period))
    unit = data.draw(st.permutations(range(100, 100 + period)))
    length = max(config.min_repeats * period, config.min_tokens)
    loop = [unit[position % period] for position in range(length)]
    guard = LoopGuard(config)
    for token_id in before:
        guard.append(token_id)
    assert [guard.append(token_id) for token_id in loop] == [False] * (length - 1) + [True]


@given(configs, st.lists(st.integers(0, 1), max_size=40), st.lists(st.integers(0, 1), max_size=40))
def test_a_fork_goes_on_alone(config: LoopGuardConfig, before: list[int], after: list[int]) -> None:
    guard, control = LoopGuard(config), LoopGuard(config)
    for token_id in before:
        guard.append(token_id)
        control.append(token_id)
    fork = guard.fork()
    for token_id in after:
        fork.append(1 - token_id)
    assert [guard.append(token_id) for token_id in after] == [
        control.append(token_id) for token_id in after
    ]


def test_the_default_lets_a_list_of_numbers_pass() -> None:
    guard = LoopGuard(LoopGuardConfig())
    numbered = [token for number in range(200) for token in (7, 1000 + number, 8, 9)]
    assert not any(guard.append(token_id) for token_id in numbered)
