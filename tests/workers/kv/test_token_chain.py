"""Names of prefixes: those of the prefix cache, and different for every difference."""

from __future__ import annotations

import random

import pytest

from inference_pio.workers.kv.manager import KVManager
from inference_pio.workers.kv.token_chain import TokenChain
from inference_pio.workers.sequence import Sequence
from inference_pio.workers.types import GenerateRequest, SamplingParams


def test_full_blocks_have_the_names_of_the_prefix_cache() -> None:
    tokens = tuple(range(10))
    request = GenerateRequest("r", tokens, SamplingParams(), cache_salt="tenant")
    sequence = Sequence.from_request(request, arrival=0.0, max_len=20)
    kv = KVManager(8, 4, b"model")
    assert kv.admit(sequence, 3)
    kv.extend(sequence, 10)
    kv.commit(sequence, 10)
    chain = TokenChain(tokens, 4, b"model", "tenant")
    assert [chain.at(4), chain.at(8)] == sequence.block_hashes


def test_every_difference_gives_another_name() -> None:
    tokens = (1, 2, 3, 4, 5)
    names = [TokenChain(tokens, 2, b"m", "").at(end) for end in range(6)]
    names += [TokenChain(other, 2, b"m", "").at(5) for other in ((1, 2, 3, 4, 6), (9, 2, 3, 4, 5))]
    names += [TokenChain(tokens, 2, b"n", "").at(5), TokenChain(tokens, 2, b"m", "s").at(5)]
    assert len(set(names)) == len(names)


def test_the_order_of_asking_does_not_matter() -> None:
    tokens = tuple(range(9))
    alone = [TokenChain(tokens, 4, b"m", "").at(end) for end in range(10)]
    for seed in range(30):
        chain, ends = TokenChain(tokens, 4, b"m", ""), list(range(10))
        random.Random(seed).shuffle(ends)
        assert all(chain.at(end) == alone[end] for end in ends)


@pytest.mark.parametrize("end", [-1, 4])
def test_tokens_that_are_not_there_have_no_name(end: int) -> None:
    with pytest.raises(ValueError, match=f"there are 3 tokens; {end} cannot be named"):
        TokenChain((1, 2, 3), 2, b"m", "").at(end)


def test_tokens_that_come_later_are_named_too() -> None:
    tokens = [1, 2, 3]
    chain = TokenChain(tokens, 2, b"m", "")
    before = chain.at(3)
    tokens += [4, 5]
    assert chain.at(3) == before
    assert chain.at(5) == TokenChain((1, 2, 3, 4, 5), 2, b"m", "").at(5)
