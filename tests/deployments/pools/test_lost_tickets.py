"""Tickets that Ray loses, and a store with no room for them: real Ray, real Serve, real faults.

Each time the decode replica computes what has not come: its text is that of one engine alone, the
reason is counted, and nothing stays behind.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TYPE_CHECKING

import psutil
import pytest

if TYPE_CHECKING:
    from conftest import PoolsService

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Settle = Callable[..., None]
REPLICA = "ray::ServeReplica:pools:"
TICKET_BYTES = 64 * 2560
"""Of a whole step: 64 tokens, whose KV the embedded model keeps in 2560 bytes each."""


def prompt(number: int, size: int = 3000) -> list[int]:
    """Token ids that no other number shares a block with."""
    return [20 + (number * 41 + i * 13 + i // 9 * number) % 300 for i in range(size)]


@contextmanager
def stopped(process: psutil.Process, settle: Settle) -> Iterator[None]:
    """A process that does nothing for the block, and is proved to be so."""
    process.suspend()
    try:
        settle(lambda: process.status() == psutil.STATUS_STOPPED, "it runs on")
        yield
    finally:
        process.resume()


def ends(service: PoolsService) -> dict[str, float]:
    return dict(service.numbers("kv_import_ends_total", "answer", by="reason"))


def new_ends(service: PoolsService, before: dict[str, float]) -> dict[str, float]:
    """How handoffs have ended since."""
    return {k: v - before.get(k, 0) for k, v in ends(service).items() if v != before.get(k, 0)}


def expect_a_handoff(service: PoolsService, settle: Settle, number: int) -> None:
    """KV travels: nothing of what a test has broken is left."""
    settle(lambda: service.number("prefill_peers", "answer") == 1, "no prefill replica answers")
    before = ends(service)
    assert service.text("split", prompt(number)) == service.text("unified", prompt(number))
    assert new_ends(service, before) == {"done": 1}


def test_tickets_whose_owner_dies_between_yield_and_fetch(
    small_store_service: PoolsService, settle: Settle
) -> None:
    service = small_store_service
    numbers = range(20, 24)
    expected = [service.text("unified", prompt(number)) for number in numbers]
    expect_a_handoff(service, settle, 2)
    service.expect_quiet()
    baseline, before = service.object_store_bytes(), ends(service)
    fetched = service.number("handoff_tickets_total", "answer")
    (owner,) = service.processes(REPLICA + "prefill")
    (reader,) = service.processes(REPLICA + "answer")
    with ThreadPoolExecutor(len(numbers)) as threads:
        answers = threads.map(lambda number: service.text("split", prompt(number)), numbers)
        # Not before: a call whose first word has not come is Serve's to send to another replica.
        settle(
            lambda: service.number("handoff_tickets_total", "answer") > fetched, "no ticket came"
        )
        with stopped(reader, settle):
            settle(
                lambda: service.object_store_bytes() > baseline + 4 * TICKET_BYTES,
                "no tickets lie in the store",
            )
            owner.kill()
            gone, _ = psutil.wait_procs([owner], 10)
            assert gone == [owner]
            # Until then its tickets could still be read where they lie.
            settle(lambda: service.object_store_bytes() <= baseline, "Ray keeps what nobody owns")
        assert list(answers) == expected
    lost = new_ends(service, before)
    assert sum(lost.values()) == len(numbers)
    assert lost.keys() <= {"owner_died", "peer_died", "done"}
    assert lost.keys() != {"done"}, "nothing was lost"
    expect_a_handoff(service, settle, 3)
    service.expect_quiet()


def test_a_store_without_room_for_tickets(
    small_store_service: PoolsService, settle: Settle
) -> None:
    service = small_store_service
    numbers = range(10, 14)
    expected = [service.text("unified", prompt(number)) for number in numbers]
    expect_a_handoff(service, settle, 4)
    service.expect_quiet()
    baseline, before = service.object_store_bytes(), ends(service)
    service.fill_store()
    with ThreadPoolExecutor(len(numbers)) as threads:
        answers = threads.map(lambda number: service.text("split", prompt(number)), numbers)
        assert list(answers) == expected
    assert new_ends(service, before) == {"store_full": len(numbers)}
    service.drain_store()
    settle(lambda: service.object_store_bytes() <= baseline, "something stays in the store")
    expect_a_handoff(service, settle, 5)
    service.expect_quiet()
