"""KV tickets: blocks of K and V as one raw array that says what it holds.

A ticket's bytes, all little-endian:
1. a header of ``HEADER_BYTES``: magic, version, sizes, whose and which tokens they are, the CRC-32
   of the payload, and at its very end the CRC-32 of everything before;
2. the payload: the blocks of the whole model, ``blocks_Ln2KSD`` (layers, blocks, key and value, KV
   heads, tokens of a block, head_dim), as 16- or 32-bit words in C order. KV in codes (``int8``,
   ``fp8``) comes as bytes, ``blocks_Ln2KB``: for each head in a block its codes [S, D], zeros up to
   a multiple of four bytes, then its scales [S] as float32.

A ticket covers the tokens ``[start, end)``: ``start`` is a multiple of the block size; ``end`` is
too, but for the last ticket of a prompt, whose last block is filled up with zeros. Reading checks
everything before anything of the claimed size is touched, and copies nothing.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable
from dataclasses import dataclass, fields
from math import prod
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from isal.isal_zlib import crc32

from ...kernels.kv_bytes import SCALE_BYTES, code_bytes, head_bytes

TicketDType = Literal["float32", "bfloat16", "float16", "int8", "fp8"]
Buffer = npt.NDArray[np.uint8]
Words = npt.NDArray[np.int16] | npt.NDArray[np.int32] | npt.NDArray[np.uint8]
"""Elements as integers of their width: numpy knows no bfloat16."""

MAGIC = b"IPIOKVT\n"
VERSION = 1
HEADER_BYTES = 256
"""A multiple of 64, so that the payload lies as well aligned as the buffer."""

_DTYPES: tuple[TicketDType, ...] = get_args(TicketDType)
_WORDS: dict[TicketDType, np.dtype[Any]] = {
    "float32": np.dtype("<i4"),
    "bfloat16": np.dtype("<i2"),
    "float16": np.dtype("<i2"),
    "int8": np.dtype("u1"),
    "fp8": np.dtype("u1"),
}
_PREFIX = struct.Struct("<8sII")  # magic, version, bytes of the header
_FIELDS = struct.Struct("<QQQQQQQQQQQ32s32s32sI")  # behind the prefix, see _pack_fields
_CHECKSUM = struct.Struct("<I")
_MAX_DIMENSION = 2**31 - 1


class TicketError(ValueError):
    """A ticket that must not be used. ``code`` is the stable word for the reason."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"KV ticket refused ({code}): {message}")
        self.code = code


