"""Tickets one by one: the bytes, and a reason for each refusal."""

from __future__ import annotations

import struct
import tracemalloc
import zlib
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from inference_pio.workers.kv import ticket as module
from inference_pio.workers.kv.ticket import (
    HEADER_BYTES,
    Buffer,
    KVLayout,
    TicketError,
    Words,
    decode_ticket,
    encode_ticket,
    layout_mismatch,
    read_header,
    request_digest,
)
from inference_pio.workers.kv.token_chain import TokenChain

from .ticket_samples import (
    ATTEMPT,
    EPOCH,
    LAYOUT,
    TOKENS,
    chain_of,
    encoded,
    expected,
    header,
    ticket,
    words,
)

FIELDS = [
    "dtype",
    "num_layers",
    "num_kv_heads",
    "head_dim",
    "block_size",
    "num_blocks",
    "num_bytes",
    "attempt",
    "epoch",
    "start",
    "end",
    "fingerprint",
    "digest",
    "chain",
    "checksum",
]


def forged(buffer: Buffer, **changes: Any) -> Buffer:
    """The ticket with other values in its header, and a header checksum to match."""
    raw = bytearray(buffer[:HEADER_BYTES].tobytes())
    place = module._PREFIX.size
    values = dict(zip(FIELDS, module._FIELDS.unpack_from(raw, place), strict=True))
    assert not changes.keys() - values.keys()
    module._FIELDS.pack_into(raw, place, *(values | changes).values())
    raw[-4:] = struct.pack("<I", zlib.crc32(raw[:-4]))
    other = buffer.copy()
    other[:HEADER_BYTES] = np.frombuffer(raw, np.uint8)
    return other


def refusal(buffer: Any, **wanted: Any) -> str:
    with pytest.raises(TicketError) as error:
        decode_ticket(buffer, expected(**wanted))
    assert error.value.code in str(error.value)
    return error.value.code


@pytest.mark.parametrize(("start", "end"), [(0, 4), (4, 12), (12, 19), (16, 19), (0, 19)])
def test_blocks_come_back_as_a_read_only_view(start: int, end: int) -> None:
    sent = words(header(start, end).num_blocks)
    buffer = encoded(header(start, end), sent)
    came = decode_ticket(buffer, expected(start))
    filled = end - start
    rows = np.moveaxis(came, 4, 2).reshape(2, -1, 2, 2, 2)  # tokens in order
    assert np.array_equal(
        rows[:, :filled], np.moveaxis(sent, 4, 2).reshape(2, -1, 2, 2, 2)[:, :filled]
    )
    assert not rows[:, filled:].any(), "rows behind the last token are zero"
    assert came.base is not None
    assert np.shares_memory(came, buffer)
    with pytest.raises(ValueError, match="read-only"):
        came[0] = 0


def test_the_header_says_what_was_written() -> None:
    assert read_header(ticket()) == header()
    assert header().num_blocks == 2
    assert ticket().nbytes == HEADER_BYTES + 2 * LAYOUT.bytes_per_block


def test_the_bytes_are_those_of_version_1() -> None:
    """A reader of another build must understand them: whoever changes them raises the version."""
    raw = ticket().tobytes()
    assert raw[:16] == b"IPIOKVT\n" + struct.pack("<II", 1, 256)
    numbers = struct.unpack_from("<11Q", raw, 16)
    assert numbers == (1, 2, 2, 2, 4, 2, 2 * 128, ATTEMPT, EPOCH, 4, 12)
    assert raw[104:136] == LAYOUT.fingerprint
    assert raw[136:168] == request_digest("r")
    assert raw[168:200] == chain_of().at(12)
    assert raw[200:204] == struct.pack("<I", zlib.crc32(raw[256:]))
    assert raw[204:252] == bytes(48)
    assert raw[252:256] == struct.pack("<I", zlib.crc32(raw[:252]))
    assert raw[256:] == words(2).tobytes()


def test_a_ticket_is_a_copy_of_its_blocks() -> None:
    blocks = words(2)
    buffer = encoded(header(), blocks)
    blocks[...] = 0
    decode_ticket(buffer, expected())


@pytest.mark.parametrize("difference", [-1, 1, LAYOUT.bytes_per_block])
def test_a_buffer_of_another_size_is_refused(difference: int) -> None:
    buffer = np.empty(header().num_bytes + difference, np.uint8)
    with pytest.raises(
        ValueError, match=rf"tokens 4 to 12 has 512 bytes, the buffer {buffer.size}"
    ):
        encode_ticket(header(), buffer, lambda out: out.fill(1))


