"""Both ends of a KV handoff, as state machines without IO; the clock is passed in.

An import (decode side, one sequence) and the events that move it:

| state     | ``offer``: accepted | ``offer``: the last | ``offer``: broken | ``end(reason)`` |
|-----------|---------------------|---------------------|-------------------|-----------------|
| REQUESTED | IMPORTING           | COMPLETE            | ENDED             | ENDED           |
| IMPORTING | IMPORTING           | COMPLETE            | ENDED             | ENDED           |
| COMPLETE  | (ignored)           | (ignored)           | (ignored)         | COMPLETE        |
| ENDED     | (ignored)           | (ignored)           | (ignored)         | ENDED           |

A ticket that is late or meant for another (another request, attempt or life, or a span that is
already here) is ignored: it says nothing about this import. A ticket that is damaged, of another
layout or prompt, out of order, or that comes after the deadline breaks the import, whose sequence
then computes the rest itself: nothing is sent twice, so nothing better can come. The first reason
stays.

An export (prefill side, one sequence):

| state     | ``take`` with new tokens | ``take`` with the last | ``end(reason)`` |
|-----------|--------------------------|------------------------|-----------------|
| QUEUED    | EXPORTING                | COMPLETE               | ENDED           |
| EXPORTING | EXPORTING                | COMPLETE               | ENDED           |
| COMPLETE  | (None)                   | (None)                 | COMPLETE        |
| ENDED     | (None)                   | (None)                 | ENDED           |

Both count in tokens: ``start <= next <= limit``. ``attempt`` counts askings over an engine's life,
so that no two of them share it; ``epoch`` tells that life from every other.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from .block import IntegrityError
from .ticket import (
    Buffer,
    Expected,
    KVLayout,
    TicketError,
    TicketHeader,
    Words,
    check_header,
    decode_ticket,
    read_header,
    request_digest,
)
from .token_chain import TokenChain

_NOT_OURS = frozenset({"wrong_request", "stale_epoch", "stale_attempt"})
"""Ticket errors that say nothing about the import they were offered to."""


class ImportState(Enum):
    """Where an import stands."""

    REQUESTED = "requested"  # nothing has come
    IMPORTING = "importing"  # some blocks are here
    COMPLETE = "complete"
    ENDED = "ended"  # the sequence computes the rest


class ExportState(Enum):
    """Where an export stands."""

    QUEUED = "queued"  # nothing was yielded
    EXPORTING = "exporting"
    COMPLETE = "complete"
    ENDED = "ended"


@dataclass(frozen=True, slots=True, eq=False)
class Accepted:
    """Blocks to write behind the import's former ``next``: the tokens ``[start, end)``.

    ``blocks_Ln2KSD`` is a read-only view of the ticket.
    """

    blocks_Ln2KSD: Words
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Ignored:
    """The ticket does not concern the import; to be counted under ``reason``."""

    reason: str


@dataclass(frozen=True, slots=True)
class Broken:
    """The import has ended with ``reason``; ``detail`` says what was wrong."""

    reason: str
    detail: str


class _Span:
    """What both ends have: whose tokens, which of them, how far they are, and until when."""

    def __init__(
        self,
        *,
        request_id: str,
        attempt: int,
        epoch: int,
        layout: KVLayout,
        chain: TokenChain,
        start: int,
        limit: int,
        deadline: float,
    ) -> None:
        """The tokens ``[start, limit)`` until ``deadline``; ``start`` begins a block.

        ``chain`` names this side's tokens, at least ``limit`` of them.
        """
        if not 0 <= start < limit or start % layout.block_size:
            raise ValueError(
                f"a handoff is a span from the begin of a block of {layout.block_size} tokens, "
                f"got {start} to {limit}"
            )
        self.request_id = request_id
        self.attempt = attempt
        self.epoch = epoch
        self.start = start
        self.limit = limit
        """Behind the last token."""
        self.next = start
        """The first token that is still to come."""
        self.deadline = deadline
        self.end_reason: str | None = None
        """Why it ended before it was complete."""
        self._layout = layout
        self._chain = chain
        self._digest = request_digest(request_id)

    @property
    def is_open(self) -> bool:
        """Whether more is to come."""
        return self.end_reason is None and self.next < self.limit

    @property
    def num_tokens(self) -> int:
        """Tokens that have passed."""
        return self.next - self.start

    def expired(self, now: float) -> bool:
        """Whether it is open past its deadline: then ``end("deadline")`` is due."""
        return self.is_open and now > self.deadline

    def end(self, reason: str) -> bool:
        """Stop; whether it was open. What has passed stays, and so does the first reason."""
        if not self.is_open:
            return False
        self.end_reason = reason
        return True

    def _check(self, what: str) -> None:
        who = f"the {what} of {self.request_id} (attempt {self.attempt})"
        if not self.start <= self.next <= self.limit:
            raise IntegrityError(f"{who} is at token {self.next} of {self.start} to {self.limit}")
        if self.next < self.limit and self.next % self._layout.block_size:
            raise IntegrityError(f"{who} stopped inside a block, at token {self.next}")
        if self.next == self.limit and self.end_reason is not None:
            raise IntegrityError(f"{who} is complete, and yet ended with {self.end_reason}")


class KVImport(_Span):
    """One sequence's KV on its way in: what is here, and what the next ticket must say."""

    @property
    def state(self) -> ImportState:
        """See the module's table."""
        if self.end_reason is not None:
            return ImportState.ENDED
        if self.next == self.limit:
            return ImportState.COMPLETE
        return ImportState.REQUESTED if self.next == self.start else ImportState.IMPORTING

    def offer(self, buffer: Buffer, now: float) -> Accepted | Ignored | Broken:
        """Check one ticket; ``next`` moves on where it is accepted.

        The caller writes accepted blocks and counts them at once.
        """
        if not self.is_open:
            return Ignored(self.state.value)
        try:
            header = read_header(buffer)
            seen = header.end <= self.next
            check_header(header, self._expected(header.start if seen else self.next))
            if seen:
                return Ignored("duplicate")
            if self.expired(now):
                return self._break("deadline", "the ticket came after the deadline")
            blocks = decode_ticket(buffer, self._expected(self.next))
        except TicketError as error:
            if error.code in _NOT_OURS:
                return Ignored(error.code)
            return self._break(error.code, str(error))
        self.next = header.end
        return Accepted(blocks, header.start, header.end)

    def _break(self, reason: str, detail: str) -> Broken:
        self.end_reason = reason
        return Broken(reason, detail)

    def _expected(self, start: int) -> Expected:
        return Expected(
            layout=self._layout,
            request_id_digest=self._digest,
            attempt=self.attempt,
            epoch=self.epoch,
            start=start,
            limit=self.limit,
            chain_at=self._chain.at,
        )

    def check_integrity(self, num_computed_tokens: int) -> None:
        """Raise ``IntegrityError`` where the counters disagree with each other or the sequence.

        ``num_computed_tokens`` is the sequence's own count; it is compared while more is to come.
        """
        self._check("import")
        if self.is_open and num_computed_tokens != self.next:
            raise IntegrityError(
                f"the import of {self.request_id} has the tokens up to {self.next}, "
                f"its sequence up to {num_computed_tokens}"
            )


