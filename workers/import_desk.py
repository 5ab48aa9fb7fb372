"""KV that other engines compute for this one: what is awaited, what came, and how each wait ended.

An import's life here:
1. ``begin`` is asked when a sequence first has its blocks. Where the service wants the prompt
   computed elsewhere (``remote_prefill``), the sequence waits in its place, unscheduled, and a
   ``PrefillRequest`` goes out in ``wanted``.
2. ``offer`` checks each ticket, writes its blocks into the sequence's own and counts them; only
   then does the prefix cache learn of them. Tickets of nobody are counted and passed over.
3. With the last token the wait is over. A broken ticket, the far side's failure, the deadline, a
   preemption or the sequence's own end close it earlier, all through ``_close``: the sequence is an
   ordinary one again, and what is missing is computed here. ``unwanted`` tells the far side,
   unless it was the one to end.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections import Counter
from collections.abc import Callable, Iterable, KeysView

from .executor import Executor, GroupLostError
from .kv.block import IntegrityError
from .kv.handoff import Accepted, Broken, KVImport
from .kv.tensor_words import as_tensor
from .kv.ticket import Buffer, KVLayout
from .kv.token_chain import TokenChain
from .scheduler import Scheduler
from .sequence import Sequence
from .types import PrefillRequest, RemoteQuery

logger = logging.getLogger(__name__)

RemotePrefill = Callable[[RemoteQuery], bool]

DEADLINE_S = 30.0
"""For all of a prompt's tickets to come, unless the service says otherwise."""


