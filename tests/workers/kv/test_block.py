"""Names of KV blocks."""

from __future__ import annotations

import hashlib

from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.kv.block import chain_hash, pack_tokens, root_hash

TOKENS = st.lists(st.integers(0, 2**32 - 1), max_size=8)


@given(TOKENS)
def test_packed_tokens_are_little_endian_uint32(tokens: list[int]) -> None:
    packed = pack_tokens(tokens)
    assert packed == b"".join(token.to_bytes(4, "little") for token in tokens)


def test_a_name_is_sha256_over_parent_and_tokens() -> None:
    parent = root_hash(b"model", "salt")
    expected = hashlib.sha256(parent + bytes([1, 0, 0, 0, 2, 1, 0, 0])).digest()
    assert chain_hash(parent, pack_tokens([1, 258])) == expected


@given(
    st.tuples(st.binary(max_size=4), st.text(max_size=4)),
    st.tuples(st.binary(max_size=4), st.text(max_size=4)),
)
def test_roots_differ_where_model_or_salt_differ(
    a: tuple[bytes, str], b: tuple[bytes, str]
) -> None:
    assert (root_hash(*a) == root_hash(*b)) == (a == b)


def test_a_border_between_model_and_salt_cannot_be_moved() -> None:
    assert root_hash(b"model-a", "b") != root_hash(b"model-", "ab")


def test_a_salt_may_hold_a_lone_surrogate() -> None:
    assert root_hash(b"model", "\ud800") != root_hash(b"model", "?")


@given(TOKENS, TOKENS, TOKENS, TOKENS)
def test_chains_agree_exactly_where_the_blocks_do(
    a: list[int], b: list[int], c: list[int], d: list[int]
) -> None:
    root = root_hash(b"model", "")
    left = chain_hash(chain_hash(root, pack_tokens(a)), pack_tokens(b))
    right = chain_hash(chain_hash(root, pack_tokens(c)), pack_tokens(d))
    assert (left == right) == ((a, b) == (c, d))
