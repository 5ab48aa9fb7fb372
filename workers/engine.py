"""The engine: requests in, numbered token chunks out, one step at a time, on one thread.

1. ``validate`` refuses what can never be served, with the numbers; it touches no state.
2. Three desks hold what is open: ``add`` opens a request (``request_desk``), whose prompt another
   engine may be asked to compute (``import_desk``), as this one computes prompts for others
   (``add_prefill``, ``export_desk``). One scheduler ranks all of it.
3. ``step`` runs one batch, and returns all that came since the last step: tokens, tickets, what is
   wanted of other engines. Where the executor is asynchronous, a step is under way between two
   calls: the next one is launched behind it before its tokens are read, or else as soon as they
   are.
4. Whatever ends, by itself or from outside, leaves its desk in one place and is told once.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from .batch import ScheduledBatch, ScheduledSequence
from .choice import DecodingContext, beginnings
from .config import EngineConfig
from .executor import Executor
from .export_desk import ExportDesk
from .import_desk import ImportDesk, RemotePrefill
from .kv.block import IntegrityError
from .kv.manager import KVManager
from .kv.page_store import PageStore
from .kv.remote_prefill import RateMeter
from .kv.tensor_words import ticket_dtype
from .kv.ticket import Buffer, KVLayout
from .loading import LoadedModel, attention_pattern
from .paging_desk import PagingDesk
from .parallel.grid import build_executor
from .parallel.launcher import RankLauncher
from .request_checks import check_prefill, check_request
from .request_desk import Groups, RequestDesk
from .runner import LaunchedStep, ModelRunner, RowsBySequence, StepResult
from .sampling.row import SamplingError
from .scheduler import Scheduler
from .types import (
    EngineStats,
    GenerateRequest,
    PrefillRequest,
    RequestError,
    StepOutput,
    ThoughtEnd,
)

logger = logging.getLogger(__name__)

_RATE_HALF_LIFE_S = 10.0
"""Of the measured prefill rate: long against a step, short against a change of the load."""


@dataclass(slots=True)
class _UnderWay:
    """A step between its launch and its collection; ``begun`` is when it was planned."""

    launched: LaunchedStep
    groups: Groups
    begun: float


class Engine:
    """One model with its scheduler and KV cache. Not thread-safe, but for ``validate`` and views.

    ``launcher`` starts the other ranks where the configuration asks for several; by default they
    are subprocesses. ``built`` is the model and its executor where they are there already. Raises
    ``CheckpointError`` or ``ValueError`` at construction for what cannot be loaded.
    """

    def __init__(
        self,
        config: EngineConfig,
        launcher: RankLauncher | None = None,
        *,
        built: tuple[LoadedModel, Executor] | None = None,
    ) -> None:
        self.config = config
        self.loaded: LoadedModel
        self.executor: Executor
        self.loaded, self.executor = built or build_executor(config, launcher)
        if not config.attention.is_exact:
            logger.warning(
                "attention is %s: answers are approximations of the model",
                config.attention.label,
            )
        self.max_model_len = self.loaded.max_model_len
        self._runner = ModelRunner(self.executor, num_tokens=self.loaded.tokenizer.num_tokens)
        self._kv = KVManager(
            self.loaded.num_blocks,
            config.block_size,
            self.loaded.fingerprint,
            prefix_caching=config.prefix_caching,
            keep_evictions=config.kv_paging.is_on,
            only_prompts=config.attention.tells_prompts_apart,
            pattern=attention_pattern(config.attention),
        )
        self._scheduler = Scheduler(config, self._kv)
        self.kv_layout = _kv_layout(self.loaded, config)
        self._prefill_rate = RateMeter(half_life_s=_RATE_HALF_LIFE_S)
        self._paging = self._build_paging() if config.kv_paging.is_on else None
        self._exports = ExportDesk(
            self.executor,
            self._scheduler,
            self._kv,
            self.kv_layout,
            max_ticket_tokens=config.max_batched_tokens,
            max_waiting=config.max_waiting,
        )
        self._imports = ImportDesk(
            self.executor,
            self._scheduler,
            self.kv_layout,
            only_prompts=config.attention.tells_prompts_apart,
        )
        self._scheduler.await_remote = self._imports.begin
        self._requests = RequestDesk(
            self._scheduler,
            self._kv,
            self._imports,
            DecodingContext(
                tokenizer=self.loaded.tokenizer,
                phase_tokens=self.loaded.text.phase_tokens,
                defaults=self.loaded.sampling_defaults,
                loop_guard=config.loop_guard,
                eos=self.loaded.text.eos,
            ),
            max_model_len=self.max_model_len,
            seed=config.seed,
        )
        self._num_steps = 0
        self._under_way: _UnderWay | None = None
        self._collected_at = 0.0

    def _build_paging(self) -> PagingDesk:
        """Tiers behind the KV pool, told of by the scheduler. Ends the executor where it raises."""
        try:
            pinned = self.loaded.model.device.type == "cuda"
            store = PageStore(self.config.kv_paging, self.kv_layout, pinned=pinned)
        except BaseException:
            self.executor.close()
            raise
        paging = PagingDesk(
            self.executor,
            self._scheduler,
            self._kv,
            store,
            tokens_per_step=self.config.max_batched_tokens,
            prefill_rate=lambda: self._prefill_rate.rate(time.monotonic()),
        )
        self._scheduler.await_restored = paging.begin
        self._scheduler.on_release = paging.release
        return paging

    # --- requests -------------------------------------------------------------------------------

    def validate(self, request: GenerateRequest) -> None:
        """Raise ``RequestError`` for a request that this engine can never serve."""
        check_request(
            request,
            num_tokens=self.loaded.tokenizer.num_tokens,
            max_model_len=self.max_model_len,
        )
        together = max(1 + len(others) for _, others in beginnings(request))
        num_prompt = len(request.prompt_token_ids)
        reason = self._scheduler.refusal(num_prompt, request.params, together)
        if reason is not None:
            raise RequestError(reason, param="max_tokens", code="context_length_exceeded")

    def add(self, request: GenerateRequest) -> None:
        """Queue a validated request under its id. Raises ``ValueError`` if that is in use.

        Raises ``RequestError`` where a resumed choice's tokens cannot be this engine's output.
        """
        self._requests.add(request)

    def abort(self, request_id: str) -> None:
        """End a request; an unknown or ended one is left as it is. Told in the next step."""
        self._requests.abort(request_id)

    def abort_all(self) -> StepOutput:
        """End every request and every prefill; returns what that gave."""
        self._requests.abort_all()
        self._exports.abort_all()
        return self._take_output()

    def fail_all(
        self,
        reason: str,
        also: Sequence[GenerateRequest] = (),
        also_prefills: Sequence[PrefillRequest] = (),
    ) -> StepOutput:
        """The ends of all that is open, and of what was not yet added: ``engine_dead``.

        For an engine that is broken: its blocks and queues are not touched again.
        """
        self._under_way = None
        error = RequestError(f"the engine ended: {reason}", code="engine_dead")
        self._requests.fail_all(error, also)
        self._exports.fail_all(error, also_prefills)
        self._imports.drop_all("engine_dead")
        if self._paging is not None:
            self._paging.drop_all("engine_dead")
        return self._take_output()

    # --- KV of and for other engines ------------------------------------------------------------

    @property
    def remote_prefill(self) -> RemotePrefill | None:
        """Whether another engine is to compute a prompt; ``None``: never.

        Asked in this engine's thread when a request is first admitted.
        """
        return self._imports.remote_prefill

    @remote_prefill.setter
    def remote_prefill(self, decide: RemotePrefill | None) -> None:
        self._imports.remote_prefill = decide

    @property
    def import_deadline_s(self) -> float:
        """Seconds for all of a prompt's tickets to come; what is missing then is computed here."""
        return self._imports.deadline_s

    @import_deadline_s.setter
    def import_deadline_s(self, seconds: float) -> None:
        self._imports.deadline_s = seconds

    def import_ticket(self, request_id: str, attempt: int, buffer: Buffer) -> None:
        """Take a ticket of what was wanted, as it comes; a bad one raises nothing."""
        self._imports.offer(request_id, attempt, buffer, time.monotonic())

    def end_import(self, request_id: str, attempt: int, reason: str | None) -> None:
        """No more tickets come: that was all (``None``), or the far side failed.

        ``reason`` is then a stable word to count it under. What is missing is computed here.
        """
        self._imports.end(request_id, attempt, reason)

    def add_prefill(self, request: PrefillRequest) -> None:
        """Queue a prefill for another engine; whatever is wrong with it shows as its end.

        Raises ``ValueError`` if its id and attempt are in use.
        """
        if self.is_prefilling(request.request_id, request.attempt):
            raise ValueError(
                f"attempt {request.attempt} of prefill {request.request_id} is in the engine"
            )
        try:
            check_prefill(
                request,
                num_tokens=self.loaded.tokenizer.num_tokens,
                max_model_len=self.max_model_len,
                block_size=self.config.block_size,
            )
        except RequestError as error:
            self._exports.refuse(request, error)
        else:
            self._exports.add(request)

    def abort_prefill(self, request_id: str, attempt: int) -> None:
        """End a prefill; an unknown or ended one is left as it is. Told in the next step."""
        self._exports.abort(request_id, attempt)

    # --- the step -------------------------------------------------------------------------------

    def step(self) -> StepOutput:
        """Run one batch and return all that came since the last step; empty without work.

        With an asynchronous executor the batch is still under way then, and the tokens are those
        of the one before. Raises ``GroupLostError`` once a rank is gone, ``WeightReadError`` once
        streamed weights cannot be read; the engine computes no more.
        """
        self.executor.check()
        now = time.monotonic()
        self._requests.expire(now)
        self._exports.expire(now)
        self._imports.expire(now)
        before, step = self._under_way, None
        if before is not None:
            step = self._launch_behind(before, now)
            before.launched.keep(self._holds)  # others have ended since it was launched
            self._collect(before, step)
            self._exports.send()
        if step is None:
            step = self._launch_next()
        is_idle = before is None and step is None
        if step is not None and not self.executor.is_asynchronous:
            self._collect(step)
            step = None
        self._under_way = step
        if self._paging is not None:
            self._paging.advance(idle=is_idle)
        if before is None and step is None:
            self._exports.send()
        return self._take_output()

    def _launch_next(self) -> _UnderWay | None:
        """Launch a step that knows all tokens; ``None`` where there is nothing to run."""
        now = time.monotonic()
        batch = self._scheduler.schedule(now)
        self._imports.drop(batch.preempted, "preempted")
        return self._launch(batch, *self._requests.rows(batch.sequences), now)

    def _launch_behind(self, before: _UnderWay, now: float) -> _UnderWay | None:
        """Launch the step behind one that is under way; ``None`` where its tokens matter to it."""
        under_way = before.launched.batch
        if not before.launched.can_be_followed:
            return None
        if any(item.sequence in self._exports for item in under_way.sequences):
            return None  # reading its blocks would wait for what is launched now
        rows_behind = self._requests.rows_behind(under_way.sequences)
        if rows_behind is None:
            return None
        batch = self._scheduler.schedule_behind(under_way, now)
        if batch is None:
            return None
        groups, rows = self._requests.rows(batch.sequences, rows_behind)
        return self._launch(batch, groups, rows, now, before.launched)

    def _launch(
        self,
        batch: ScheduledBatch,
        groups: Groups,
        rows: RowsBySequence,
        now: float,
        before: LaunchedStep | None = None,
    ) -> _UnderWay | None:
        if self._paging is not None:
            self._paging.spill()
        sound = tuple(item for item in batch.sequences if self._holds(item))
        if not sound:
            return None
        self._num_steps += 1
        launched = self._runner.launch(replace(batch, sequences=sound), rows, before)
        return _UnderWay(launched, groups, now)

    def _collect(self, step: _UnderWay, behind: _UnderWay | None = None) -> None:
        """Take in what a step gave; ``behind`` keeps what it has computed on the same."""
        launched = step.launched
        result = self._runner.collect(launched)
        ended = time.monotonic()
        self._measure(launched.batch.sequences, ended - max(step.begun, self._collected_at))
        self._collected_at = ended
        for sequence, error in result.errors.items():
            desk = self._exports if sequence in self._exports else self._requests
            desk.fail(sequence, error)
        self._scheduler.commit(launched.batch)
        self._requests.receive(result, step.groups)
        if behind is not None:
            rows = behind.launched.rows
            behind.launched.keep(lambda item: self._is_right(item, result, rows))

    def _is_right(self, item: ScheduledSequence, before: StepResult, rows: RowsBySequence) -> bool:
        """Whether what was launched behind a step holds, now that it is known what that gave."""
        sequence = item.sequence
        if sequence in before.late or not self._holds(item):
            return False
        if sequence not in before.sampled:
            return True
        (token,) = before.sampled[sequence]
        if isinstance(token, SamplingError):
            return False
        return self._requests.continues(sequence, token, rows[sequence][0])

    def _holds(self, item: ScheduledSequence) -> bool:
        return item.sequence in self._requests or item.sequence in self._exports

    def _measure(self, ran: tuple[ScheduledSequence, ...], seconds: float) -> None:
        """Note the rate of a step that was mostly prefill."""
        total = sum(item.num_new_tokens for item in ran)
        prefill = sum(item.num_new_tokens for item in ran if item.num_new_tokens > 1)
        if 2 * prefill > total and seconds > 0:
            self._prefill_rate.add(prefill, seconds, time.monotonic())

    def _take_output(self) -> StepOutput:
        return StepOutput(self._requests.take(), *self._exports.take(), *self._imports.take())

    def close(self) -> None:
        """End the ranks and the thread that the engine started; it computes no more."""
        if self._paging is not None:
            self._paging.close()
        self.executor.close()

    # --- views ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything; not while all there is waits for another engine."""
        if self._under_way is not None or self._scheduler.has_work:
            return True
        if self._paging is not None and self._paging.has_work:
            return True
        return any(desk.has_news for desk in (self._requests, self._exports, self._imports))

    def next_deadline(self) -> float | None:
        """The nearest deadline (``time.monotonic``) of anything open: a step is due then."""
        desks = (self._requests, self._exports, self._imports)
        found = [deadline for desk in desks if (deadline := desk.next_deadline()) is not None]
        return min(found, default=None)

    def is_open(self, request_id: str) -> bool:
        """Whether a request of that id is queued or running."""
        return self._scheduler.holds(request_id)

    def is_prefilling(self, request_id: str, attempt: int) -> bool:
        """Whether that prefill for another engine is queued or running."""
        return self._exports.is_open(request_id, attempt)

    @property
    def num_waiting(self) -> int:
        """Requests and prefills in the queue."""
        return self._scheduler.num_waiting

    def stats(self) -> EngineStats:
        """Sizes now and totals since start."""
        totals = self._requests.totals
        streamed = self.executor.stream_stats()
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_blocks_total=self._kv.num_blocks,
            kv_blocks_used=self._kv.num_used_blocks,
            kv_blocks_cached=self._kv.num_cached_blocks,
            prefix_query_tokens=self._kv.prefix_query_tokens,
            prefix_hit_tokens=self._kv.prefix_hit_tokens,
            prompt_tokens=totals["prompt_tokens"],
            generated_tokens=totals["generated_tokens"],
            thinking_tokens=totals["thinking_tokens"],
            budget_ends=self._requests.num_thoughts_ended(ThoughtEnd.BUDGET),
            loops_cut=self._requests.num_thoughts_ended(ThoughtEnd.LOOP),
            preemptions=self._scheduler.num_preemptions,
            steps=self._num_steps,
            requests_finished=dict(self._requests.finished),
            queued_prefill_tokens=self._scheduler.num_queued_prefill_tokens,
            prefill_tokens_per_s=self._prefill_rate.rate(time.monotonic()) or 0.0,
            kv_imports_running=len(self._imports),
            kv_exports_running=len(self._exports),
            kv_imported_tokens=self._imports.num_tokens_received,
            kv_exported_tokens=self._exports.num_tokens_sent,
            kv_import_ends=dict(self._imports.ends),
            kv_tickets_ignored=dict(self._imports.ignored),
            kv_paging=None if self._paging is None else self._paging.stats(),
            weight_bytes_streamed=streamed.num_bytes,
            weight_wait_s=streamed.wait_s,
        )

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where the engine's books disagree with the scheduler's."""
        self._scheduler.check_integrity()
        live = {*self._scheduler.running, *self._scheduler.waiting}
        choices, prefills = self._requests.sequences, self._exports.sequences
        if live != choices | prefills:
            raise IntegrityError(
                f"{len(choices)} choices and {len(prefills)} prefills are open, "
                f"{len(live)} sequences are scheduled"
            )
        self._exports.check_integrity()
        self._imports.check_integrity()
        restored = set() if self._paging is None else set(self._paging.sequences)
        awaiting = {s for s in self._scheduler.running if s.is_awaiting}
        if awaiting != restored | set(self._imports.sequences):
            raise IntegrityError(
                f"{len(awaiting)} sequences await KV; {len(self._imports)} imports and "
                f"{len(restored)} restores are open"
            )
        if self._paging is not None:
            self._paging.check_integrity()


def _kv_layout(loaded: LoadedModel, config: EngineConfig) -> KVLayout:
    shapes, kept_as = loaded.model.config, config.kv_cache_dtype
    return KVLayout(
        fingerprint=loaded.fingerprint,
        dtype=ticket_dtype(loaded.model.dtype) if kept_as == "auto" else kept_as,
        num_layers=shapes.num_layers,
        num_kv_heads=shapes.num_kv_heads,
        head_dim=shapes.head_dim,
        block_size=config.block_size,
    )
