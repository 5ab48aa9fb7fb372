"""Both state machines: every transition of the tables, and their books."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from inference_pio.workers.kv.block import IntegrityError
from inference_pio.workers.kv.handoff import (
    Accepted,
    Broken,
    ExportState,
    Ignored,
    ImportState,
    KVExport,
    KVImport,
)
from inference_pio.workers.kv.ticket import Buffer

from .ticket_samples import (
    ATTEMPT,
    EPOCH,
    FINGERPRINT,
    LAYOUT,
    TOKENS,
    chain_of,
    ticket,
    words,
)

DEADLINE = 10.0
SIZE = LAYOUT.block_size


def new(kind: Callable[..., Any], start: int = 4, limit: int = len(TOKENS), **changes: Any) -> Any:
    fields: dict[str, Any] = {
        "request_id": "r",
        "attempt": ATTEMPT,
        "epoch": EPOCH,
        "layout": LAYOUT,
        "chain": chain_of(),
        "start": start,
        "limit": limit,
        "deadline": DEADLINE,
    }
    return kind(**(fields | changes))


def damaged(start: int = 4, end: int = 12) -> Buffer:
    buffer = ticket(start, end)
    buffer[-1] ^= 1
    return buffer


# --- import -------------------------------------------------------------------------------------

DUE = {ImportState.REQUESTED: (4, 12), ImportState.IMPORTING: (12, 19)}
"""The next ticket in each open state."""


def in_state(state: ImportState) -> KVImport:
    incoming: KVImport = new(KVImport)
    if state is not ImportState.REQUESTED:
        assert isinstance(incoming.offer(ticket(4, 12), 1.0), Accepted)
    if state is ImportState.COMPLETE:
        assert isinstance(incoming.offer(ticket(12, 19), 1.0), Accepted)
    if state is ImportState.ENDED:
        assert incoming.end("preempted")
    assert incoming.state is state
    return incoming


def test_an_import_goes_from_ticket_to_ticket() -> None:
    incoming: KVImport = new(KVImport)
    assert incoming.state is ImportState.REQUESTED
    first = incoming.offer(ticket(4, 12), 1.0)
    assert isinstance(first, Accepted)
    assert (first.start, first.end, incoming.next) == (4, 12, 12)
    assert np.array_equal(first.blocks_Ln2KSD, words(2))
    assert incoming.state is ImportState.IMPORTING
    last = incoming.offer(ticket(12, 19), 1.0)
    assert isinstance(last, Accepted)
    assert last.blocks_Ln2KSD.shape == LAYOUT.shape(2)
    assert incoming.state is ImportState.COMPLETE
    assert not incoming.is_open
    assert incoming.num_tokens == 15
    assert incoming.end_reason is None


@pytest.mark.parametrize("state", [ImportState.REQUESTED, ImportState.IMPORTING])
@pytest.mark.parametrize(
    ("spoilt", "reason"),
    [
        (damaged, "bad_payload_checksum"),
        (lambda start, end: ticket(start, end)[:-1], "truncated"),
        (lambda start, end: ticket(start, end, chain=bytes(32)), "wrong_chain"),
        (lambda start, end: ticket(16, 19), "wrong_span"),  # one before it is lost for good
        (lambda start, end: ticket(0, 16), "wrong_span"),  # it overlaps what is here
        (lambda start, end: np.zeros(400, np.uint8), "bad_magic"),
    ],
)
def test_a_ticket_that_must_not_be_used_ends_an_import(
    state: ImportState, spoilt: Callable[[int, int], Buffer], reason: str
) -> None:
    incoming = in_state(state)
    before = incoming.next
    result = incoming.offer(spoilt(*DUE[state]), 1.0)
    assert isinstance(result, Broken)
    assert result.reason == incoming.end_reason == reason
    assert reason in result.detail
    assert incoming.state is ImportState.ENDED
    assert incoming.next == before, "what is here stays"


@pytest.mark.parametrize("state", [ImportState.REQUESTED, ImportState.IMPORTING])
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"request_id_digest": bytes(32)}, "wrong_request"),
        ({"attempt": ATTEMPT - 1}, "stale_attempt"),
        ({"epoch": EPOCH - 1}, "stale_epoch"),
    ],
)
def test_a_ticket_for_another_changes_nothing(
    state: ImportState, changes: dict[str, Any], reason: str
) -> None:
    incoming = in_state(state)
    assert incoming.offer(ticket(12, 19, **changes), 1.0) == Ignored(reason)
    assert incoming.offer(ticket(4, 12, **changes), 1.0) == Ignored(reason)
    assert incoming.state is state


def test_a_ticket_that_comes_twice_is_passed_over() -> None:
    incoming = in_state(ImportState.IMPORTING)
    assert incoming.offer(ticket(4, 12), 1.0) == Ignored("duplicate")
    assert incoming.offer(ticket(0, 8), 1.0) == Ignored("duplicate")
    assert isinstance(incoming.offer(ticket(12, 19), 1.0), Accepted)


@pytest.mark.parametrize("state", [ImportState.COMPLETE, ImportState.ENDED])
@pytest.mark.parametrize("buffer", [ticket(4, 12), ticket(12, 19), damaged()])
def test_after_its_end_an_import_passes_over_everything(state: ImportState, buffer: Buffer) -> None:
    incoming = in_state(state)
    reason = incoming.end_reason
    assert incoming.offer(buffer, 1.0) == Ignored(state.value)
    assert not incoming.end("another reason")
    assert incoming.end_reason == reason
    assert incoming.state is state
    assert not incoming.expired(99.0)


@pytest.mark.parametrize("state", [ImportState.REQUESTED, ImportState.IMPORTING])
def test_the_deadline(state: ImportState) -> None:
    incoming = in_state(state)
    assert not incoming.expired(DEADLINE)
    assert incoming.expired(DEADLINE + 0.1)
    late = incoming.offer(ticket(*DUE[state]), DEADLINE + 0.1)
    assert isinstance(late, Broken)
    assert late.reason == "deadline"
    assert not incoming.expired(DEADLINE + 0.2), "it ends once"


def test_the_first_reason_stays() -> None:
    incoming = in_state(ImportState.IMPORTING)
    assert incoming.end("preempted")
    assert not incoming.end("deadline")
    assert incoming.end_reason == "preempted"


@pytest.mark.parametrize("kind", [KVImport, KVExport])
@pytest.mark.parametrize(("start", "limit"), [(5, 19), (-4, 19), (8, 8), (12, 8)])
def test_a_span_that_cannot_be_is_refused(kind: Any, start: int, limit: int) -> None:
    with pytest.raises(ValueError, match=rf"a span from the begin .* got {start} to {limit}"):
        new(kind, start, limit)


def test_the_books_of_an_import() -> None:
    incoming = in_state(ImportState.IMPORTING)
    incoming.check_integrity(12)
    with pytest.raises(IntegrityError, match="tokens up to 12, its sequence up to 8"):
        incoming.check_integrity(8)
    incoming.end("preempted")
    incoming.check_integrity(0)  # the sequence goes its own way
    for wrong in (3, 20):
        incoming.next = wrong
        with pytest.raises(IntegrityError, match=f"is at token {wrong} of 4 to 19"):
            incoming.check_integrity(wrong)
    incoming.next = 13
    with pytest.raises(IntegrityError, match="stopped inside a block, at token 13"):
        incoming.check_integrity(13)
    incoming.next = 19
    with pytest.raises(IntegrityError, match="is complete, and yet ended with preempted"):
        incoming.check_integrity(19)


# --- export -------------------------------------------------------------------------------------


def test_an_export_yields_whole_blocks_and_the_rest_at_last() -> None:
    export: KVExport = new(KVExport)
    spans = []
    for computed in (0, 3, 4, 7, 9, 9, 16, 18):
        spans.append(export.take(computed))
        export.check_integrity()
    assert spans == [None, None, None, None, (4, 8), None, (8, 16), None]
    assert export.state is ExportState.EXPORTING
    assert export.take(19) == (16, 19)
    assert export.state is ExportState.COMPLETE
    assert export.take(19) is None
    assert not export.end("deadline")


def test_a_prefix_hit_is_yielded_at_once() -> None:
    assert new(KVExport, 0).take(12) == (0, 12)


def test_a_preempted_prefill_yields_nothing_twice() -> None:
    export: KVExport = new(KVExport)
    assert export.take(12) == (4, 12)
    assert [export.take(n) for n in (0, 4, 8, 12, 15)] == [None] * 5
    assert export.take(16) == (12, 16)


def test_an_export_that_ended_yields_nothing() -> None:
    export: KVExport = new(KVExport)
    assert export.state is ExportState.QUEUED
    assert export.expired(DEADLINE + 1)
    assert export.end("deadline")
    assert export.state is ExportState.ENDED
    assert export.take(19) is None
    assert not export.expired(DEADLINE + 1)
    export.check_integrity()


def test_the_books_of_an_export() -> None:
    export: KVExport = new(KVExport)
    export.next = 6
    with pytest.raises(IntegrityError, match=r"the export of r .* stopped inside a block"):
        export.check_integrity()


# --- one to the other ---------------------------------------------------------------------------


@given(
    num_tokens=st.integers(1, len(TOKENS)),
    first_block=st.integers(0, 4),
    steps=st.lists(st.integers(0, 9), max_size=12),
)
def test_what_an_export_yields_an_import_takes(
    num_tokens: int, first_block: int, steps: list[int]
) -> None:
    """Whatever the steps of the prefill, its tickets join to the whole span in order."""
    start = first_block * SIZE
    if start >= num_tokens:
        return
    export: KVExport = new(KVExport, start, num_tokens)
    incoming: KVImport = new(KVImport, start, num_tokens)
    computed = 0
    for step in [*steps, num_tokens]:
        computed = min(num_tokens, computed + step)
        span = export.take(computed)
        if span is None:
            continue
        assert span[0] == incoming.next
        assert span[1] <= computed
        header = export.header(*span)
        accepted = incoming.offer(ticket(*span, chain=header.chain), 1.0)
        assert isinstance(accepted, Accepted)
        assert (accepted.start, accepted.end) == span
        incoming.check_integrity(span[1])
    assert incoming.state is ImportState.COMPLETE
    assert export.state is ExportState.COMPLETE


def test_an_export_heads_its_tickets_with_its_own_names() -> None:
    export: KVExport = new(KVExport)
    header = export.header(4, 12)
    assert (header.attempt, header.epoch, header.start, header.end) == (ATTEMPT, EPOCH, 4, 12)
    assert header.layout.fingerprint == FINGERPRINT
    assert header.chain == chain_of().at(12)
