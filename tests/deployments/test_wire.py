from __future__ import annotations

import dataclasses
import pickle

from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.wire import (
    MAX_ROUTE_BLOCKS,
    ROUTE_BLOCK_TOKENS,
    pack,
    route_hints,
    unpack,
)
from inference_pio.workers.types import (
    FinishReason,
    RequestError,
    ThoughtEnd,
    TokenChunk,
    TokenKind,
    TokenLogprob,
    Usage,
)

counts = st.integers(0, 2**31)
tokens = st.lists(st.tuples(st.integers(0, 2**20), st.sampled_from(TokenKind)), max_size=5)
logprob = st.builds(TokenLogprob, st.integers(0, 9), st.floats(-9, 0), st.just(((1, -0.5),)))
chunks = st.builds(
    lambda pairs, **fields: TokenChunk(
        token_ids=tuple(token for token, _ in pairs),
        kinds=tuple(kind for _, kind in pairs),
        **fields,
    ),
    tokens,
    request_id=st.text(max_size=10),
    index=counts,
    first=counts,
    usage=st.builds(Usage, counts, counts, counts, counts),
    thought_end=st.none() | st.sampled_from(ThoughtEnd),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    stop_reason=st.none() | st.text(max_size=3),
    logprobs=st.none() | st.lists(logprob, max_size=2).map(tuple),
    prompt_logprobs=st.none() | st.just((None,)),
)


@given(chunks)
def test_a_chunk_arrives_as_it_was_sent(chunk: TokenChunk) -> None:
    if chunk.finish_reason is None:
        chunk = dataclasses.replace(chunk, stop_reason=None)  # it comes with an end only
    assert unpack(pickle.loads(pickle.dumps(pack(chunk)))) == chunk


def test_errors_keep_their_kind_and_place() -> None:
    error = RequestError("no", param="x", code="y")
    chunk = TokenChunk(
        "r", 0, 0, (), (), Usage(1, 0, 0, 0), finish_reason=FinishReason.ERROR, error=error
    )
    found = unpack(pickle.loads(pickle.dumps(pack(chunk)))).error
    assert isinstance(found, RequestError)
    assert (found.message, found.param, found.code) == ("no", "x", "y")


@given(
    st.lists(st.integers(0, 1), max_size=4),
    st.lists(st.integers(0, 1), max_size=4),
    st.integers(0, ROUTE_BLOCK_TOKENS - 1),
)
def test_two_prompts_share_hashes_as_far_as_their_full_blocks_are_the_same(
    one: list[int], other: list[int], rest: int
) -> None:
    def prompt(blocks: list[int]) -> list[int]:
        return [token for token in blocks for _ in range(ROUTE_BLOCK_TOKENS)] + [9] * rest

    shared = 0
    while shared < min(len(one), len(other)) and one[shared] == other[shared]:
        shared += 1
    mine, theirs = route_hints(prompt(one)).prefix, route_hints(prompt(other)).prefix
    assert (len(mine), len(theirs)) == (len(one), len(other))
    assert mine[:shared] == theirs[:shared]
    assert not set(mine[shared:]) & set(theirs[shared:])


def test_tenants_share_no_hash_and_long_prompts_are_bounded() -> None:
    prompt = range((MAX_ROUTE_BLOCKS + 3) * ROUTE_BLOCK_TOKENS)
    mine = route_hints(prompt, "me", session="s")
    assert mine.session == "s"
    assert len(mine.prefix) == MAX_ROUTE_BLOCKS
    assert not set(mine.prefix) & set(route_hints(prompt, "you").prefix)
    assert len(pickle.dumps(mine)) < 4096
