"""Prefills for other engines: what was asked, how far it is, and the tickets of each step.

A prefill's life here:
1. ``add`` queues a sequence that has no room for output: it competes like any other, by rank. What
   can never be computed ends at once, as does one that finds the queue full.
2. ``send`` runs after each step. It copies the blocks that are complete since (prefix hits too)
   straight into a ticket, one bounded ticket a step and prefill. A preempted prefill is computed
   again, and what was sent of it is not sent again.
3. When its last token is sent, or at an abort, a deadline or an error, it passes through ``_end``:
   its blocks go at once (a ticket is a copy), and one ``PrefillEnd`` says so, behind the tickets.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, KeysView

from .executor import Executor, GroupLostError
from .kv.block import IntegrityError
from .kv.handoff import KVExport
from .kv.manager import KVManager
from .kv.tensor_words import as_tensor
from .kv.ticket import Buffer, KVLayout, TicketHeader, encode_ticket
from .kv.ticket_memory import TicketMemory
from .kv.token_chain import TokenChain
from .scheduler import Scheduler
from .sequence import Sequence
from .types import BlockId, KVExportOut, PrefillEnd, PrefillRequest, QueueFullError, RequestError

logger = logging.getLogger(__name__)


class ExportDesk:
    """The open prefills of one engine.

    A ticket holds ``max_ticket_tokens``, and what completes their last block: as many as a step
    computes, so that a long prefix hit is no giant array, and computing never outruns sending.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        kv: KVManager,
        layout: KVLayout,
        *,
        max_ticket_tokens: int,
        max_waiting: int,
    ) -> None:
        self.num_tokens_sent = 0
        """Tokens whose tickets are out, since start."""
        self._tickets: list[KVExportOut] = []
        self._ends: list[PrefillEnd] = []
        self._executor = executor
        self._scheduler = scheduler
        self._kv = kv
        self._layout = layout
        most_blocks = layout.num_blocks(0, max_ticket_tokens)
        self._most = most_blocks * layout.block_size
        self._memory = TicketMemory(layout.ticket_bytes(most_blocks))
        self._max_waiting = max_waiting
        self._open: dict[Sequence, KVExport] = {}
        self._sequences: dict[tuple[str, int], Sequence] = {}

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._open

    def __len__(self) -> int:
        return len(self._open)

    @property
    def sequences(self) -> KeysView[Sequence]:
        """Those that wait or run here."""
        return self._open.keys()

    def is_open(self, request_id: str, attempt: int) -> bool:
        """Whether that prefill waits or runs; any thread may ask."""
        return (request_id, attempt) in self._sequences

    def add(self, request: PrefillRequest) -> None:
        """Queue a prefill whose ids and span are sound; a refusal is its end."""
        arrival = time.monotonic()
        name = f"{request.request_id}#{request.attempt}"
        sequence = Sequence.from_prefill(request, name, arrival=arrival)
        if self._scheduler.num_waiting >= self._max_waiting:
            self.refuse(
                request,
                QueueFullError(
                    f"{self._scheduler.num_waiting} requests are waiting and max_waiting is "
                    f"{self._max_waiting}",
                    code="queue_full",
                ),
            )
            return
        try:
            self._scheduler.add(sequence)
        except ValueError as error:
            self.refuse(request, RequestError(str(error), code="context_length_exceeded"))
            return
        self._sequences[request.request_id, request.attempt] = sequence
        self._open[sequence] = KVExport(
            request_id=request.request_id,
            attempt=request.attempt,
            epoch=request.epoch,
            layout=self._layout,
            chain=TokenChain(
                request.token_ids,
                self._layout.block_size,
                self._layout.fingerprint,
                request.cache_salt,
            ),
            start=request.start,
            limit=len(request.token_ids),
            deadline=arrival + request.deadline_s,
        )

    def refuse(self, request: PrefillRequest, error: RequestError) -> None:
        """The end of a prefill that was never queued."""
        self._ends.append(PrefillEnd(request.request_id, request.attempt, error))

    def send(self) -> None:
        """Encode what the last step completed, and end what is sent whole."""
        for sequence, export in list(self._open.items()):
            span = export.take(min(sequence.num_computed_tokens, export.next + self._most))
            if span is None:
                continue
            try:
                self._encode(sequence, export, *span)
            except GroupLostError:
                raise
            except Exception as error:
                self.fail(sequence, error)
                continue
            if not export.is_open:
                self._end(sequence, None)

    def _encode(self, sequence: Sequence, export: KVExport, start: int, end: int) -> None:
        size = self._layout.block_size
        block_ids = sequence.block_table[start // size : -(-end // size)]
        buffer = export_ticket(self._executor, self._memory, export.header(start, end), block_ids)
        self._tickets.append(KVExportOut(export.request_id, export.attempt, buffer))
        self.num_tokens_sent += end - start

    def abort(self, request_id: str, attempt: int) -> None:
        """End a prefill; an unknown or ended one is left as it is."""
        sequence = self._sequences.get((request_id, attempt))
        if sequence is not None:
            self._end(sequence, RequestError("the prefill was aborted", code="aborted"))

    def abort_all(self) -> None:
        """End every prefill."""
        for request_id, attempt in list(self._sequences):
            self.abort(request_id, attempt)

    def expire(self, now: float) -> None:
        """End every prefill whose deadline has passed."""
        for sequence, export in list(self._open.items()):
            if export.expired(now):
                error = RequestError(
                    f"the prefill's deadline passed after {export.num_tokens} of "
                    f"{export.limit - export.start} tokens",
                    code="deadline_exceeded",
                )
                self._end(sequence, error)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a prefill that raised in a step."""
        logger.error("prefill %s failed in a step", sequence.request_id, exc_info=error)
        self._kv.forget(sequence)  # whatever went wrong may be in its blocks
        told = RequestError(
            f"the engine failed on this prefill: {type(error).__name__}", code="internal_error"
        )
        self._end(sequence, told)

    def fail_all(self, error: RequestError, also: Iterable[PrefillRequest]) -> None:
        """The ends of all prefills of a broken engine, and of ``also``, not yet added."""
        self._ends += [PrefillEnd(*name, error) for name in self._sequences]
        self._sequences.clear()
        self._open.clear()
        for request in also:
            self.refuse(request, error)

    def _end(self, sequence: Sequence, error: RequestError | None) -> None:
        """The one place where a prefill leaves the engine."""
        export = self._open.pop(sequence)
        del self._sequences[export.request_id, export.attempt]
        self._scheduler.finish(sequence)
        self._ends.append(PrefillEnd(export.request_id, export.attempt, error))

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would give anything."""
        return bool(self._tickets or self._ends)

    def take(self) -> tuple[list[KVExportOut], list[PrefillEnd]]:
        """The tickets and ends since it was last called."""
        tickets, self._tickets = self._tickets, []
        ends, self._ends = self._ends, []
        return tickets, ends

    def next_deadline(self) -> float | None:
        """The nearest deadline of an open prefill."""
        return min((export.deadline for export in self._open.values()), default=None)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where the two indexes or the counters disagree."""
        if set(self._sequences.values()) != set(self._open):
            raise IntegrityError("the prefills by name are not those by sequence")
        for sequence, export in self._open.items():
            export.check_integrity()
            if not export.is_open:
                raise IntegrityError(f"prefill {sequence.request_id} is sent whole and still held")


def export_ticket(
    executor: Executor, memory: TicketMemory, header: TicketHeader, block_ids: list[BlockId]
) -> Buffer:
    """A new ticket of an executor's blocks, which are copied straight into it."""
    buffer = memory.take(header.num_bytes)
    encode_ticket(
        header,
        buffer,
        lambda words: executor.read_blocks(block_ids, as_tensor(words, header.layout.dtype)),
    )
    return buffer