def test_what_cannot_write_its_blocks_makes_no_ticket() -> None:
    """A buffer is used again, and its old ticket is no answer to the new header."""
    buffer = ticket()

    def fail(_: Words) -> None:
        raise ZeroDivisionError("injected")

    with pytest.raises(ZeroDivisionError, match="injected"):
        encode_ticket(header(12, 19), buffer[: header(12, 19).num_bytes], fail)
    assert refusal(buffer, start=12) == "wrong_span"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "fp8"])
def test_any_element_type(dtype: Any) -> None:
    layout = replace(LAYOUT, dtype=dtype)
    blocks = words(2, layout)
    came = decode_ticket(encoded(header(layout=layout), blocks), expected(layout=layout))
    assert came.dtype == blocks.dtype
    assert np.array_equal(came, blocks)


# --- refusals -----------------------------------------------------------------------------------


def test_every_single_flipped_bit_is_refused() -> None:
    buffer = ticket()
    for position in range(buffer.size):
        for bit in range(8):
            buffer[position] ^= 1 << bit
            with pytest.raises(TicketError):
                decode_ticket(buffer, expected())
            buffer[position] ^= 1 << bit
    decode_ticket(buffer, expected())


def test_every_shorter_or_longer_ticket_is_refused() -> None:
    buffer = ticket()
    for size in range(buffer.size):
        assert refusal(buffer[:size]) == "truncated"
    assert refusal(np.concatenate([buffer, buffer[:1]])) == "bad_size"


@pytest.mark.parametrize(
    "buffer",
    [
        b"bytes",
        None,
        ticket().tobytes(),
        ticket().astype(np.int16),
        ticket().reshape(2, -1),
        np.repeat(ticket(), 2)[::2],
        np.array([object()]),
        np.array(3, np.uint8),
    ],
)
def test_what_is_no_row_of_bytes_is_refused(buffer: Any) -> None:
    assert refusal(buffer) == "not_bytes"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"dtype": 5}, "bad_layout"),
        ({"dtype": 2}, "layout_mismatch"),  # float16 for bfloat16: the same size
        ({"num_layers": 0}, "bad_layout"),
        ({"num_layers": 2**63}, "bad_layout"),
        ({"num_layers": 1, "num_kv_heads": 4}, "layout_mismatch"),  # the same size
        ({"num_kv_heads": 1, "head_dim": 4}, "layout_mismatch"),
        ({"block_size": 2, "head_dim": 4}, "bad_size"),
        ({"fingerprint": bytes(32)}, "layout_mismatch"),
        ({"num_blocks": 2**61}, "bad_size"),
        ({"num_blocks": 1}, "bad_size"),
        ({"num_bytes": 2**64 - 1}, "bad_size"),
        ({"num_bytes": 0}, "bad_size"),
        ({"attempt": ATTEMPT - 1}, "stale_attempt"),
        ({"attempt": ATTEMPT + 1}, "stale_attempt"),
        ({"epoch": EPOCH + 1}, "stale_epoch"),
        ({"digest": request_digest("s")}, "wrong_request"),
        ({"start": 5}, "bad_span"),
        ({"start": 12}, "bad_span"),
        ({"start": 0}, "bad_size"),
        ({"start": 8, "end": 16}, "wrong_span"),
        ({"start": 0, "end": 8}, "wrong_span"),
        ({"start": 2**64 - 12, "end": 2**64 - 4}, "wrong_span"),
        ({"end": 11}, "wrong_span"),
        ({"chain": bytes(32)}, "wrong_chain"),
        ({"chain": chain_of().at(8)}, "wrong_chain"),
        ({"checksum": 0}, "bad_payload_checksum"),
    ],
)
def test_a_false_header_with_a_true_checksum_is_refused(changes: dict[str, Any], code: str) -> None:
    assert refusal(forged(ticket(), **changes)) == code


def test_damage_is_named() -> None:
    buffer = ticket()
    for position, code in (
        (0, "bad_magic"),
        (8, "bad_version"),
        (12, "bad_version"),
        (100, "bad_header_checksum"),
        (230, "bad_header_checksum"),
        (255, "bad_header_checksum"),
        (256, "bad_payload_checksum"),
    ):
        damaged = buffer.copy()
        damaged[position] ^= 1
        assert refusal(damaged) == code, position


def test_a_span_beyond_what_was_asked_for_is_refused() -> None:
    assert refusal(ticket(4, 12), limit=8) == "wrong_span"
    assert refusal(ticket(4, 10), limit=12) == "wrong_span"  # only the last block may be unfilled
    decode_ticket(ticket(4, 10), expected(limit=10))


def test_rows_behind_the_end_that_are_not_zero_are_refused() -> None:
    buffer = ticket(16, 19)
    payload = buffer[HEADER_BYTES:].view(np.int16).reshape(LAYOUT.shape(1))
    payload[1, 0, 0, 0, 3, 1] = 1
    assert refusal(forged(buffer, checksum=zlib.crc32(buffer[HEADER_BYTES:].data)), start=16) == (
        "dirty_tail"
    )


