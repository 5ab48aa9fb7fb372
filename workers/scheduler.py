"""Which sequences run in the next step, and on how many of their tokens.

A sequence's life here:
1. ``add`` puts it in the queue, ordered by rank (see ``Rank``): the head is admitted first and
   nobody overtakes it, and every arrival after a bounded time ranks behind it, so none starves;
2. it is admitted when the free blocks cover its worst case and a place in the batch is free;
3. what comes back from a tier behind the pool (``await_restored``), or else what another engine
   computes of it (``await_remote``), is not scheduled here: it keeps its place and its blocks while
   ``receive`` counts what came, until all is there or ``stop_awaiting``;
   ``schedule`` gives every other one tokens each step: decode rows first, then the shortest
   remainders;
4. ``commit`` counts them as computed; after the prompt, ``fork`` adds the request's other choices.
   Where the device is still at work, ``schedule_behind`` plans the step that follows before that;
5. when a running sequence finds no free block, the last-ranked one is preempted: its blocks go, its
   tokens stay and are computed again after a new admission at its old rank. The first-ranked one is
   never preempted for blocks, so the engine always gets on;
6. ``finish`` or ``abort`` frees it, from whatever state, once or many times over.

The scheduler sees no block ids, no clock and no tensors: the policy is the pure functions below.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable
from collections.abc import Sequence as Items
from itertools import pairwise
from operator import attrgetter
from typing import TypeVar

from .batch import ScheduledBatch, ScheduledSequence
from .config import EngineConfig
from .kv.block import IntegrityError
from .kv.manager import BlockCopy, KVManager
from .sequence import Rank, Sequence, SequenceStatus
from .types import SamplingParams

T = TypeVar("T")
_by_rank = attrgetter("rank")


def share_budget(pending: Items[int], budget: int) -> list[int]:
    """Tokens for each running sequence, given in rank order with its uncomputed tokens.

    One pending token is a decode row and is served first. What is left goes to the shortest
    remainders: a forced text inside an answer does not wait for a long prompt, and a nearly
    finished prompt is finished. The sum is at most ``budget``.
    """
    shares = [1 if count == 1 else 0 for count in pending]
    left = budget - sum(shares)
    if left < 0:
        raise ValueError(f"{sum(shares)} decode rows exceed the budget of {budget} tokens")
    chunks = [i for i, count in enumerate(pending) if count > 1]
    for i in sorted(chunks, key=pending.__getitem__):
        shares[i] = min(pending[i], left)
        left -= shares[i]
    return shares


def worst_case_blocks(prompt: int, total: int, choices: int, block_size: int) -> int:
    """Blocks for ``choices`` sequences of ``total`` tokens that share their full prompt blocks."""
    shared = prompt // block_size
    return shared + choices * (-(-total // block_size) - shared)


def choose_victims(candidates: Items[T], enough: Callable[[Items[T]], bool]) -> list[T]:
    """As few leading candidates as are enough, less those among them that are not needed.

    Empty where nothing is needed, and where not even all would be enough. Taking more must never
    be worse: the number of leading ones is found by bisection.
    """
    if not enough(candidates):
        return []
    numbers = range(len(candidates))
    count = bisect_left(numbers, True, key=lambda number: enough(candidates[:number]))
    victims = list(candidates[:count])
    for candidate in reversed(candidates[:count]):
        rest = [victim for victim in victims if victim is not candidate]
        if enough(rest):
            victims = rest
    return victims


def _compute_here(_: Sequence) -> int:
    """Nothing is awaited."""
    return 0


def _nobody_cares(_: Sequence) -> None:
    """Nobody is told."""


class Scheduler:
    """Continuous batching over one ``KVManager``."""

    def __init__(self, config: EngineConfig, kv: KVManager) -> None:
        self._config = config
        self._kv = kv
        self._waiting: list[Sequence] = []  # both lists in rank order
        self._running: list[Sequence] = []
        self._choices: dict[str, list[Sequence]] = {}  # live sequences by request
        self._num_slots_used = 0  # running sequences and the choices still to be forked from them
        self._next_ticket = 0
        self.await_remote: Callable[[Sequence], int] = _compute_here
        """Asked once a sequence, when it first has its blocks: how many of its leading tokens
        another engine computes, 0 for none; at most all but the last."""
        self.await_restored: Callable[[Sequence], int] = _compute_here
        """Asked before that, and at every admission: how many come back from a tier, counted from
        its first token; 0 for none."""
        self.on_release: Callable[[Sequence], None] = _nobody_cares
        """Told when a sequence loses its blocks: it ended or was preempted."""
        self.num_preemptions = 0
        """Preemptions since start."""

    # --- the policy -----------------------------------------------------------------------------

    def schedule(self, now: float) -> ScheduledBatch:
        """The next step. ``now`` (seconds) is noted in sequences that leave the queue.

        Run the block copies and the forward, then ``commit`` the batch; if the forward fails,
        ``finish`` every sequence in it.
        """
        preempted = self._preempt_for_priority()
        num_forced_out = self.num_preemptions
        runnable = [s for s in self._running if not s.is_awaiting]
        shares = share_budget(
            [s.num_uncomputed_tokens for s in runnable], self._config.max_batched_tokens
        )
        scheduled: list[ScheduledSequence] = []
        copies: list[BlockCopy] = []
        for sequence, tokens in zip(runnable, shares, strict=True):
            if tokens == 0 or sequence.status is not SequenceStatus.RUNNING:
                continue
            while (own_copies := self._kv.extend(sequence, tokens)) is None:
                preempted.append(self._running[-1])
                self._preempt(self._running[-1])
                if preempted[-1] is sequence:
                    break
            else:
                scheduled.append(_scheduled(sequence, tokens))
                copies.extend(own_copies)
        if self.num_preemptions == num_forced_out:  # else there is no block to spare
            scheduled.extend(self._admissions(scheduled, now))
        return _batch(scheduled, copies, preempted)

    def schedule_behind(self, batch: ScheduledBatch, now: float) -> ScheduledBatch | None:
        """The step behind ``batch``, which is under way: neither committed nor are its tokens read.

        What samples in ``batch`` is taken to go on with that one token, unless it has room for no
        other. Nobody is preempted: ``None``, with nothing changed, where somebody would have to be,
        so that ``batch`` is to be committed first. The rest is as in ``schedule``.
        """
        if self._priority_victims():
            return None
        under_way = {scheduled.sequence: scheduled for scheduled in batch.sequences}
        runnable = [(s, under_way.get(s)) for s in self._running if not s.is_awaiting]
        shares = share_budget(
            [_num_pending(*each) for each in runnable], self._config.max_batched_tokens
        )
        scheduled = [
            _scheduled(sequence, tokens, before)
            for (sequence, before), tokens in zip(runnable, shares, strict=True)
            if tokens > 0
        ]
        if not self._kv.fit((row.sequence, row.end) for row in scheduled):
            return None
        copies: list[BlockCopy] = []
        for row in scheduled:
            own_copies = self._kv.extend(
                row.sequence,
                row.num_new_tokens,
                num_under_way=row.start - row.sequence.num_computed_tokens,
            )
            assert own_copies is not None, "all of them fit"
            copies.extend(own_copies)
        return _batch([*scheduled, *self._admissions(scheduled, now)], copies, [])

    def _admissions(
        self, scheduled: Items[ScheduledSequence], now: float
    ) -> list[ScheduledSequence]:
        """Admit from the head of the queue while tokens, slots and blocks last."""
        budget = self._config.max_batched_tokens - sum(row.num_new_tokens for row in scheduled)
        admitted: list[ScheduledSequence] = []
        while self._waiting and budget > 0:
            head = self._waiting[0]
            if self._missing_slots(head) or not self._kv.admit(head, self._reservation(head)):
                break
            self._start(self._waiting.pop(0), now)
            head.num_awaited_tokens = self.await_restored(head)
            # What comes from elsewhere is written before any of it is given back.
            has_room = head.num_tokens <= self._kv.room(head)
            if not head.is_awaiting and head.num_preemptions == 0 and has_room:
                head.num_awaited_tokens = self.await_remote(head)
            if head.is_awaiting:
                tokens = head.num_awaited_tokens - head.num_computed_tokens
            else:
                tokens = min(head.num_uncomputed_tokens, budget)
                admitted.append(_scheduled(head, tokens))
                budget -= tokens
            copies = self._kv.extend(head, tokens)
            assert copies == [], "an admission's first tokens lie in its own reserved blocks"
        return admitted

    def _preempt_for_priority(self) -> list[Sequence]:
        """Make room for the head of the queue at the cost of strictly worse base priorities."""
        victims = self._priority_victims()
        for victim in victims:
            victim.num_priority_preemptions += 1
            self._preempt(victim)
        return victims

    def _priority_victims(self) -> list[Sequence]:
        """Who makes room for the head of the queue.

        Worst rank first, nobody twice, nobody without need, and nobody at all where it would not
        be enough or where the others leave the head no token of this step.
        """
        if not self._waiting:
            return []
        head = self._waiting[0]
        worse = [
            s
            for s in reversed(self._running)
            if s.priority > head.priority and s.rank > head.rank and not s.num_priority_preemptions
        ]
        if not worse:
            return []
        blocks = self._reservation(head)

        def enough(victims: Items[Sequence]) -> bool:
            slots = sum(1 + s.num_pending_choices for s in victims)
            return slots >= self._missing_slots(head) and not self._kv.shortfall(
                head, blocks, without=victims
            )

        victims = choose_victims(worse, enough)
        others = [s for s in self._running if s not in victims and not s.is_awaiting]
        if sum(s.num_uncomputed_tokens for s in others) >= self._config.max_batched_tokens:
            return []
        return victims

    def _reservation(self, sequence: Sequence) -> int:
        """The worst case in blocks; without a named ``max_tokens`` never more than there are."""
        total = sequence.worst_case_tokens(self._config.default_reservation)
        choices = 1 + sequence.num_pending_choices
        blocks = worst_case_blocks(sequence.num_prompt_tokens, total, choices, self._kv.block_size)
        if sequence.sends_from is None:
            blocks = min(blocks, choices * self._most(sequence.num_computed_tokens, total))
        return blocks if sequence.params.max_tokens else min(blocks, self._kv.num_blocks)

    def _most(self, start: int, end: int) -> int:
        """The most blocks that a sequence holds at once on its way from ``start`` to ``end``."""
        return self._kv.most_blocks(start, end, self._config.max_batched_tokens)

    def _missing_slots(self, sequence: Sequence) -> int:
        free = self._config.max_num_seqs - self._num_slots_used
        return max(0, 1 + sequence.num_pending_choices - free)

    # --- arrivals and ends ----------------------------------------------------------------------

    def refusal(
        self, prompt_len: int, params: SamplingParams, choices: int | None = None
    ) -> str | None:
        """Why a request could never run in this engine, with the numbers; ``None`` if it can.

        ``choices`` share the prompt, by default all that ``params`` asks for.
        """
        output = 1 if params.max_tokens is None else params.max_tokens
        return self._refusal(prompt_len, output, params.n if choices is None else choices)

    def _refusal(self, prompt_len: int, output: int, n: int, *, sends: bool = False) -> str | None:
        if n > self._config.max_num_seqs:
            return (
                f"n is {n}; this engine runs at most {self._config.max_num_seqs} "
                "sequences at a time"
            )
        size, have = self._kv.block_size, self._kv.num_blocks
        need = worst_case_blocks(prompt_len, prompt_len + output, n, size)
        if not sends:
            need = min(need, n * self._most(0, prompt_len + output))
        if need <= have:
            return None
        choices = "" if n == 1 else f" for each of {n} choices"
        return (
            f"a prompt of {prompt_len} tokens with {output} output tokens{choices} needs {need} "
            f"KV blocks of {size} tokens; this engine has {have}"
        )

    def add(self, *sequences: Sequence) -> None:
        """Queue the new sequences of one request: one, or several where it is resumed.

        Raises ``ValueError`` if one could outgrow an empty pool: refuse such requests first, and
        keep ``max_len`` within what ``KVManager.most_blocks`` says that it holds.
        """
        for sequence in sequences:
            self._check_new(sequence)
        for sequence in sequences:
            self._choices.setdefault(sequence.request_id, []).append(sequence)
            effective = sequence.priority + sequence.arrival / self._config.aging_seconds
            sequence.rank = Rank(effective, sequence.arrival, self._next_ticket, sequence.index)
            insort(self._waiting, sequence, key=_by_rank)
        self._next_ticket += 1

    def _check_new(self, sequence: Sequence) -> None:
        output = sequence.params.max_tokens or 1
        reason = self._refusal(
            sequence.num_prompt_tokens,
            output if sequence.room else 0,
            1 + sequence.num_pending_choices,
            sends=sequence.sends_from is not None,
        )
        if reason is None and self._most(0, sequence.max_len) > self._kv.num_blocks:
            reason = f"max_len is {sequence.max_len}; the KV cache holds {self._kv.capacity_tokens}"
        if reason is None and sequence.request_id in self._choices:
            reason = "a request of that id is in the engine"
        if reason is not None:
            raise ValueError(f"sequence {sequence.request_id}[{sequence.index}]: {reason}")

    def fork(self, parent: Sequence, children: list[Sequence]) -> None:
        """Start the other choices of a request whose prompt is computed.

        Call between ``commit`` and the first ``append``, with ``parent.fork(index)`` for each
        index from 1 on.
        """
        assert parent.status is SequenceStatus.RUNNING, "only a running sequence is forked"
        assert len(children) == parent.num_pending_choices, "a request forks once, into all choices"
        parent.num_pending_choices = 0
        self._kv.fork(parent, children, self._reservation(parent))
        self._choices[parent.request_id].extend(children)
        for child in children:
            child.status = SequenceStatus.RUNNING
            rank = parent.rank
            child.rank = Rank(rank.effective, rank.arrival, rank.ticket, child.index)
            insort(self._running, child, key=_by_rank)

    def commit(self, batch: ScheduledBatch) -> None:
        """Count the tokens of a step that ran; sequences that ended meanwhile are passed over."""
        for scheduled in batch.sequences:
            if scheduled.sequence.status is SequenceStatus.RUNNING:
                assert scheduled.start == scheduled.sequence.num_computed_tokens, "steps in order"
                self._kv.commit(scheduled.sequence, scheduled.num_new_tokens)

    def receive(self, sequence: Sequence, num_tokens: int) -> None:
        """Count awaited tokens whose K and V have come and are written."""
        assert sequence.status is SequenceStatus.RUNNING, "only a running sequence has blocks"
        assert sequence.num_computed_tokens + num_tokens <= sequence.num_awaited_tokens
        self._kv.commit(sequence, num_tokens)

    def stop_awaiting(self, sequence: Sequence) -> None:
        """From now on this engine computes what is missing."""
        sequence.num_awaited_tokens = 0

    def finish(self, sequence: Sequence) -> None:
        """Free a sequence; nothing happens to one that has ended already."""
        if sequence.status is SequenceStatus.FINISHED:
            return
        if sequence.status is SequenceStatus.RUNNING:
            self._stop(sequence)
        else:
            self._waiting.remove(sequence)
        sequence.status = SequenceStatus.FINISHED
        choices = self._choices[sequence.request_id]
        choices.remove(sequence)
        if not choices:
            del self._choices[sequence.request_id]

    def abort(self, request_id: str) -> list[Sequence]:
        """Free every live choice of a request and return them: none for an unknown id."""
        choices = list(self._choices.get(request_id, ()))
        for sequence in choices:
            self.finish(sequence)
        return choices

    def _start(self, sequence: Sequence, now: float) -> None:
        sequence.status = SequenceStatus.RUNNING
        if sequence.admitted_at is None:
            sequence.admitted_at = now
        self._num_slots_used += 1 + sequence.num_pending_choices
        insort(self._running, sequence, key=_by_rank)

    def _stop(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._num_slots_used -= 1 + sequence.num_pending_choices
        sequence.num_awaited_tokens = 0
        self._kv.free(sequence)
        self.on_release(sequence)

    def _preempt(self, sequence: Sequence) -> None:
        self._stop(sequence)
        sequence.status = SequenceStatus.WAITING
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        insort(self._waiting, sequence, key=_by_rank)

    # --- views ----------------------------------------------------------------------------------

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Sequences with blocks, in rank order."""
        return tuple(self._running)

    @property
    def waiting(self) -> tuple[Sequence, ...]:
        """The queue, in the order in which it will be admitted."""
        return tuple(self._waiting)

    @property
    def num_running(self) -> int:
        """Length of ``running``."""
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        """Length of ``waiting``."""
        return len(self._waiting)

    def holds(self, request_id: str) -> bool:
        """Whether a sequence of that request runs or waits."""
        return request_id in self._choices

    @property
    def is_empty(self) -> bool:
        """Whether nothing runs and nothing waits."""
        return not self._running and not self._waiting

    @property
    def has_work(self) -> bool:
        """Whether a step would get on: not while all that runs awaits another engine, and the head
        of the queue waits for its room."""
        if any(not s.is_awaiting for s in self._running):
            return True
        return bool(self._waiting) and (self._head_fits() or bool(self._priority_victims()))

    @property
    def num_queued_prefill_tokens(self) -> int:
        """Tokens that this engine is to compute in prefill chunks; any thread may ask."""
        waiting = sum(s.num_uncomputed_tokens for s in tuple(self._waiting))
        running = (s.num_uncomputed_tokens for s in tuple(self._running) if not s.is_awaiting)
        return waiting + sum(count for count in running if count > 1)

    def _head_fits(self) -> bool:
        head = self._waiting[0]
        return not (self._missing_slots(head) or self._kv.shortfall(head, self._reservation(head)))

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where the lists, the slots or the KV books disagree."""
        self._kv.check_integrity()
        for status, items in (
            (SequenceStatus.WAITING, self._waiting),
            (SequenceStatus.RUNNING, self._running),
        ):
            if any(s.status is not status for s in items):
                raise IntegrityError(f"a sequence in the {status.value} list says otherwise")
            if any(a.rank >= b.rank for a, b in pairwise(items)):
                raise IntegrityError(f"the {status.value} list is out of order")
        if any(s.block_table or s.num_computed_tokens for s in self._waiting):
            raise IntegrityError("a waiting sequence holds blocks")
        if any(s.num_awaited_tokens for s in self._waiting):
            raise IntegrityError("a waiting sequence awaits tokens from elsewhere")
        size = self._kv.block_size
        if any(s.num_awaited_tokens > len(s.block_table) * size for s in self._running):
            raise IntegrityError("a sequence awaits more tokens than its blocks hold")
        live = {id(s) for choices in self._choices.values() for s in choices}
        if live != {id(s) for s in (*self._waiting, *self._running)}:
            raise IntegrityError("the sequences by request are not those that wait or run")
        slots = sum(1 + s.num_pending_choices for s in self._running)
        if slots != self._num_slots_used or slots > self._config.max_num_seqs:
            raise IntegrityError(
                f"{self._num_slots_used} of {self._config.max_num_seqs} slots are booked, "
                f"{slots} are in use"
            )


def _num_pending(sequence: Sequence, before: ScheduledSequence | None) -> int:
    """Tokens that a sequence has to compute, behind its part of the step under way."""
    if before is None:
        return sequence.num_uncomputed_tokens
    return sequence.num_tokens + _num_unread(sequence, before) - before.end


def _num_unread(sequence: Sequence, before: ScheduledSequence) -> int:
    """Tokens that the step under way samples for a sequence that goes on with them."""
    return 1 if before.samples and sequence.room > 1 else 0


def _scheduled(
    sequence: Sequence, num_tokens: int, before: ScheduledSequence | None = None
) -> ScheduledSequence:
    """The next ``num_tokens`` of a sequence, behind its part of the step under way."""
    start, unread = sequence.num_computed_tokens, 0
    if before is not None:
        start, unread = before.end, _num_unread(sequence, before)
    is_all = start + num_tokens == sequence.num_tokens + unread
    return ScheduledSequence(sequence, start, num_tokens, is_all and sequence.room > unread)


def _batch(
    scheduled: list[ScheduledSequence], copies: list[BlockCopy], preempted: list[Sequence]
) -> ScheduledBatch:
    """Freeze a step, its decode rows in front."""
    rows = sorted(scheduled, key=lambda row: row.num_new_tokens > 1)
    return ScheduledBatch(tuple(rows), tuple(copies), tuple(preempted))
