"""Bugs put into the code under test on purpose: a simulator that finds none proves nothing.

Each entry patches one place for the length of a block.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

from inference_pio.workers.export_desk import ExportDesk
from inference_pio.workers.import_desk import ImportDesk
from inference_pio.workers.kv import handoff, ticket
from inference_pio.workers.kv.handoff import KVExport, KVImport
from inference_pio.workers.kv.manager import KVManager
from inference_pio.workers.kv.ticket import HEADER_BYTES, Buffer, Expected, TicketHeader
from inference_pio.workers.scheduler import Scheduler
from inference_pio.workers.types import GenerateRequest

from . import ingress

_check_header, _parse, _take = ticket.check_header, ticket._parse, KVExport.take
_expected, _write, _drop = KVImport._expected, ImportDesk._write, ImportDesk.drop
_end, _free, _remaining = ExportDesk._end, KVManager.free, ingress.remaining_requests


def _believing(name: str) -> Callable[[TicketHeader, Expected], None]:
    """``check_header`` that takes the header's word for one field."""

    def check(header: TicketHeader, expected: Expected) -> None:
        told: dict[str, Any] = {name: getattr(header, name)}
        _check_header(header, replace(expected, **told))

    return check


class _Anything(bytes):
    """Equal to every chain."""

    def __ne__(self, other: object) -> bool:
        return False


def _any_chain(self: KVImport, start: int) -> Expected:
    return replace(_expected(self, start), chain_at=lambda _: _Anything())


def _parse_with_true_checksum(buffer: Buffer) -> tuple[TicketHeader, int]:
    header, _ = _parse(buffer)
    return header, zlib.crc32(buffer[HEADER_BYTES:].data)


def _take_early(self: KVExport, num_computed_tokens: int) -> tuple[int, int] | None:
    return _take(self, num_computed_tokens + self._layout.block_size)


def _write_nothing(self: ImportDesk, *arguments: Any) -> None:
    with patch.object(self._executor, "write_blocks", lambda *_: None):
        _write(self, *arguments)


def _write_one_further(self: ImportDesk, *arguments: Any) -> None:
    real = self._executor.write_blocks

    def write(block_ids: Sequence[int], blocks: Any) -> None:
        real([(block_id + 1) % 10 for block_id in block_ids], blocks)

    with patch.object(self._executor, "write_blocks", write):
        _write(self, *arguments)


def _count_unwritten(self: ImportDesk, *arguments: Any) -> None:
    """A write that fails is taken for done."""
    real = self._executor.write_blocks

    def write(*blocks: Any) -> None:
        try:
            real(*blocks)
        except MemoryError:
            return

    with patch.object(self._executor, "write_blocks", write):
        _write(self, *arguments)


def _drop_but(kept: str) -> Callable[..., None]:
    def drop(self: ImportDesk, sequences: Any, reason: str) -> None:
        if reason != kept:
            _drop(self, sequences, reason)

    return drop


def _remaining_but_one(*arguments: Any) -> list[GenerateRequest]:
    """The last token that was received is not told to the next engine."""
    return [
        replace(
            request,
            resume=tuple(
                replace(part, token_ids=part.token_ids[:-1] if len(part.token_ids) > 1 else ())
                for part in request.resume
            ),
        )
        for request in _remaining(*arguments)
    ]


def _end_without_freeing(self: ExportDesk, sequence: Any, error: Any) -> None:
    with patch.object(self._scheduler, "finish", _nothing):
        _end(self, sequence, error)


def _free_all_but_one(self: KVManager, sequence: Any) -> None:
    """The last block of a sequence is forgotten."""
    if sequence in self._reserved and len(sequence.block_table) > 1:
        sequence.block_table.pop()
    _free(self, sequence)


def _nothing(*_: Any) -> None:
    return


_Patch = tuple[Any, str, Any]
BUGS: dict[str, tuple[_Patch, ...]] = {
    "the chain is not compared": ((KVImport, "_expected", _any_chain),),
    "the payload's checksum is not compared": ((ticket, "_parse", _parse_with_true_checksum),),
    **{
        f"{name} is not compared": (
            (ticket, "check_header", _believing(name)),
            (handoff, "check_header", _believing(name)),
        )
        for name in ("attempt", "epoch", "start")
    },
    "blocks are sent before they are computed": ((KVExport, "take", _take_early),),
    "blocks are counted but not written": ((ImportDesk, "_write", _write_nothing),),
    "blocks are written elsewhere": ((ImportDesk, "_write", _write_one_further),),
    "a failed write counts": ((ImportDesk, "_write", _count_unwritten),),
    "a preempted import stays open": ((ImportDesk, "drop", _drop_but("preempted")),),
    "an import outlives its request": ((ImportDesk, "drop", _drop_but("request_ended")),),
    "imports have no deadline": ((ImportDesk, "expire", _nothing), (ImportDesk, "end", _nothing)),
    "an import that ends is still waited for": ((Scheduler, "stop_awaiting", _nothing),),
    "a finished prefill keeps its blocks": ((ExportDesk, "_end", _end_without_freeing),),
    "a block is not freed": ((KVManager, "free", _free_all_but_one),),
    "a token is forgotten on the way": ((ingress, "remaining_requests", _remaining_but_one),),
}


@contextmanager
def planted(bug: str) -> Iterator[None]:
    """The code under test with one of ``BUGS``."""
    with ExitStack() as stack:
        for place, name, replacement in BUGS[bug]:
            stack.enter_context(patch.object(place, name, replacement))
        yield
