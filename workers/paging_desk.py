"""KV blocks on their way between the pool and the tiers behind it; the one place of that I/O.

A block's way out: the scheduler gives its room to another; ``spill`` reads it before the step
writes anything, and the store keeps it.

A restore's life here:
1. ``begin`` is asked when a sequence gets blocks. What the tiers have of its prompt behind the
   pool's hits is held, as much of it as is faster restored than computed; the sequence waits in its
   place, unscheduled;
2. ``advance`` runs in each step: blocks in host memory are checked and written into the sequence's
   own, those on the disk once the file's thread has read and checked them, and only then the
   prefix cache learns of them. A step restores about as many tokens as it computes at most, so that
   nobody else waits longer for it than for a prefill chunk;
3. with the last block the wait is over. A damaged block, the deadline, a preemption or the
   sequence's own end close it earlier, all through ``_close``: what is missing is computed.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, KeysView
from dataclasses import dataclass, field
from itertools import islice, takewhile
from math import inf

from torch import Tensor

from .executor import Executor, GroupLostError
from .kv.block import EvictedBlock, IntegrityError
from .kv.manager import KVManager
from .kv.page_file import PageRead
from .kv.page_store import PageStore
from .kv.remote_prefill import RateMeter
from .kv.restore_choice import num_worth_restoring
from .kv.tier import Page, TierName
from .scheduler import Scheduler
from .sequence import Sequence
from .types import KVPagingStats

logger = logging.getLogger(__name__)

DEADLINE_S = 30.0
"""For all of a prompt's blocks to come back; a disk that is slower than that is none."""
_READS = 4
"""Reads under way for all restores together: one is read while the one before is written."""
_HALF_LIFE_S = 10.0
_FORGET_S = 60.0
"""Of measured rates; a tier that was slow is tried again after a minute."""
_PATIENCE_S = 0.005
"""How long a step without other work waits for the disk, and an arrival at most for that step."""


@dataclass(slots=True, eq=False)
class _Restore:
    """One sequence's pages on their way back; ``next`` counts those that are there."""

    sequence: Sequence
    pages: list[Page]
    deadline: float
    next: int = 0
    num_asked: int = 0
    """Leading pages that are in memory or have been asked of the disk."""
    reads: deque[PageRead] = field(default_factory=deque)
    is_open: bool = True

    @property
    def rest(self) -> Iterator[Page]:
        """The pages that are still to come."""
        return islice(self.pages, self.next, None)

    @property
    def is_next_here(self) -> bool:
        """Whether the next page is in memory."""
        on_disk = self.pages[self.next].tier == "disk"
        return not on_disk or bool(self.reads and self.reads[0].is_done)


