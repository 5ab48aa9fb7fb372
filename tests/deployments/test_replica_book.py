from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.deployments.replica_book import RECENT_S, ReplicaBook
from inference_pio.deployments.wire import RouteHints, RoutingStats, route_hints
from inference_pio.workers.kv.block import IntegrityError

PROMPT = route_hints(range(640))


def report(at: float = 0.0, load: int = 0, epoch: str = "e", **other: Any) -> dict[str, Any]:
    values = {"kv_used_ratio": 0.0, "kv_tokens": 10_000, **other}
    return RoutingStats(at=at, load=load, epoch=epoch, **values).as_dict()


def send(book: ReplicaBook, reports: dict[str, Any], hints: RouteHints, now: float = 1.0) -> str:
    name = book.rank(reports, hints, now)[0]
    book.note(name, reports[name], hints, now)
    book.check_integrity()
    return name


def test_the_same_prefix_goes_to_the_same_replica_and_others_are_spread() -> None:
    book = ReplicaBook()
    reports: dict[str, Any] = {"a": {}, "b": {}, "c": {}}
    first = send(book, reports, PROMPT)
    assert send(book, reports, PROMPT) == first
    alone = Counter(send(book, reports, route_hints([number] * 64)) for number in range(2, 40))
    assert max(alone.values()) - min(alone.values()) <= 3


def test_a_burst_sees_its_own_weight_until_a_report_counts_it() -> None:
    book = ReplicaBook()
    reports = {"a": report(at=1.0, load=4), "b": report(at=1.0)}
    assert [send(book, reports, RouteHints(), now=2.0) for _ in range(4)] == ["b"] * 4
    assert {send(book, reports, RouteHints(), now=2.0) for _ in range(2)} == {"a", "b"}
    assert send(book, reports, RouteHints(sequences=5), now=2.0) in ("a", "b")
    # The next report holds all of that.
    reports = {"a": report(at=3.0, load=1), "b": report(at=3.0, load=0)}
    assert send(book, reports, RouteHints(), now=3.5) == "b"


def test_without_reports_a_send_counts_for_a_while() -> None:
    book = ReplicaBook()
    reports: dict[str, Any] = {"a": {}, "b": {}}
    busy = send(book, reports, RouteHints(sequences=9), now=100.0)
    idle = "b" if busy == "a" else "a"
    assert [send(book, reports, RouteHints(), now=99 + RECENT_S) for _ in range(3)] == [idle] * 3
    assert send(book, reports, RouteHints(), now=100.5 + RECENT_S) == busy


def test_a_new_epoch_and_a_departure_forget_the_prefix() -> None:
    for change in ({"a": report(epoch="new"), "b": report()}, None):
        book = ReplicaBook()
        send(book, {"a": report()}, PROMPT)
        both = {"a": report(at=2.0, load=1), "b": report(at=2.0)}
        assert book.rank(both, PROMPT, 2.0)[0] == "a"
        if change is None:
            book.rank({"b": report()}, PROMPT, 2.0)
        else:
            book.rank(change, PROMPT, 2.0)
            both["a"] = report(at=2.0, load=1, epoch="new")
        assert book.rank(both, PROMPT, 2.0)[0] == "b"


def test_a_replica_is_not_expected_to_hold_more_than_it_can() -> None:
    book = ReplicaBook()
    reports = {"a": report(kv_tokens=64), "b": report(at=2.0)}
    book.note("a", reports["a"], PROMPT, 0.0)
    reports["a"] = report(at=2.0, load=1, kv_tokens=64)
    assert book.rank(reports, PROMPT, 2.0)[0] == "b"


@pytest.mark.parametrize(
    "wrong",
    [
        {"load": 3},
        {**report(), "load": "3"},
        {**report(), "load": True},
        {**report(), "kv_used_ratio": float("nan")},
        {**report(), "at": -1.0},
        {**report(), "epoch": 7},
        {**report(), "more": 1},
    ],
)
def test_a_report_that_cannot_be_read_is_counted_and_does_not_stop_the_choice(
    wrong: dict[str, Any],
) -> None:
    book = ReplicaBook()
    assert book.rank({"a": wrong}, RouteHints(), 0.0) == ["a"]
    assert book.bad_reports == 1
    with pytest.raises(ValueError, match=r"expected|not a|at least"):
        RoutingStats.from_dict(wrong)


@given(
    st.builds(
        RoutingStats,
        at=st.floats(0, 1e10),
        load=st.integers(0, 10**6),
        kv_used_ratio=st.floats(0, 1),
        kv_tokens=st.integers(0, 2**40),
        epoch=st.text(max_size=5),
    )
)
def test_a_report_arrives_as_it_was_made(stats: RoutingStats) -> None:
    assert RoutingStats.from_dict(stats.as_dict()) == stats


def test_no_replica_is_no_choice() -> None:
    assert ReplicaBook().rank({}, PROMPT, 0.0) == []


def test_books_that_do_not_add_up_are_found() -> None:
    book = ReplicaBook()
    send(book, {"a": {}}, PROMPT)
    book._sends["a"].total += 1
    with pytest.raises(IntegrityError):
        book.check_integrity()
