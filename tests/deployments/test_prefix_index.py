from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.prefix_index import PrefixIndex
from inference_pio.workers.kv.block import IntegrityError

texts = st.lists(st.integers(0, 2), max_size=6).map(tuple)
"""Few letters, so that prompts share prefixes."""
CAPACITY = 7


def chain(text: tuple[int, ...]) -> list[bytes]:
    """Distinct names for distinct prefixes."""
    return [bytes(text[: end + 1]) for end in range(len(text))]


class Replica:
    """Brute force: a list of blocks in the order of their last use."""

    def __init__(self) -> None:
        self.blocks: list[bytes] = []

    def record(self, prefix: list[bytes], capacity: int) -> None:
        for block in reversed(prefix):
            if block in self.blocks:
                self.blocks.remove(block)
            self.blocks.append(block)
        del self.blocks[: max(0, len(self.blocks) - capacity)]

    def num_held(self, prefix: list[bytes]) -> int:
        held = 0
        while held < len(prefix) and prefix[held] in self.blocks:
            held += 1
        return held


actions = st.one_of(
    st.tuples(st.just("record"), st.sampled_from("ab"), texts),
    st.tuples(st.just("forget"), st.sampled_from("ab"), st.just(())),
    st.tuples(st.just("retain"), st.sampled_from("ab"), st.just(())),
)


@given(st.lists(actions, max_size=30), st.lists(texts, min_size=1, max_size=5))
def test_it_holds_what_an_lru_cache_would(
    steps: list[tuple[str, str, tuple[int, ...]]], questions: list[tuple[int, ...]]
) -> None:
    index = PrefixIndex(CAPACITY)
    replicas = {"a": Replica(), "b": Replica()}
    for action, name, text in steps:
        if action == "record":
            index.record(name, chain(text))
            replicas[name].record(chain(text), CAPACITY)
        elif action == "forget":
            index.forget(name)
            replicas[name] = Replica()
        else:
            index.retain([name])
            replicas["b" if name == "a" else "a"] = Replica()
        index.check_integrity()
        for question in questions:
            for replica, oracle in replicas.items():
                found = index.num_held(replica, chain(question))
                assert found == oracle.num_held(chain(question))


def test_a_small_replica_holds_less() -> None:
    index = PrefixIndex()
    index.record("small", chain((1, 2, 0, 1)), capacity=2)
    index.record("large", chain((1, 2, 0, 1)), capacity=9)
    assert index.num_held("small", chain((1, 2, 0, 1))) == 2
    assert index.num_held("large", chain((1, 2, 0, 1))) == 4


def test_a_block_that_outlives_its_parent_is_found() -> None:
    index = PrefixIndex()
    index.record("a", chain((1, 2)))
    index._of["a"].move_to_end(bytes((1, 2)))
    with pytest.raises(IntegrityError, match="0102"):
        index.check_integrity()
    index._max_blocks = 1
    with pytest.raises(IntegrityError, match="2 blocks"):
        index.check_integrity()
