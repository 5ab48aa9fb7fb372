"""Corrupted, truncated, stale and mislabelled tickets: all refused, by ``TicketError`` alone."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inference_pio.workers.kv import ticket as module
from inference_pio.workers.kv.handoff import Accepted, Broken, Ignored, KVImport
from inference_pio.workers.kv.ticket import (
    HEADER_BYTES,
    Buffer,
    TicketError,
    decode_ticket,
    request_digest,
)

from .ticket_samples import ATTEMPT, EPOCH, LAYOUT, TOKENS, chain_of, expected, ticket

NUM_DEFAULT = 2_000
NUM_SLOW = 100_000

SOUND = ticket()
NUM_FIELDS = 15
_NUMBER = st.one_of(st.integers(0, 40), st.integers(0, 2**64 - 1), st.sampled_from([2**61, 2**63]))


def _array(raw: bytes | bytearray) -> Buffer:
    return np.frombuffer(bytes(raw), np.uint8)


@st.composite
def corrupted(draw: st.DrawFn) -> Buffer:
    """Some bytes changed anywhere, or in the header alone."""
    buffer = SOUND.copy()
    limit = draw(st.sampled_from([HEADER_BYTES, buffer.size]))
    changes = draw(
        st.dictionaries(st.integers(0, limit - 1), st.integers(1, 255), min_size=1, max_size=8)
    )
    for position, change in changes.items():
        buffer[position] ^= change
    return buffer


@st.composite
def truncated(draw: st.DrawFn) -> Buffer:
    """Cut anywhere, with other bytes put in or behind."""
    cut = draw(st.integers(0, SOUND.size - 1))
    filling = draw(st.binary(max_size=64))
    rest = draw(st.integers(cut, SOUND.size))
    raw = SOUND.tobytes()
    return _array(raw[:cut] + filling + raw[rest:])


@st.composite
def mislabelled(draw: st.DrawFn) -> Buffer:
    """Other values in some fields of the header, all checksums right."""
    raw = bytearray(SOUND.tobytes())
    values = list(module._FIELDS.unpack_from(raw, module._PREFIX.size))
    for place in draw(st.sets(st.integers(0, NUM_FIELDS - 2), min_size=1, max_size=4)):
        if isinstance(values[place], bytes):
            values[place] = draw(st.binary(min_size=32, max_size=32))
        else:
            values[place] = draw(_NUMBER)
    module._FIELDS.pack_into(raw, module._PREFIX.size, *values)
    raw[HEADER_BYTES - 4 : HEADER_BYTES] = struct.pack("<I", zlib.crc32(raw[: HEADER_BYTES - 4]))
    return _array(raw)


@st.composite
def stale(draw: st.DrawFn) -> Buffer:
    """A sound ticket of another request, attempt, life, prompt, tenant or model, or of another
    place; some of these at once."""
    spans = [(a, end) for a in (0, 8, 12, 16) for end in (*range(a + 4, 19, 4), 19)]
    start, end = draw(st.sampled_from(spans))
    others: dict[str, st.SearchStrategy[Any]] = {
        "request_id_digest": st.text(max_size=5).map("s".__add__).map(request_digest),
        "attempt": st.integers(0, 2**64 - 1).filter(lambda value: value != ATTEMPT),
        "epoch": st.integers(0, 2**64 - 1).filter(lambda value: value != EPOCH),
        "chain": st.sampled_from(
            [
                chain_of(salt="").at(end),
                chain_of((0, *TOKENS[1:])).at(end),
                chain_of((*TOKENS[: end - 1], 0)).at(end),
                chain_of().at(end - 1),
            ]
        ),
    }
    names = draw(st.sets(st.sampled_from([*others, "start"]), min_size=1))
    changes = {name: draw(others[name]) for name in names - {"start"}}
    if "start" not in names:
        start, end = 4, 12
        if "chain" in changes:
            changes["chain"] = chain_of(salt=draw(st.text(max_size=3).map("other".__add__))).at(12)
    return ticket(start, end, **changes)


def anything() -> st.SearchStrategy[Any]:
    """Bytes of any length, with and without a sound begin."""
    return st.one_of(
        st.binary(max_size=600).map(_array),
        st.binary(max_size=300).map(lambda raw: _array(SOUND.tobytes()[:16] + raw)),
        st.sampled_from([b"", None, 3, np.zeros(400), np.zeros((2, 300), np.uint8)]),
    )


def is_the_sound_one(buffer: Any) -> bool:
    return isinstance(buffer, np.ndarray) and np.array_equal(buffer, SOUND)


def check_is_refused(buffer: Any) -> None:
    if is_the_sound_one(buffer):
        decode_ticket(buffer, expected())
        return
    with pytest.raises(TicketError) as error:
        decode_ticket(buffer, expected())
    incoming = KVImport(
        request_id="r",
        attempt=ATTEMPT,
        epoch=EPOCH,
        layout=LAYOUT,
        chain=chain_of(),
        start=4,
        limit=len(TOKENS),
        deadline=10.0,
    )
    result = incoming.offer(buffer, 1.0)
    if _is_a_later_or_earlier_sound_one(error.value):
        assert isinstance(result, Broken | Ignored)
    elif error.value.code in ("wrong_request", "stale_epoch", "stale_attempt"):
        assert result == Ignored(error.value.code)
        assert isinstance(incoming.offer(SOUND, 1.0), Accepted), "it changed nothing"
    else:
        assert isinstance(result, Broken)
        assert result.reason == error.value.code
        assert incoming.offer(SOUND, 1.0) == Ignored("ended")
    incoming.check_integrity(incoming.next)


def _is_a_later_or_earlier_sound_one(error: TicketError) -> bool:
    return error.code == "wrong_span"


def check_every_kind(num_examples: int) -> None:
    """The property for so many examples, a fifth of each kind."""
    kinds = (corrupted(), truncated(), mislabelled(), stale(), anything())
    limits = settings(max_examples=num_examples // len(kinds), deadline=None)
    for kind in kinds:
        limits(given(kind)(check_is_refused))()


def test_no_unsound_ticket_is_accepted() -> None:
    check_every_kind(NUM_DEFAULT)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_no_unsound_ticket_of_very_many_is_accepted() -> None:
    check_every_kind(NUM_SLOW)
