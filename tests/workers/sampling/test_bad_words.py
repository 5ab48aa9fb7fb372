from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.sampling.bad_words import BadWords

token_ids = st.integers(0, 3)
words_lists = st.lists(st.lists(token_ids, min_size=1, max_size=4), max_size=5)


@given(words_lists, st.lists(token_ids, max_size=8))
def test_bans_exactly_the_ids_that_complete_a_word(
    words: list[list[int]], generated: list[int]
) -> None:
    banned = set(BadWords(words).banned_after(generated))
    for token_id in range(4):
        after = [*generated, token_id]
        completes = any(after[-len(word) :] == word for word in words)
        assert (token_id in banned) == completes


@given(words_lists, st.lists(token_ids, max_size=8))
def test_needs_to_see_no_more_than_its_tail(words: list[list[int]], generated: list[int]) -> None:
    bad_words = BadWords(words)
    tail = generated[len(generated) - bad_words.tail_length :] if bad_words.tail_length else []
    if len(generated) < bad_words.tail_length:
        tail = generated
    assert bad_words.banned_after(tail) == bad_words.banned_after(generated)