@dataclass(frozen=True, slots=True)
class KVLayout:
    """What the KV of two engines must have in common to be exchanged."""

    fingerprint: bytes
    """The model's, 32 bytes."""
    dtype: TicketDType
    num_layers: int
    num_kv_heads: int
    """Of the whole model, however it is spread over ranks."""
    head_dim: int
    block_size: int

    def __post_init__(self) -> None:
        if len(self.fingerprint) != 32:
            raise ValueError(f"a model fingerprint has 32 bytes, got {len(self.fingerprint)}")
        if self.dtype not in _DTYPES:
            raise ValueError(f"KV travels as one of {', '.join(_DTYPES)}, got {self.dtype!r}")
        for name in ("num_layers", "num_kv_heads", "head_dim", "block_size"):
            if not 0 < getattr(self, name) <= _MAX_DIMENSION:
                raise ValueError(f"{name} is {getattr(self, name)}; it is a positive 31-bit number")

    @property
    def words(self) -> np.dtype[Any]:
        """The integer type that carries one element."""
        return _WORDS[self.dtype]

    @property
    def bytes_per_block(self) -> int:
        """Size of one block over all layers."""
        return prod(self.shape(1)) * self.words.itemsize

    def ticket_bytes(self, num_blocks: int) -> int:
        """Size of a ticket of so many blocks."""
        return HEADER_BYTES + num_blocks * self.bytes_per_block

    @property
    def in_codes(self) -> bool:
        """Whether elements are bytes with scales behind them."""
        return self.words.itemsize == 1

    def shape(self, num_blocks: int) -> tuple[int, ...]:
        """Of ``blocks_Ln2KSD``, or ``blocks_Ln2KB``."""
        head: tuple[int, ...] = (self.block_size, self.head_dim)
        if self.in_codes:
            head = (head_bytes(self.block_size, self.head_dim),)
        return (self.num_layers, num_blocks, 2, self.num_kv_heads, *head)

    def num_blocks(self, start: int, end: int) -> int:
        """Blocks that the tokens ``[start, end)`` lie in, ``start`` at a block's begin."""
        return -(-(end - start) // self.block_size)


def layout_mismatch(mine: KVLayout, theirs: KVLayout) -> str | None:
    """Every difference between two layouts by name; ``None`` where their KV can be exchanged."""
    differences = [
        f"{field.name} is {_show(getattr(mine, field.name))} here, "
        f"{_show(getattr(theirs, field.name))} there"
        for field in fields(KVLayout)
        if getattr(mine, field.name) != getattr(theirs, field.name)
    ]
    return "; ".join(differences) or None


def _show(value: object) -> object:
    return value.hex()[:16] if isinstance(value, bytes) else value


def request_digest(request_id: str) -> bytes:
    """What stands for a request's id in a header."""
    return hashlib.sha256(request_id.encode("utf-8", "surrogatepass")).digest()


@dataclass(frozen=True, slots=True)
class TicketHeader:
    """Whose KV a ticket holds, and of which tokens."""

    layout: KVLayout
    request_id_digest: bytes
    """``request_digest`` of the id."""
    attempt: int
    """Which asking of this request it answers."""
    epoch: int
    """Which life of the asking engine."""
    start: int
    end: int
    chain: bytes
    """``TokenChain.at(end)``: names the model, the cache salt and every token up to ``end``."""

    @property
    def num_blocks(self) -> int:
        """Blocks of the payload."""
        return self.layout.num_blocks(self.start, self.end)

    @property
    def num_bytes(self) -> int:
        """Size of the whole ticket."""
        return self.layout.ticket_bytes(self.num_blocks)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the next ticket of an import must say."""

    layout: KVLayout
    request_id_digest: bytes
    attempt: int
    epoch: int
    start: int
    """The first token that is missing."""
    limit: int
    """Behind the last token that was asked for."""
    chain_at: Callable[[int], bytes]
    """``TokenChain.at`` over the reader's own tokens; called with an end within ``limit``."""


def encode_ticket(
    header: TicketHeader, buffer: Buffer, write_blocks: Callable[[Words], object]
) -> None:
    """Make a ticket of ``buffer``, which has ``header.num_bytes`` bytes of any content.

    ``write_blocks`` is given the payload, ``blocks_Ln2KSD`` of the layout's word type, and writes
    every element of it; rows behind ``end`` are zeroed after it. Raises ``ValueError`` for a buffer
    of another size, and what ``write_blocks`` raises: the buffer is no ticket then.
    """
    if buffer.nbytes != header.num_bytes:
        raise ValueError(
            f"a ticket of tokens {header.start} to {header.end} has {header.num_bytes} bytes, "
            f"the buffer {buffer.nbytes}"
        )
    payload = buffer[HEADER_BYTES:]
    blocks = _blocks(payload, header)
    write_blocks(blocks)
    for tail in _tails(blocks, header):
        tail[...] = 0
    buffer[:HEADER_BYTES] = np.frombuffer(_pack(header, payload), np.uint8)


def decode_ticket(buffer: Buffer, expected: Expected) -> Words:
    """The payload as a read-only view ``blocks_Ln2KSD``, once everything about it is checked.

    Raises ``TicketError`` with one of these codes: those of ``read_header`` and ``check_header``,
    ``wrong_chain``, ``bad_payload_checksum``, ``dirty_tail``.
    """
    header, checksum = _parse(buffer)
    check_header(header, expected)
    if header.chain != expected.chain_at(header.end):
        raise TicketError(
            "wrong_chain", f"the first {header.end} tokens there are not those of this prompt"
        )
    payload = buffer[HEADER_BYTES:]
    if crc32(payload) != checksum:
        raise TicketError("bad_payload_checksum", "the blocks changed on their way")
    blocks = _blocks(payload, header)
    if any(tail.any() for tail in _tails(blocks, header)):
        raise TicketError("dirty_tail", f"rows behind token {header.end} are not zero")
    blocks.flags.writeable = False
    return blocks


def read_header(buffer: Buffer) -> TicketHeader:
    """The header of a ticket whose own bytes are sound; its payload is measured, not read.

    Raises ``TicketError``: ``not_bytes``, ``truncated``, ``bad_magic``, ``bad_version``,
    ``bad_header_checksum``, ``bad_layout``, ``bad_span``, ``bad_size``.
    """
    return _parse(buffer)[0]


def check_header(header: TicketHeader, expected: Expected) -> None:
    """Raise ``TicketError`` for a ticket that is not the next one of an import.

    Codes: ``wrong_request``, ``stale_epoch``, ``stale_attempt``, ``layout_mismatch``,
    ``wrong_span``.
    """
    if header.request_id_digest != expected.request_id_digest:
        raise TicketError("wrong_request", "it answers a request of another id")
    if header.epoch != expected.epoch:
        raise TicketError("stale_epoch", "another life of this engine asked for it")
    if header.attempt != expected.attempt:
        raise TicketError(
            "stale_attempt", f"it answers attempt {header.attempt}, not {expected.attempt}"
        )
    mismatch = layout_mismatch(expected.layout, header.layout)
    if mismatch is not None:
        raise TicketError("layout_mismatch", mismatch)
    in_order = header.start == expected.start and header.end <= expected.limit
    whole_blocks = header.end % header.layout.block_size == 0 or header.end == expected.limit
    if not (in_order and whole_blocks):
        raise TicketError(
            "wrong_span",
            f"it covers tokens {header.start} to {header.end}; wanted from {expected.start}, "
            f"in whole blocks or up to {expected.limit}",
        )


def _blocks(payload: Buffer, header: TicketHeader) -> Words:
    """The payload as ``blocks_Ln2KSD``, in place."""
    layout = header.layout
    blocks: Words = payload.view(layout.words).reshape(layout.shape(header.num_blocks))
    return blocks


def _tails(blocks_Ln2KSD: Words, header: TicketHeader) -> list[Words]:
    """The rows behind the last token, and what fills codes up: none where all is in use."""
    layout = header.layout
    filled = (header.end - header.start - 1) % layout.block_size + 1
    if not layout.in_codes:
        return [blocks_Ln2KSD[:, -1:, :, :, filled:]]
    codes, scales = (
        layout.block_size * layout.head_dim,
        code_bytes(layout.block_size, layout.head_dim),
    )
    return [
        blocks_Ln2KSD[..., codes:scales],
        blocks_Ln2KSD[:, -1:, :, :, filled * layout.head_dim : codes],
        blocks_Ln2KSD[:, -1:, :, :, scales + filled * SCALE_BYTES :],
    ]


def _pack(header: TicketHeader, payload: Buffer) -> bytes:
    layout = header.layout
    packed = _PREFIX.pack(MAGIC, VERSION, HEADER_BYTES) + _FIELDS.pack(
        _DTYPES.index(layout.dtype),
        layout.num_layers,
        layout.num_kv_heads,
        layout.head_dim,
        layout.block_size,
        header.num_blocks,
        payload.nbytes,
        header.attempt,
        header.epoch,
        header.start,
        header.end,
        layout.fingerprint,
        header.request_id_digest,
        header.chain,
        crc32(payload),
    )
    packed = packed.ljust(HEADER_BYTES - _CHECKSUM.size, b"\0")
    return packed + _CHECKSUM.pack(crc32(packed))


def _parse(buffer: Buffer) -> tuple[TicketHeader, int]:
    """A sound header and the payload's checksum; see ``read_header``."""
    raw = _header_bytes(buffer)
    (
        dtype,
        num_layers,
        num_kv_heads,
        head_dim,
        block_size,
        num_blocks,
        num_bytes,
        attempt,
        epoch,
        start,
        end,
        fingerprint,
        digest,
        chain,
        checksum,
    ) = _FIELDS.unpack_from(raw, _PREFIX.size)
    if dtype >= len(_DTYPES):
        raise TicketError("bad_layout", f"element type {dtype} is unknown")
    try:
        layout = KVLayout(
            fingerprint, _DTYPES[dtype], num_layers, num_kv_heads, head_dim, block_size
        )
    except ValueError as error:
        raise TicketError("bad_layout", str(error)) from None
    if start >= end or start % block_size:
        raise TicketError(
            "bad_span", f"tokens {start} to {end} are no span of blocks of {block_size}"
        )
    # Python's integers do not overflow, so sizes are compared as claimed, however large.
    blocks_of_span = layout.num_blocks(start, end)
    bytes_of_span = blocks_of_span * layout.bytes_per_block
    have = buffer.nbytes - HEADER_BYTES
    if num_blocks != blocks_of_span or num_bytes != bytes_of_span:
        raise TicketError(
            "bad_size",
            f"{num_blocks} blocks in {num_bytes} bytes are claimed; tokens {start} to {end} lie in "
            f"{blocks_of_span} blocks of {bytes_of_span} bytes",
        )
    if have != num_bytes:
        code = "truncated" if have < num_bytes else "bad_size"
        raise TicketError(code, f"{num_bytes} bytes of blocks are claimed, {have} came")
    return TicketHeader(layout, digest, attempt, epoch, start, end, chain), checksum


def _header_bytes(buffer: Buffer) -> bytes:
    """The header of a buffer that is a ticket of this version and arrived unchanged."""
    sound = isinstance(buffer, np.ndarray) and buffer.dtype == np.uint8 and buffer.ndim == 1
    if not sound or not buffer.flags.c_contiguous:
        raise TicketError("not_bytes", "a ticket is one row of bytes")
    if buffer.nbytes < HEADER_BYTES:
        raise TicketError("truncated", f"the header has {HEADER_BYTES} bytes, {buffer.nbytes} came")
    raw = buffer[:HEADER_BYTES].tobytes()
    magic, version, header_bytes = _PREFIX.unpack_from(raw)
    if magic != MAGIC:
        raise TicketError("bad_magic", f"it begins with {magic!r}, not {MAGIC!r}")
    if (version, header_bytes) != (VERSION, HEADER_BYTES):
        raise TicketError(
            "bad_version",
            f"version {version} with a header of {header_bytes} bytes; this engine reads "
            f"version {VERSION} with {HEADER_BYTES}",
        )
    (checksum,) = _CHECKSUM.unpack_from(raw, HEADER_BYTES - _CHECKSUM.size)
    if crc32(raw[: -_CHECKSUM.size]) != checksum:
        raise TicketError("bad_header_checksum", "the header changed on its way")
    return raw
