from __future__ import annotations

import itertools
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.replica_choice import (
    FULL_RATIO,
    LOAD_TOKENS,
    MAX_HIT_TOKENS,
    SESSION_TOKENS,
    ReplicaView,
    cost,
    rank,
    session_home,
)
from inference_pio.deployments.wire import RouteHints

LARGEST_BOUND = (MAX_HIT_TOKENS + SESSION_TOKENS) // LOAD_TOKENS
loads = st.integers(0, 60)
hits = st.integers(0, 200).map(lambda blocks: 64 * blocks) | st.just(10**6)


def view(name: str, load: float = 0, hit: int = 0, kv: float = 0.0) -> ReplicaView:
    return ReplicaView(name, load, kv, hit)


@st.composite
def pools(draw: st.DrawFn, **fixed: st.SearchStrategy[float]) -> list[ReplicaView]:
    return [
        view(
            f"r{number}",
            draw(fixed.get("load", loads)),
            int(draw(fixed.get("hit", hits))),
            draw(fixed.get("kv", st.sampled_from([0.0, 0.5, 0.94, 0.95, 1.0]))),
        )
        for number in range(draw(st.integers(1, 6)))
    ]


def hints(*avoid: str, session: str | None = None) -> RouteHints:
    return RouteHints(session=session, avoid=avoid)


some_hints = st.builds(
    lambda avoid, session: RouteHints(session=session, avoid=tuple(avoid)),
    st.lists(st.sampled_from(["r0", "r1", "r2", "gone"]), unique=True),
    st.none() | st.text(max_size=3),
)


@given(pools(), some_hints, st.binary(max_size=4), st.randoms(use_true_random=False))
def test_it_is_a_sound_order_of_all_whatever_the_order_they_come_in(
    pool: list[ReplicaView], hint: RouteHints, seed: bytes, order: random.Random
) -> None:
    ranked = rank(pool, hint, seed)
    assert sorted(ranked) == sorted(view.replica_id for view in pool)
    order.shuffle(pool)
    assert rank(pool, hint, seed) == ranked
    # Brute force: no replica stands before one that is better in what counts first.
    of = {view.replica_id: view for view in pool}
    home = session_home(list(of), hint.session)
    for one, other in itertools.combinations([of[name] for name in ranked], 2):
        late_one = hint.avoid.index(one.replica_id) if one.replica_id in hint.avoid else -1
        late_other = hint.avoid.index(other.replica_id) if other.replica_id in hint.avoid else -1
        assert late_one <= late_other
        if late_one < late_other:
            continue
        full_one, full_other = (v.kv_used_ratio >= FULL_RATIO for v in (one, other))
        assert full_one <= full_other
        if full_one == full_other:
            cost_one, cost_other = (cost(v, is_home=v.replica_id == home) for v in (one, other))
            assert cost_one <= cost_other


@given(pools(load=st.just(5), kv=st.just(0.2)), st.binary(max_size=4))
def test_with_equal_load_the_longest_prefix_wins(pool: list[ReplicaView], seed: bytes) -> None:
    best = next(v for v in pool if v.replica_id == rank(pool, hints(), seed)[0])
    assert min(best.hit_tokens, MAX_HIT_TOKENS) == min(
        max(v.hit_tokens for v in pool), MAX_HIT_TOKENS
    )


@given(pools(kv=st.just(0.2)), some_hints, st.binary(max_size=4))
def test_no_prefix_and_no_session_outweighs_the_stated_bound(
    pool: list[ReplicaView], hint: RouteHints, seed: bytes
) -> None:
    hint = RouteHints(session=hint.session)
    best = next(v for v in pool if v.replica_id == rank(pool, hint, seed)[0])
    bound = LARGEST_BOUND if hint.session is not None else MAX_HIT_TOKENS // LOAD_TOKENS
    assert best.load <= min(v.load for v in pool) + bound


def test_a_hot_replica_is_not_chosen_for_a_short_prefix() -> None:
    pool = [view("hot", load=3, hit=64), view("idle", load=2)]
    assert rank(pool, hints(), b"") == ["idle", "hot"]
    pool = [view("hot", load=3, hit=1024), view("idle", load=2)]
    assert rank(pool, hints(), b"") == ["hot", "idle"]


@given(st.text(max_size=5), st.integers(2, 6), st.binary(max_size=4))
def test_a_session_stays_at_home_while_there_is_room(session: str, size: int, seed: bytes) -> None:
    names = [f"r{number}" for number in range(size)]
    home = session_home(names, session)
    slack = SESSION_TOKENS // LOAD_TOKENS
    hint = hints(session=session)

    def choice(**of_home: float) -> str:
        pool = [view(name, **of_home) if name == home else view(name) for name in names]
        return rank(pool, hint, seed)[0]

    assert choice() == home
    assert choice(load=slack - 1) == home
    assert choice(load=slack + 1) != home
    assert choice(kv=FULL_RATIO) != home
    # A replica more takes its own share only.
    grown = session_home([*names, "new"], session)
    assert grown in (home, "new")


def test_sessions_and_equal_replicas_are_spread() -> None:
    names = ["r0", "r1", "r2", "r3"]
    homes = Counter(session_home(names, f"user {number}") for number in range(400))
    firsts = Counter(
        rank([view(name) for name in names], hints(), number.to_bytes(8, "little"))[0]
        for number in range(400)
    )
    for counts in (homes, firsts):
        assert set(counts) == set(names)
        assert min(counts.values()) > 60


def test_between_equal_costs_the_less_loaded_of_two_goes_first() -> None:
    pool = [view("a", load=1, hit=LOAD_TOKENS), view("b", load=2, hit=2 * LOAD_TOKENS)]
    for number in range(20):
        assert rank(pool, hints(), bytes([number]))[0] == "a"


def test_those_to_avoid_are_last_and_the_latest_failure_is_the_very_last() -> None:
    pool = [view("a", hit=8192), view("b", load=50, kv=1.0), view("c")]
    assert rank(pool, hints("c", "a"), b"") == ["b", "c", "a"]
    assert rank(pool[:1], hints("a"), b"") == ["a"]