class KVExport(_Span):
    """One prefill for another engine: which of its computed tokens are still to be yielded."""

    @property
    def state(self) -> ExportState:
        """See the module's table."""
        if self.end_reason is not None:
            return ExportState.ENDED
        if self.next == self.limit:
            return ExportState.COMPLETE
        return ExportState.QUEUED if self.next == self.start else ExportState.EXPORTING

    def take(self, num_computed_tokens: int) -> tuple[int, int] | None:
        """The span ``[start, end)`` to yield now, given how many of the tokens are computed.

        Whole blocks, and the rest of the prompt in the last span. ``None`` where no block was
        filled since, also while a preempted prefill is computed again.
        """
        if not self.is_open:
            return None
        end = min(num_computed_tokens, self.limit)
        if end < self.limit:
            end -= end % self._layout.block_size
        if end <= self.next:
            return None
        start, self.next = self.next, end
        return start, end

    def header(self, start: int, end: int) -> TicketHeader:
        """The header of the ticket of a span that ``take`` gave."""
        return TicketHeader(
            layout=self._layout,
            request_id_digest=self._digest,
            attempt=self.attempt,
            epoch=self.epoch,
            start=start,
            end=end,
            chain=self._chain.at(end),
        )

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where the counters disagree with each other."""
        self._check("export")
