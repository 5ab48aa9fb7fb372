"""Counters of one sequence."""

from __future__ import annotations

import pytest

from inference_pio.workers.sequence import Rank, Sequence, SequenceStatus
from inference_pio.workers.types import GenerateRequest, SamplingParams


def from_request(max_tokens: int | None = None, n: int = 1, max_len: int = 20) -> Sequence:
    request = GenerateRequest(
        "r", (5, 6, 7), SamplingParams(max_tokens=max_tokens, n=n), 2, "salt", deadline_s=4.0
    )
    return Sequence.from_request(request, arrival=10.0, max_len=max_len)


def test_a_new_sequence_knows_its_request() -> None:
    sequence = from_request(n=3)
    assert (sequence.request_id, sequence.index, sequence.priority) == ("r", 0, 2)
    assert (sequence.arrival, sequence.deadline) == (10.0, 14.0)
    assert sequence.cache_salt == "salt"
    assert sequence.num_pending_choices == 2
    assert sequence.status is SequenceStatus.WAITING


def test_counters_follow_the_tokens() -> None:
    sequence = from_request()
    sequence.num_computed_tokens = 3
    sequence.append(8)
    sequence.append(9)
    assert sequence.num_tokens == 5
    assert sequence.num_output_tokens == 2
    assert sequence.output_token_ids == [8, 9]
    assert sequence.num_uncomputed_tokens == 2
    assert sequence.room == 15


@pytest.mark.parametrize(
    ("max_tokens", "max_len", "limit", "reserved"),
    [
        (None, 20, 20, 7),  # 3 of the prompt and 4 by default
        (None, 5, 5, 5),
        (9, 20, 12, 12),  # named: all of it
        (9, 8, 8, 8),
        (1, 20, 4, 4),
    ],
)
def test_the_worst_case_is_what_was_named_or_the_default(
    max_tokens: int | None, max_len: int, limit: int, reserved: int
) -> None:
    sequence = from_request(max_tokens, max_len=max_len)
    assert sequence.max_len == limit
    assert sequence.worst_case_tokens(4) == reserved


def test_a_recomputed_sequence_reserves_beyond_what_it_has() -> None:
    sequence = from_request()
    for _ in range(10):
        sequence.append(1)
    assert sequence.worst_case_tokens(4) == 17


def test_an_empty_prompt_is_refused() -> None:
    request = GenerateRequest("empty", (), SamplingParams())
    with pytest.raises(ValueError, match="empty has an empty prompt"):
        Sequence.from_request(request, arrival=0.0, max_len=4)


def test_a_fork_has_its_own_tokens() -> None:
    parent = from_request(n=2)
    parent.num_computed_tokens = 3
    child = parent.fork(1)
    child.append(4)
    parent.append(8)
    assert (parent.output_token_ids, child.output_token_ids) == ([8], [4])
    assert (child.index, child.num_pending_choices, child.block_table) == (1, 0, [])
    assert (child.request_id, child.cache_salt, child.deadline) == ("r", "salt", 14.0)
    assert child != parent


def test_ranks_compare_field_by_field() -> None:
    assert Rank(1.0, 5.0, 9, 0) < Rank(2.0, 0.0, 0, 0)
    assert Rank(1.0, 4.0, 9, 0) < Rank(1.0, 5.0, 0, 0)
    assert Rank(1.0, 5.0, 3, 1) < Rank(1.0, 5.0, 4, 0)
    assert Rank(1.0, 5.0, 3, 0) < Rank(1.0, 5.0, 3, 1)