@pytest.mark.parametrize(
    ("block", "place", "told"),
    [
        *((1, place, None) for place in (13, 24, 31)),
        *((1, place, "dirty_tail") for place in (14, 20, 23, 32, 35)),
        *((0, 20, None), (0, 35, None), (0, 21, "dirty_tail")),
    ],
)
def test_the_tail_of_codes_is_that_of_codes_and_scales(
    block: int, place: int, told: str | None
) -> None:
    """The last block has two of three rows in use: 14 bytes of codes, and scales in 24 to 32."""
    layout = replace(LAYOUT, dtype="int8", head_dim=7, block_size=3)
    assert layout.shape(1) == (2, 1, 2, 2, 24 + 12)
    chain = TokenChain(TOKENS, 3, LAYOUT.fingerprint, "salt")
    about = header(0, 5, layout=layout, chain=chain.at(5))
    buffer = encoded(about, words(2, layout))
    blocks = buffer[HEADER_BYTES:].reshape(layout.shape(2))
    assert bool(blocks[1, block, 1, 1, place]) == (told is None)
    blocks[1, block, 1, 1, place] ^= 1
    signed = forged(buffer, checksum=zlib.crc32(buffer[HEADER_BYTES:].data))
    wanted = {"layout": layout, "start": 0, "limit": 5, "chain_at": chain.at}
    if told is None:
        decode_ticket(signed, expected(**wanted))
    else:
        assert refusal(signed, **wanted) == told


def test_another_tenants_or_prompts_chain_is_refused() -> None:
    assert refusal(ticket(chain=chain_of(salt="other").at(12))) == "wrong_chain"
    other = (0, *TOKENS[1:])
    assert refusal(ticket(chain=chain_of(other).at(12))) == "wrong_chain"


def test_nothing_of_the_claimed_size_is_allocated() -> None:
    """2**61 blocks, consistent in every field: refused for what came, with small change."""
    blocks = 2**61
    claims = {"start": 4, "end": 4 + 4 * blocks, "num_blocks": blocks}
    buffer = ticket()
    assert refusal(forged(buffer, **claims)) == "bad_size"  # num_bytes of that does not fit a field
    tiny = replace(LAYOUT, num_layers=1, num_kv_heads=1, head_dim=1, block_size=1)
    small = encoded(header(4, 5, layout=tiny, chain=bytes(32)), words(1, tiny))
    forgery = forged(small, end=4 + blocks, num_blocks=blocks, num_bytes=4 * blocks)
    tracemalloc.start()
    try:
        assert refusal(forgery) == "truncated"
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000


# --- layouts ------------------------------------------------------------------------------------


def test_equal_layouts_match() -> None:
    assert layout_mismatch(LAYOUT, replace(LAYOUT)) is None


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dtype": "float16"}, "dtype is bfloat16 here, float16 there"),
        ({"num_layers": 3}, "num_layers is 2 here, 3 there"),
        ({"num_kv_heads": 8}, "num_kv_heads is 2 here, 8 there"),
        ({"head_dim": 128}, "head_dim is 2 here, 128 there"),
        ({"block_size": 16}, "block_size is 4 here, 16 there"),
        ({"fingerprint": b"x" * 32}, "fingerprint is 0001020304050607 here, 7878787878787878"),
    ],
)
def test_a_difference_is_named(change: dict[str, Any], told: str) -> None:
    assert told in (layout_mismatch(LAYOUT, replace(LAYOUT, **change)) or "")


def test_all_differences_are_named() -> None:
    other = replace(LAYOUT, dtype="float32", block_size=8)
    mismatch = layout_mismatch(LAYOUT, other) or ""
    assert "dtype" in mismatch
    assert "block_size" in mismatch


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"fingerprint": b"short"}, "has 32 bytes, got 5"),
        ({"dtype": "int4"}, "float32, bfloat16, float16, int8, fp8, got 'int4'"),
        ({"num_layers": 0}, "num_layers is 0"),
        ({"block_size": 2**31}, "block_size is 2147483648"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(change: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        replace(LAYOUT, **change)


def test_the_largest_numbers_of_a_layout() -> None:
    replace(LAYOUT, num_layers=2**31 - 1, num_kv_heads=2**31 - 1, head_dim=1, block_size=1)


def test_sizes_of_a_real_model() -> None:
    layout = KVLayout(bytes(32), "bfloat16", 28, 8, 128, 64)
    assert layout.bytes_per_block == 28 * 2 * 8 * 64 * 128 * 2
    assert layout.shape(3) == (28, 3, 2, 8, 64, 128)
    assert [layout.num_blocks(64, end) for end in (65, 128, 129)] == [1, 1, 2]