class PagingDesk:
    """Spills and restores of one engine.

    ``tokens_per_step`` bounds what a step restores; ``prefill_rate`` is the measured rate of
    computing instead, tokens/s.
    """

    def __init__(
        self,
        executor: Executor,
        scheduler: Scheduler,
        kv: KVManager,
        store: PageStore,
        *,
        tokens_per_step: int,
        prefill_rate: Callable[[], float | None],
    ) -> None:
        self.hit_tokens: Counter[str] = Counter()
        """Tokens that came back, by the tier they came from, since start."""
        self.ends: Counter[str] = Counter()
        """Prompts that the tiers had something of: how that ended; ``done`` with every block."""
        self._executor = executor
        self._scheduler = scheduler
        self._kv = kv
        self._store = store
        self._blocks_per_step = max(1, tokens_per_step // kv.block_size)
        self._prefill_rate = prefill_rate
        self._rates: dict[TierName, RateMeter] = {
            tier: RateMeter(half_life_s=_HALF_LIFE_S, forget_s=_FORGET_S)
            for tier in ("host", "disk")
        }
        self._open: dict[Sequence, _Restore] = {}

    @property
    def sequences(self) -> KeysView[Sequence]:
        """Those whose blocks come back."""
        return self._open.keys()

    @property
    def has_work(self) -> bool:
        """Whether a step would get on with a restore, or wait for one."""
        return bool(self._open)

    # --- out of the pool ------------------------------------------------------------------------

    def spill(self) -> None:
        """Keep what the scheduler has taken from the prefix index since the last call.

        Due before anything writes to the pool. What cannot be read is counted and lost.
        """
        evicted = iter(self._store.missing(self._kv.take_evicted()))
        while batch := list(islice(evicted, self._store.batch)):
            self._spill(batch)
        self._store.forget(self._kv.take_forgotten())

    def _spill(self, batch: list[EvictedBlock]) -> None:
        blocks = self._store.room(len(batch))
        try:
            self._executor.read_blocks([block.block_id for block in batch], blocks)
        except GroupLostError:
            raise
        except Exception:
            logger.exception("%d KV blocks could not be read", len(batch))
            self._store.drops["read_failed"] += len(batch)
            return
        self._store.put(batch, blocks)

    # --- back into the pool ---------------------------------------------------------------------

    def begin(self, sequence: Sequence) -> int:
        """How many leading tokens an admitted sequence has once its restore is done; 0: none."""
        self.spill()  # what was evicted in this very step may be what is looked for
        # They are written before any of them is given back, so that there must be room for all.
        room = self._kv.room(sequence) - sequence.num_computed_tokens
        names = islice(self._kv.names_behind(sequence), room // self._kv.block_size)
        pages = self._store.find(names)
        if not pages:
            return 0
        count = self._num_worth(pages)
        if count == 0:
            self.ends["slower"] += 1
            return 0
        restore = _Restore(sequence, pages[:count], time.monotonic() + DEADLINE_S)
        for page in restore.pages:
            self._store.hold(page)
        self._open[sequence] = restore
        self._ask(restore)
        return sequence.num_computed_tokens + count * self._kv.block_size

    def _num_worth(self, pages: list[Page]) -> int:
        now = time.monotonic()
        restore_s: dict[TierName, float | None] = {}
        for tier, meter in self._rates.items():
            blocks_per_s = meter.rate(now)
            restore_s[tier] = None if blocks_per_s is None else _inverse(blocks_per_s)
        rate = self._prefill_rate()
        compute_s = self._kv.block_size / rate if rate else None
        return num_worth_restoring([page.tier for page in pages], restore_s, compute_s)

    def _ask(self, restore: _Restore) -> None:
        """Have the next pages read that are not in memory."""
        while restore.num_asked < len(restore.pages) and self._store.num_reading < _READS:
            ahead = restore.pages[restore.num_asked : restore.num_asked + self._store.batch]
            on_disk = list(takewhile(lambda page: page.tier == "disk", ahead))
            if on_disk:
                restore.reads.append(self._store.read_disk(on_disk))
            restore.num_asked += max(1, len(on_disk))

    def advance(self, *, idle: bool) -> None:
        """Write what is there, as far as a step may; ``idle`` steps wait for the disk a little."""
        room = self._blocks_per_step
        self._store.collect()
        if idle and self._open and not any(r.is_next_here for r in self._open.values()):
            self._store.wait(_PATIENCE_S)
            self._store.collect()
        now = time.monotonic()
        for restore in list(self._open.values()):
            while room > 0 and restore.is_open and restore.is_next_here:
                room -= self._write_next(restore, room)
            if restore.is_open and now > restore.deadline:
                # A rate of nothing: the tier is left alone until that is forgotten.
                tier = restore.pages[restore.next].tier
                self._rates[tier].add(0, DEADLINE_S, now)
                self._close(restore, "deadline")
        for restore in self._open.values():
            self._ask(restore)

    def _write_next(self, restore: _Restore, room: int) -> int:
        """Write the next blocks that lie together; how many of the step's blocks that took."""
        begin = time.perf_counter()
        first = restore.pages[restore.next]
        if first.tier == "host":
            pages = self._neighbours(restore, min(room, self._store.batch))
            good = list(takewhile(self._store.is_sound, pages))
            blocks = self._store.host_blocks(good) if good else None
            error, read_s = "checksum", 0.0
        else:
            read = restore.reads.popleft()
            pages, good = list(read.pages), list(read.pages[: read.num_good])
            size = self._store.page_bytes
            blocks = self._store.as_blocks(read.into[: len(good) * size]) if good else None
            error, read_s = read.error or "read_failed", read.seconds
        if blocks is not None and not self._write(restore, good, blocks):
            return len(good)
        if good:
            seconds = read_s + time.perf_counter() - begin
            self._rates[first.tier].add(len(good), seconds, time.monotonic())
        if len(good) < len(pages):
            self._store.drop(pages[len(good)], error)
            logger.warning("a KV block in the %s tier is lost: %s", first.tier, error)
            self._close(restore, "damaged")
        elif restore.next == len(restore.pages):
            self._close(restore, "done")
        return len(pages)

    def _neighbours(self, restore: _Restore, limit: int) -> list[Page]:
        """The next pages in host memory that lie one behind the other."""
        rest = restore.rest
        found = [next(rest)]
        for page in islice(rest, limit - 1):
            if page.tier != "host" or page.slot != found[-1].slot + 1:
                break
            found.append(page)
        return found

    def _write(self, restore: _Restore, pages: list[Page], blocks: Tensor) -> bool:
        """Write checked blocks and count them; whether that went well."""
        sequence, size = restore.sequence, self._kv.block_size
        start = sequence.num_computed_tokens // size
        try:
            self._executor.write_blocks(sequence.block_table[start : start + len(pages)], blocks)
        except GroupLostError:
            raise
        except Exception:
            # Nothing of it is counted, so nothing of it is ever read.
            logger.exception("KV blocks of %s could not be written", sequence.request_id)
            self._close(restore, "write_failed")
            return False
        num_tokens = len(pages) * size
        self._scheduler.receive(sequence, num_tokens)
        self._kv.count_cached(sequence, num_tokens)
        self.hit_tokens[pages[0].tier] += num_tokens
        for page in pages:
            self._store.release(page)
        restore.next += len(pages)
        return True

    def release(self, sequence: Sequence) -> None:
        """End the restore of a sequence that has lost its blocks, if there is one."""
        restore = self._open.get(sequence)
        if restore is not None:
            self._close(restore, "released")

    def _close(self, restore: _Restore, reason: str) -> None:
        """The one place where a restore ends."""
        del self._open[restore.sequence]
        restore.is_open = False
        for page in restore.rest:
            self._store.release(page)
        self._scheduler.stop_awaiting(restore.sequence)
        self.ends[reason] += 1

    # --- end and views --------------------------------------------------------------------------

    def drop_all(self, reason: str) -> None:
        """End every restore."""
        for restore in list(self._open.values()):
            self._close(restore, reason)

    def close(self) -> None:
        """End the file and its thread."""
        self._store.close()

    def stats(self) -> KVPagingStats:
        """Sizes now and totals since start."""
        return KVPagingStats(
            host_bytes=self._store.used_bytes("host"),
            disk_bytes=self._store.used_bytes("disk"),
            pages_writing=self._store.num_writing,
            spilled_blocks=self._store.num_spilled,
            hit_tokens=dict(self.hit_tokens),
            restores=dict(self.ends),
            drops=dict(self._store.drops),
        )

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where restores, sequences and the store disagree."""
        self._store.check_integrity(page for r in self._open.values() for page in r.rest)
        size = self._kv.block_size
        for sequence, restore in self._open.items():
            rest = len(restore.pages) - restore.next
            if sequence.num_awaited_tokens - sequence.num_computed_tokens != rest * size:
                raise IntegrityError(
                    f"{sequence.request_id} awaits {sequence.num_awaited_tokens} tokens and has "
                    f"{sequence.num_computed_tokens}; {rest} blocks of {size} are to come back"
                )


def _inverse(rate: float) -> float:
    return 1 / rate if rate else inf
