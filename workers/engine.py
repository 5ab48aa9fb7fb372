"""The engine: requests in, numbered token chunks out, one step at a time, on one thread.

A request's life here:
1. ``validate`` refuses what can never be served, with the numbers; it touches no state.
2. ``add`` queues its first choice; the scheduler admits it when its worst case fits.
3. ``step`` runs one batch. The step that completes a prompt forks the request's other choices and
   samples each from the same logits.
4. Each sampled token passes through ``Choice``: phase, forced text, stops, length.
5. Every end (stop, length, abort, deadline, error) passes through ``Choice.finish`` and one
   ``Scheduler.finish``, and shows in exactly one last chunk.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from .batch import ScheduledBatch
from .choice import Choice, DecodingContext
from .config import EngineConfig
from .executor import LocalExecutor
from .kv.block import IntegrityError
from .kv.manager import KVManager
from .loading import LoadedModel, load_model
from .runner import ModelRunner
from .sampling.checks import check_token_ids
from .sampling.noise import choice_seed
from .sampling.row import SampledToken, SamplingError, SamplingRow
from .scheduler import Scheduler
from .sequence import Sequence as EngineSequence
from .types import (
    EngineStats,
    FinishReason,
    GenerateRequest,
    RequestError,
    ThoughtEnd,
    TokenChunk,
    TokenKind,
    Usage,
)

logger = logging.getLogger(__name__)


class Engine:
    """One model with its scheduler and KV cache. Not thread-safe, but for ``validate`` and views.

    Raises ``CheckpointError`` or ``ValueError`` at construction for what cannot be loaded.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.loaded: LoadedModel = load_model(config)
        self.config = config
        self.max_model_len = self.loaded.max_model_len
        self._executor = LocalExecutor(
            self.loaded.model, num_blocks=self.loaded.num_blocks, block_size=config.block_size
        )
        self._runner = ModelRunner(self._executor, num_tokens=self.loaded.tokenizer.num_tokens)
        self._kv = KVManager(
            self.loaded.num_blocks,
            config.block_size,
            self.loaded.fingerprint,
            prefix_caching=config.prefix_caching,
        )
        self._scheduler = Scheduler(config, self._kv)
        self._context = DecodingContext(
            tokenizer=self.loaded.tokenizer,
            phase_tokens=self.loaded.text.phase_tokens,
            defaults=self.loaded.sampling_defaults,
            loop_guard=config.loop_guard,
            eos=self.loaded.text.eos,
        )
        self._choices: dict[EngineSequence, Choice] = {}
        self._pending: list[TokenChunk] = []  # ends that happened between steps
        self._totals: Counter[str] = Counter()
        self._finished: Counter[str] = Counter()

    # --- requests -------------------------------------------------------------------------------

    def validate(self, request: GenerateRequest) -> None:
        """Raise ``RequestError`` for a request that this engine can never serve."""
        params, num_prompt = request.params, len(request.prompt_token_ids)
        num_tokens = self.loaded.tokenizer.num_tokens
        if num_prompt == 0:
            raise RequestError("the prompt is empty; at least one token is needed", param="prompt")
        for token_id in request.prompt_token_ids:
            if not 0 <= token_id < num_tokens:
                raise RequestError(
                    f"the prompt holds id {token_id}; the model's tokens are 0 to {num_tokens - 1}",
                    param="prompt",
                )
        check_token_ids(params, num_tokens)
        wanted = num_prompt + (params.max_tokens or 1)
        if wanted > self.max_model_len:
            raise RequestError(
                f"the context limit is {self.max_model_len} tokens; the prompt has {num_prompt} "
                f"and {params.max_tokens or 'at least 1'} are to be generated: {wanted} in all",
                param="max_tokens" if num_prompt < self.max_model_len else "prompt",
                code="context_length_exceeded",
            )
        reason = self._scheduler.refusal(num_prompt, params)
        if reason is not None:
            raise RequestError(reason, param="max_tokens", code="context_length_exceeded")

    def add(self, request: GenerateRequest) -> None:
        """Queue a validated request under its id. Raises ``ValueError`` if that is in use."""
        sequence = EngineSequence.from_request(
            request, arrival=time.monotonic(), max_len=self.max_model_len
        )
        choice = Choice(request, sequence, self._context, self._seed(request, 0))
        self._scheduler.add(sequence)
        self._choices[sequence] = choice
        self._totals["prompt_tokens"] += sequence.num_prompt_tokens
        if request.params.prompt_logprobs is not None:
            choice.prompt_logprobs.append(None)

    def abort(self, request_id: str) -> None:
        """End a request; an unknown or ended one is left as it is. Told in the next step."""
        for choice in [c for c in self._choices.values() if c.request.request_id == request_id]:
            self._end(choice, FinishReason.ABORT)

    def abort_all(self) -> list[TokenChunk]:
        """End every request; returns their last chunks."""
        for choice in list(self._choices.values()):
            self._end(choice, FinishReason.ABORT)
        return self._take_pending()

    def fail_all(self, reason: str, also: Sequence[GenerateRequest] = ()) -> list[TokenChunk]:
        """Every open request's last chunks, and those of ``also``, not yet added: ``engine_dead``.

        For an engine that is broken: its blocks and queues are not touched again.
        """
        error = RequestError(f"the engine ended: {reason}", code="engine_dead")
        for choice in self._choices.values():
            choice.finish(FinishReason.ERROR, error=error)
            self._collect(choice)
        self._choices.clear()
        for request in also:
            self._pending += refused(request, error)
        return self._take_pending()

    # --- the step -------------------------------------------------------------------------------

    def step(self) -> list[TokenChunk]:
        """Run one batch and return every chunk since the last step; empty when there is no work."""
        now = time.monotonic()
        self._expire(now)
        batch = self._scheduler.schedule(now)
        groups, rows = self._rows(batch)
        sound = tuple(item for item in batch.sequences if item.sequence in self._choices)
        if sound:
            self._totals["steps"] += 1
            result = self._runner.run(replace(batch, sequences=sound), rows)
            for sequence, error in result.errors.items():
                self._fail(self._choices[sequence], error)
            self._scheduler.commit(batch)
            for sequence, (start, found) in result.prompt_logprobs.items():
                # A slice, for a preempted prompt is computed again from an earlier place.
                self._choices[sequence].prompt_logprobs[start:] = found
            for sequence, tokens in result.sampled.items():
                self._receive(sequence, groups[sequence], tokens)
        return self._take_pending()

    def _rows(
        self, batch: ScheduledBatch
    ) -> tuple[dict[EngineSequence, list[Choice]], dict[EngineSequence, list[SamplingRow]]]:
        """The choices that each sequence samples for, and how; ends a request that raises here."""
        groups: dict[EngineSequence, list[Choice]] = {}
        rows: dict[EngineSequence, list[SamplingRow]] = {}
        for item in batch.sequences:
            if not item.samples:
                continue
            try:
                group = self._choices_to_sample(item.sequence)
                rows[item.sequence] = [choice.row() for choice in group]
            except Exception as error:
                self._fail(self._choices[item.sequence], error)
            else:
                groups[item.sequence] = group
        return groups, rows

    def _choices_to_sample(self, sequence: EngineSequence) -> list[Choice]:
        """The sequence's own choice, and those that its request starts in this step."""
        choice = self._choices[sequence]
        return [choice] + [
            choice.fork(sequence.fork(index), self._seed(choice.request, index))
            for index in range(1, 1 + sequence.num_pending_choices)
        ]

    def _receive(
        self,
        sequence: EngineSequence,
        group: list[Choice],
        tokens: list[SampledToken | SamplingError],
    ) -> None:
        if len(group) > 1:
            self._scheduler.fork(sequence, [choice.sequence for choice in group[1:]])
            self._choices.update({choice.sequence: choice for choice in group[1:]})
        for choice, token in zip(group, tokens, strict=True):
            if isinstance(token, SamplingError):
                self._fail(choice, token)
                continue
            try:
                choice.take(token)
            except Exception as error:
                self._fail(choice, error)
            else:
                self._drain(choice)

    # --- ends -----------------------------------------------------------------------------------

    def _expire(self, now: float) -> None:
        late = [c for s, c in self._choices.items() if s.deadline is not None and now > s.deadline]
        for choice in late:
            error = RequestError(
                f"the deadline of {choice.request.deadline_s} s passed after "
                f"{choice.usage().completion_tokens} tokens",
                code="deadline_exceeded",
            )
            self._end(choice, FinishReason.ERROR, error)

    def _fail(self, choice: Choice, error: Exception) -> None:
        logger.error(
            "request %s[%d] failed in a step",
            choice.request.request_id,
            choice.sequence.index,
            exc_info=error,
        )
        told = RequestError(
            f"the engine failed on this request: {type(error).__name__}", code="internal_error"
        )
        self._kv.forget(choice.sequence)  # whatever went wrong may be in its blocks
        self._end(choice, FinishReason.ERROR, told)

    def _end(self, choice: Choice, reason: FinishReason, error: RequestError | None = None) -> None:
        choice.finish(reason, error=error)
        self._drain(choice)

    def _drain(self, choice: Choice) -> None:
        """Collect what is new; the one place where an ended choice leaves the engine."""
        if self._collect(choice):
            self._scheduler.finish(choice.sequence)
            del self._choices[choice.sequence]

    def _collect(self, choice: Choice) -> bool:
        """Hand on and count what is new; whether that was the choice's end."""
        chunk = choice.drain()
        if chunk is None:
            return False
        self._pending.append(chunk)
        self._totals["generated_tokens"] += len(chunk.kinds)
        self._totals["thinking_tokens"] += chunk.kinds.count(TokenKind.THOUGHT)
        if chunk.finish_reason is None:
            return False
        self._finished[chunk.finish_reason.value] += 1
        if chunk.thought_end is not None:
            self._totals[f"thought_{chunk.thought_end.value}"] += 1
        # Choices that were never forked end with the one they would have come from.
        for index in range(1, 1 + choice.sequence.num_pending_choices):
            self._pending.append(replace(chunk, index=index))
        return True

    def _take_pending(self) -> list[TokenChunk]:
        pending, self._pending = self._pending, []
        return pending

    # --- views ----------------------------------------------------------------------------------

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._pending) or self._scheduler.has_work

    def is_open(self, request_id: str) -> bool:
        """Whether a request of that id is queued or running."""
        return self._scheduler.holds(request_id)

    @property
    def num_waiting(self) -> int:
        """Requests in the queue."""
        return self._scheduler.num_waiting

    def stats(self) -> EngineStats:
        """Sizes now and totals since start."""
        return EngineStats(
            running=self._scheduler.num_running,
            waiting=self._scheduler.num_waiting,
            kv_blocks_total=self._kv.num_blocks,
            kv_blocks_used=self._kv.num_used_blocks,
            kv_blocks_cached=self._kv.num_cached_blocks,
            prefix_query_tokens=self._kv.prefix_query_tokens,
            prefix_hit_tokens=self._kv.prefix_hit_tokens,
            prompt_tokens=self._totals["prompt_tokens"],
            generated_tokens=self._totals["generated_tokens"],
            thinking_tokens=self._totals["thinking_tokens"],
            budget_ends=self._totals[f"thought_{ThoughtEnd.BUDGET.value}"],
            loops_cut=self._totals[f"thought_{ThoughtEnd.LOOP.value}"],
            preemptions=self._scheduler.num_preemptions,
            steps=self._totals["steps"],
            requests_finished=dict(self._finished),
        )

    def check_integrity(self) -> None:
        """Raise ``IntegrityError`` where the engine's books disagree with the scheduler's."""
        self._scheduler.check_integrity()
        live = {*self._scheduler.running, *self._scheduler.waiting}
        if live != set(self._choices):
            raise IntegrityError(
                f"{len(self._choices)} choices are open, {len(live)} sequences are scheduled"
            )

    def _seed(self, request: GenerateRequest, index: int) -> int:
        return choice_seed(
            request.params.seed,
            index,
            engine_seed=self.config.seed,
            request_id=request.request_id,
        )


def refused(request: GenerateRequest, error: RequestError) -> list[TokenChunk]:
    """The only chunks of a request that was never queued: one for each choice."""
    usage = Usage(len(request.prompt_token_ids), 0, 0, 0)
    return [
        TokenChunk(
            request.request_id,
            index,
            first=0,
            token_ids=(),
            kinds=(),
            usage=usage,
            finish_reason=FinishReason.ERROR,
            error=error,
        )
        for index in range(request.params.n)
    ]
