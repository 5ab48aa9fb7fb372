"""An engine of the simulator: the real scheduler, KV books and handoff desks over ``values``.

Its step is ``Engine.step`` without tensors, sampling and text.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count
from typing import Any, cast

from inference_pio.workers.choice import beginnings
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.export_desk import ExportDesk
from inference_pio.workers.import_desk import ImportDesk
from inference_pio.workers.kv.block import IntegrityError
from inference_pio.workers.kv.manager import KVManager
from inference_pio.workers.scheduler import Scheduler
from inference_pio.workers.sequence import Sequence
from inference_pio.workers.types import GenerateRequest, RemoteQuery, StepOutput

from .values import BLOCK, LAYOUT, STOP, ValueExecutor, choose, true_numbers

MAX_LEN = 14
"""Prompt and output of a sequence, at most."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """Tokens of one choice on their way to the client."""

    request_id: str
    stay: int
    """Which handing over of the request to an engine it answers."""
    index: int
    first: int
    token_ids: tuple[int, ...]
    ended: bool
    error: str | None = None


class SimulatedEngine:
    """One life of one engine."""

    def __init__(
        self,
        config: EngineConfig,
        num_blocks: int,
        *,
        epoch: int = 0,
        first_attempt: int = 1,
        import_deadline: float = 0.0,
        remote: Callable[[RemoteQuery], bool] | None = None,
        prefix_caching: bool = True,
    ) -> None:
        self.executor = ValueExecutor(num_blocks)
        self.kv = KVManager(num_blocks, BLOCK, LAYOUT.fingerprint, prefix_caching=prefix_caching)
        self.scheduler = Scheduler(config, self.kv)
        executor = cast(Any, self.executor)
        self.exports = ExportDesk(
            executor,
            self.scheduler,
            self.kv,
            LAYOUT,
            max_ticket_tokens=config.max_batched_tokens,
            max_waiting=config.max_waiting,
        )
        self.imports = ImportDesk(executor, self.scheduler, LAYOUT)
        self.imports._epoch = epoch  # both are random in an engine, and here part of the schedule
        self.imports._attempts = count(first_attempt)
        self.imports.deadline_s = import_deadline
        self.imports.remote_prefill = remote
        self.scheduler.await_remote = self.imports.begin
        self.sequences: dict[Sequence, None] = {}
        """Live ones; a set would be walked in an order of its own each time."""
        self._stays: dict[Sequence, int] = {}
        self._others: dict[Sequence, tuple[int, ...]] = {}  # choices to be forked from it
        self.truths: dict[bytes, tuple[int, ...]] = {}
        """The right numbers of every block that was ever named here."""
        self._chunks: list[Chunk] = []

    @property
    def epoch(self) -> int:
        return self.imports._epoch

    @property
    def has_work(self) -> bool:
        """See ``Engine.has_work``."""
        told = self._chunks or self.exports.has_news or self.imports.has_news
        return bool(told) or self.scheduler.has_work

    def add(self, request: GenerateRequest, stay: int, now: float) -> None:
        """See ``Engine.add``."""
        fresh = []
        for start, others in beginnings(request):
            sequence = Sequence.from_request(
                request,
                arrival=now,
                max_len=MAX_LEN,
                start=start,
                num_pending_choices=len(others),
            )
            self._stays[sequence] = stay
            for token_id in start.token_ids:
                sequence.append(token_id)
            if self._is_complete(sequence):
                self._tell(sequence, ())
                del self._stays[sequence]
            else:
                fresh.append(sequence)
                self._others[sequence] = others
        if fresh:
            self.scheduler.add(*fresh)
            self.sequences.update(dict.fromkeys(fresh))

    def abort(self, request_id: str) -> None:
        """See ``Engine.abort``."""
        for sequence in [s for s in self.sequences if s.request_id == request_id]:
            self._end(sequence, "aborted")

    def step(self, now: float) -> tuple[StepOutput, list[Chunk]]:
        """One batch, and everything that came out since the last."""
        for sequence in [s for s in self.sequences if s.deadline is not None and now > s.deadline]:
            self._end(sequence, "deadline")
        self.exports.expire(now)
        self.imports.expire(now)
        batch = self.scheduler.schedule(now)
        self.imports.drop(batch.preempted, "preempted")
        self.executor.copy_blocks(batch.block_copies)
        sampled = []
        for item in batch.sequences:
            tokens = item.sequence.token_ids[: item.start + item.num_new_tokens]
            table, salt = item.sequence.block_table, item.sequence.cache_salt
            number = self.executor.compute(table, salt, tokens, item.start)
            if item.samples:
                sampled.append((item.sequence, number))
        self.scheduler.commit(batch)
        for sequence, number in sampled:
            self._sample(sequence, number)
        self.exports.send()
        chunks, self._chunks = self._chunks, []
        tickets, ends = self.exports.take()
        wanted, unwanted = self.imports.take()
        return StepOutput([], tickets, ends, wanted, unwanted), chunks

    def _sample(self, sequence: Sequence, number: int) -> None:
        group = [sequence]
        if sequence.num_pending_choices:
            group += [sequence.fork(index) for index in self._others[sequence]]
            self._others[sequence] = ()
            self._stays.update(dict.fromkeys(group, self._stays[sequence]))
            self.scheduler.fork(sequence, group[1:])
            self.sequences.update(dict.fromkeys(group[1:]))
        for member in group:
            member.append(choose(number, member.index))
            self._tell(member, (member.token_ids[-1],))
            if self._is_complete(member):
                self._drop(member)

    def _is_complete(self, sequence: Sequence) -> bool:
        output = sequence.num_output_tokens
        return sequence.room == 0 or (output > 0 and sequence.token_ids[-1] == STOP)

    def _end(self, sequence: Sequence, error: str) -> None:
        self._tell(sequence, (), error)
        self._drop(sequence)

    def _drop(self, sequence: Sequence) -> None:
        self.imports.drop((sequence,), "request_ended")
        self.scheduler.finish(sequence)
        del self.sequences[sequence]
        self._others.pop(sequence, None)
        del self._stays[sequence]

    def _tell(
        self, sequence: Sequence, token_ids: tuple[int, ...], error: str | None = None
    ) -> None:
        ended = error is not None or self._is_complete(sequence)
        first = sequence.num_output_tokens - len(token_ids)
        indices = [sequence.index]
        if error is not None:  # choices that were never forked end with this one
            indices += self._others.get(sequence, ())
        for index in indices:
            name, stay = sequence.request_id, self._stays[sequence]
            self._chunks.append(Chunk(name, stay, index, first, token_ids, ended, error))

    def next_deadline(self) -> float | None:
        """See ``Engine.next_deadline``."""
        own = [s.deadline for s in self.sequences if s.deadline is not None]
        desks = (self.exports.next_deadline(), self.imports.next_deadline())
        return min((*own, *(d for d in desks if d is not None)), default=None)

    def check(self) -> None:
        """Raise where books disagree, or a counted or cached number is not the right one."""
        self.scheduler.check_integrity()
        self.exports.check_integrity()
        self.imports.check_integrity()
        live = {*self.scheduler.running, *self.scheduler.waiting}
        if live != self.sequences.keys() | self.exports.sequences:
            raise IntegrityError("the engine's sequences are not those of its scheduler")
        for sequence in self.scheduler.running:
            end = sequence.num_computed_tokens
            right = true_numbers(sequence.cache_salt, sequence.token_ids[:end])
            if tuple(self.executor.numbers(sequence.block_table, end)) != right:
                raise IntegrityError(f"{sequence.request_id} has wrong KV before token {end}")
            for number, name in enumerate(sequence.block_hashes[: end // BLOCK]):
                self.truths[name] = right[number * BLOCK : (number + 1) * BLOCK]
        for name, block_id in self.kv._pool._index.items():
            if name in self.truths and tuple(self.executor.slots[block_id]) != self.truths[name]:
                raise IntegrityError(f"the prefix cache holds wrong KV in block {block_id}")
