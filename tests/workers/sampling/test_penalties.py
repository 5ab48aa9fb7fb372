from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.sampling.penalties import PenaltyState
from inference_pio.workers.sampling.resolve import RepetitionWindow
from inference_pio.workers.types import TokenKind

token_ids = st.integers(0, 300)
prompts = st.lists(token_ids, max_size=100)
outputs = st.lists(st.tuples(token_ids, st.sampled_from(TokenKind)), max_size=200)


def counted(state: PenaltyState) -> dict[int, int]:
    generated = state.generated
    return dict(zip(generated.ids.tolist(), generated.counts.tolist(), strict=True))


def window(state: PenaltyState, window: RepetitionWindow) -> list[int]:
    return sorted(state.window(window).ids.tolist())


@given(prompts, outputs, st.integers(0, 200))
def test_counts_by_brute_force(
    prompt: list[int], output: list[tuple[int, TokenKind]], first_asked: int
) -> None:
    state = PenaltyState(prompt)
    for place, (token_id, kind) in enumerate(output):
        if place == first_asked:
            state.window(RepetitionWindow.SEQUENCE)
        state.append(token_id, kind)
    assert counted(state) == Counter(token_id for token_id, _ in output)
    assert window(state, RepetitionWindow.SEQUENCE) == sorted(
        {*prompt, *(token_id for token_id, _ in output)}
    )
    assert window(state, RepetitionWindow.THOUGHT) == sorted(
        {token_id for token_id, kind in output if kind is TokenKind.THOUGHT}
    )
    assert window(state, RepetitionWindow.ANSWER) == sorted(
        {token_id for token_id, kind in output if kind in (TokenKind.CONTENT, TokenKind.TOOL_CALL)}
    )


@given(prompts, outputs, outputs)
def test_a_fork_goes_on_alone(
    prompt: list[int], before: list[tuple[int, TokenKind]], after: list[tuple[int, TokenKind]]
) -> None:
    state = PenaltyState(prompt)
    for token_id, kind in before:
        state.append(token_id, kind)
    expected = counted(state), window(state, RepetitionWindow.SEQUENCE)
    fork = state.fork()
    for token_id, kind in after:
        fork.append(token_id, kind)
    assert (counted(state), window(state, RepetitionWindow.SEQUENCE)) == expected
    assert counted(fork) == Counter(token_id for token_id, _ in before + after)