class ImportDesk:
    """The open imports of one engine.

    ``remote_prefill`` is asked in the engine's thread and may be set at any time, as may
    ``deadline_s``, the seconds from a wait's begin to its end.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        layout: KVLayout,
        *,
        only_prompts: bool = False,
    ) -> None:
        """``only_prompts``: generated tokens of a resumed sequence are computed here, since another
        engine would take them for its prompt's."""
        self.remote_prefill: RemotePrefill | None = None
        self.deadline_s = DEADLINE_S
        self.num_tokens_received = 0
        """Tokens whose tickets were written, since start."""
        self.ends: Counter[str] = Counter()
        """How waits ended; ``done`` with every token."""
        self.ignored: Counter[str] = Counter()
        """Tickets that were passed over, by reason."""
        self._wanted: list[PrefillRequest] = []
        self._unwanted: list[tuple[str, int]] = []
        self._executor = executor
        self._scheduler = scheduler
        self._layout = layout
        self._only_prompts = only_prompts
        self._epoch = secrets.randbits(63)
        # Not from 0: a prefill engine may still hold the same request's from another life of it.
        self._attempts = itertools.count(secrets.randbits(32))
        self._open: dict[Sequence, KVImport] = {}
        self._sequences: dict[tuple[str, int], Sequence] = {}

    def __len__(self) -> int:
        return len(self._open)

    @property
    def sequences(self) -> KeysView[Sequence]:
        """Those that await KV of another engine."""
        return self._open.keys()

    def begin(self, sequence: Sequence) -> int:
        """How many leading tokens of an admitted sequence another engine computes; 0: none."""
        limit = sequence.num_tokens - 1  # the last one's logits are needed here
        if self._only_prompts:
            limit = min(limit, sequence.num_prompt_tokens)
        start = sequence.num_computed_tokens
        if self.remote_prefill is None or sequence.room == 0 or start >= limit:
            return 0
        if sequence.params.prompt_logprobs is not None:
            return 0  # they need every position's logits
        query = RemoteQuery(
            request_id=sequence.request_id,
            num_prompt_tokens=sequence.num_tokens,
            num_cached_tokens=start,
            num_queued_tokens=(
                self._scheduler.num_queued_prefill_tokens - sequence.num_uncomputed_tokens
            ),
        )
        try:
            remote = self.remote_prefill(query)
        except Exception:
            logger.exception("no decision on where to prefill %s; it is here", query.request_id)
            remote = False
        if not remote:
            return 0
        self._ask(sequence, start, limit)
        return limit

    def _ask(self, sequence: Sequence, start: int, limit: int) -> None:
        assert sequence.admitted_at is not None, "a wait begins at the admission"
        deadline = sequence.admitted_at + self.deadline_s
        if sequence.deadline is not None:
            deadline = min(deadline, sequence.deadline)
        attempt = next(self._attempts)
        self._sequences[sequence.request_id, attempt] = sequence
        self._open[sequence] = KVImport(
            request_id=sequence.request_id,
            attempt=attempt,
            epoch=self._epoch,
            layout=self._layout,
            chain=TokenChain(
                sequence.token_ids,
                self._layout.block_size,
                self._layout.fingerprint,
                sequence.cache_salt,
            ),
            start=start,
            limit=limit,
            deadline=deadline,
        )
        self._wanted.append(
            PrefillRequest(
                request_id=sequence.request_id,
                attempt=attempt,
                epoch=self._epoch,
                token_ids=tuple(sequence.token_ids[:limit]),
                start=start,
                cache_salt=sequence.cache_salt,
                deadline_s=deadline - sequence.admitted_at,
                priority=sequence.priority,
            )
        )

    def offer(self, request_id: str, attempt: int, buffer: Buffer, now: float) -> None:
        """Take one ticket: write and count it, pass over it, or give up the wait it breaks."""
        sequence = self._sequences.get((request_id, attempt))
        if sequence is None:
            self.ignored["unknown"] += 1
            return
        incoming = self._open[sequence]
        result = incoming.offer(buffer, now)
        if isinstance(result, Accepted):
            self._write(sequence, incoming, result)
        elif isinstance(result, Broken):
            logger.warning("the KV of %s is computed here: %s", request_id, result.detail)
            self._close(sequence, result.reason)
        else:
            self.ignored[result.reason] += 1

    def _write(self, sequence: Sequence, incoming: KVImport, accepted: Accepted) -> None:
        size = self._layout.block_size
        block_ids = sequence.block_table[accepted.start // size : -(-accepted.end // size)]
        blocks = as_tensor(accepted.blocks_Ln2KSD, self._layout.dtype)
        try:
            self._executor.write_blocks(block_ids, blocks)
        except GroupLostError:
            raise
        except Exception:
            # Nothing of it is counted, so nothing of it is ever read.
            logger.exception("a KV ticket of %s could not be written", sequence.request_id)
            self._close(sequence, "write_failed")
            return
        self._scheduler.receive(sequence, accepted.end - accepted.start)
        self.num_tokens_received += accepted.end - accepted.start
        if not incoming.is_open:
            self._close(sequence, "done", tell=False)

    def end(self, request_id: str, attempt: int, reason: str | None) -> None:
        """The far side sends no more: it is through (``None``) or failed, for a stable word."""
        sequence = self._sequences.get((request_id, attempt))
        if sequence is not None:
            self._close(sequence, reason or "incomplete", tell=False)

    def expire(self, now: float) -> None:
        """End every wait whose deadline has passed."""
        for sequence, incoming in list(self._open.items()):
            if incoming.expired(now):
                self._close(sequence, "deadline")

    def drop(self, sequences: Iterable[Sequence], reason: str) -> None:
        """End the waits of sequences that have lost their blocks; others are passed over."""
        for sequence in sequences:
            if sequence in self._open:
                self._close(sequence, reason)

    def drop_all(self, reason: str) -> None:
        """End every wait."""
        self.drop(tuple(self._open), reason)

    def _close(self, sequence: Sequence, reason: str, *, tell: bool = True) -> None:
        """The one place where a wait ends."""
        incoming = self._open.pop(sequence)
        name = (incoming.request_id, incoming.attempt)
        del self._sequences[name]
        self._scheduler.stop_awaiting(sequence)
        self.ends[reason] += 1
        if tell:
            self._unwanted.append(name)

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would give anything."""
        return bool(self._wanted or self._unwanted)

    def take(self) -> tuple[list[PrefillRequest], list[tuple[str, int]]]:
        """What is wanted, and what no longer is, since it was last called."""
        wanted, self._wanted = self._wanted, []
        unwanted, self._unwanted = self._unwanted, []
        return wanted, unwanted

    def next_deadline(self) -> float | None:
        """The nearest deadline of an open wait."""
        return min((incoming.deadline for incoming in self._open.values()), default=None)

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where indexes, counters and sequences disagree."""
        if set(self._sequences.values()) != set(self._open):
            raise IntegrityError("the imports by name are not those by sequence")
        for sequence, incoming in self._open.items():
            incoming.check_integrity(sequence.num_computed_tokens)
            if sequence.num_awaited_tokens != incoming.limit:
                raise IntegrityError(
                    f"{sequence.request_id} awaits {sequence.num_awaited_tokens} tokens, "
                    f"its import {incoming.limit}"
                )
