"""The open requests of one engine: their choices, what each step gives them, and how they end.

A request's life here:
1. ``add`` makes its first choice and queues it. A resumed one begins with its choices where they
   were; one that is complete already ends at once.
2. ``rows`` says how the sequences of a step are sampled; one that completes its prompt brings the
   request's other choices with it. ``rows_behind`` says it for the step behind one whose tokens are
   not known yet, and ``continues`` whether that was right.
3. ``receive`` gives each choice its token; what is new becomes a chunk in ``take``.
4. Every end passes through ``Choice.finish`` and ``_drain``, which frees the sequence, and shows in
   exactly one last chunk.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, KeysView, Mapping
from dataclasses import replace
from types import MappingProxyType

from .batch import ScheduledSequence
from .choice import Choice, DecodingContext, beginnings
from .import_desk import ImportDesk
from .kv.manager import KVManager
from .runner import StepResult
from .sampling.noise import choice_seed
from .sampling.row import SampledToken, SamplingError, SamplingRow
from .scheduler import Scheduler
from .sequence import Sequence
from .types import (
    FinishReason,
    GenerateRequest,
    RequestError,
    Resumption,
    ThoughtEnd,
    TokenChunk,
    TokenKind,
    Usage,
)

logger = logging.getLogger(__name__)

Groups = Mapping[Sequence, list[Choice]]
"""The choices that a step samples for, by the sequence whose logits they share."""


class RequestDesk:
    """Choices by sequence. ``seed`` is the engine's, ``max_model_len`` the context limit."""

    def __init__(
        self,
        scheduler: Scheduler,
        kv: KVManager,
        imports: ImportDesk,
        context: DecodingContext,
        *,
        max_model_len: int,
        seed: int,
    ) -> None:
        self.totals: Counter[str] = Counter()
        """Tokens and thought ends since start."""
        self.finished: Counter[str] = Counter()
        """Ends of choices by reason."""
        self._scheduler = scheduler
        self._kv = kv
        self._imports = imports
        self._context = context
        self._max_model_len = max_model_len
        self._engine_seed = seed
        self._choices: dict[Sequence, Choice] = {}
        self._fresh: dict[Sequence, Choice] = {}  # with tokens that are in no chunk yet, in order
        self._chunks: list[TokenChunk] = []

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._choices

    @property
    def sequences(self) -> KeysView[Sequence]:
        """Those that wait or run here."""
        return self._choices.keys()

    def add(self, request: GenerateRequest) -> None:
        """Queue a validated request under its id. Raises ``ValueError`` if that is in use.

        Raises ``RequestError`` where a resumed choice's tokens cannot be this engine's output.
        """
        arrival = time.monotonic()
        choices = [self._begin(request, *part, arrival) for part in beginnings(request)]
        self._scheduler.add(*[choice.sequence for choice in choices if not choice.finished])
        self.totals["prompt_tokens"] += len(request.prompt_token_ids)
        for choice in choices:
            if choice.finished:
                self._collect(choice)
            else:
                self._choices[choice.sequence] = choice
                self._drain(choice)

    def _begin(
        self,
        request: GenerateRequest,
        start: Resumption,
        others: tuple[int, ...],
        arrival: float,
    ) -> Choice:
        sequence = Sequence.from_request(
            request,
            arrival=arrival,
            max_len=self._max_model_len,
            start=start,
            num_pending_choices=len(others),
        )
        seed = self._seed(request, start.index)
        choice = Choice(request, sequence, self._context, seed, other_indices=others)
        choice.replay(start.token_ids)
        return choice

    # --- the step -------------------------------------------------------------------------------

    def rows_behind(
        self, scheduled: Iterable[ScheduledSequence]
    ) -> dict[Sequence, SamplingRow] | None:
        """How the tokens behind those of a step under way are sampled, for all that may go on.

        ``None`` where one of them depends on more than ``continues`` can tell afterwards.
        """
        rows: dict[Sequence, SamplingRow] = {}
        for item in scheduled:
            choice = self._choices.get(item.sequence)
            if choice is None or not item.samples or item.sequence.room == 1:
                continue  # ended, or will with this token
            try:
                row = choice.row_behind()
            except Exception as error:
                self.fail(item.sequence, error)
                continue
            if row is None:
                return None
            rows[item.sequence] = row
        return rows

    def continues(self, sequence: Sequence, token: SampledToken, row: SamplingRow) -> bool:
        """Whether a step that took ``token`` for the sequence's last one, and sampled the next by
        ``row``, did so rightly; ends a request that raises here."""
        try:
            return self._choices[sequence].continues(token, row)
        except Exception as error:
            self.fail(sequence, error)
            return False

    def rows(
        self,
        scheduled: Iterable[ScheduledSequence],
        behind: Mapping[Sequence, SamplingRow] = MappingProxyType({}),
    ) -> tuple[Groups, dict[Sequence, list[SamplingRow]]]:
        """The choices that each sequence samples for, and how; ends a request that raises here.

        ``behind`` has the rows of those whose last token is not known yet.
        """
        groups: dict[Sequence, list[Choice]] = {}
        rows: dict[Sequence, list[SamplingRow]] = {}
        for item in scheduled:
            if not item.samples:
                continue
            if item.sequence in behind:
                groups[item.sequence] = [self._choices[item.sequence]]
                rows[item.sequence] = [behind[item.sequence]]
                continue
            try:
                group = self._choices_to_sample(item.sequence)
                rows[item.sequence] = [choice.row() for choice in group]
            except Exception as error:
                self.fail(item.sequence, error)
            else:
                groups[item.sequence] = group
        return groups, rows

    def _choices_to_sample(self, sequence: Sequence) -> list[Choice]:
        """The sequence's own choice, and those that its request starts in this step."""
        choice = self._choices[sequence]
        return [choice] + [
            choice.fork(sequence.fork(index), self._seed(choice.request, index))
            for index in choice.pending_indices
        ]

    def receive(self, result: StepResult, groups: Groups) -> None:
        """Give every choice what a step found for it."""
        for sequence, (start, found) in result.prompt_logprobs.items():
            # A slice, for a preempted prompt is computed again from an earlier place.
            self._choices[sequence].prompt_logprobs[start:] = found
        for sequence, tokens in result.sampled.items():
            self._receive(sequence, groups[sequence], tokens)

    def _receive(
        self,
        sequence: Sequence,
        group: list[Choice],
        tokens: list[SampledToken | SamplingError],
    ) -> None:
        if len(group) > 1:
            self._scheduler.fork(sequence, [choice.sequence for choice in group[1:]])
            self._choices.update({choice.sequence: choice for choice in group[1:]})
        for choice, token in zip(group, tokens, strict=True):
            if isinstance(token, SamplingError):
                self.fail(choice.sequence, token)
                continue
            try:
                choice.take(token)
            except Exception as error:
                self.fail(choice.sequence, error)
            else:
                if choice.finished:
                    self._drain(choice)
                else:
                    self._fresh[choice.sequence] = choice

    # --- ends -----------------------------------------------------------------------------------

    def abort(self, request_id: str) -> None:
        """End a request; an unknown or ended one is left as it is."""
        for choice in [c for c in self._choices.values() if c.request.request_id == request_id]:
            self._end(choice, FinishReason.ABORT)

    def abort_all(self) -> None:
        """End every request."""
        for choice in list(self._choices.values()):
            self._end(choice, FinishReason.ABORT)

    def expire(self, now: float) -> None:
        """End every choice whose deadline has passed."""
        late = [c for s, c in self._choices.items() if s.deadline is not None and now > s.deadline]
        for choice in late:
            error = RequestError(
                f"the deadline of {choice.request.deadline_s} s passed after "
                f"{choice.usage().completion_tokens} tokens",
                code="deadline_exceeded",
            )
            self._end(choice, FinishReason.ERROR, error)

    def fail(self, sequence: Sequence, error: Exception) -> None:
        """End a choice that raised in a step."""
        choice = self._choices[sequence]
        logger.error(
            "request %s[%d] failed in a step",
            choice.request.request_id,
            sequence.index,
            exc_info=error,
        )
        told = RequestError(
            f"the engine failed on this request: {type(error).__name__}", code="internal_error"
        )
        self._kv.forget(sequence)  # whatever went wrong may be in its blocks
        self._end(choice, FinishReason.ERROR, told)

    def fail_all(self, error: RequestError, also: Iterable[GenerateRequest]) -> None:
        """The ends of all requests of a broken engine, and of ``also``, not yet added."""
        for choice in self._choices.values():
            choice.finish(FinishReason.ERROR, error=error)
            self._collect(choice)
        self._choices.clear()
        for request in also:
            self._chunks += refused(request, error)

    def _end(self, choice: Choice, reason: FinishReason, error: RequestError | None = None) -> None:
        choice.finish(reason, error=error)
        self._drain(choice)

    def _drain(self, choice: Choice) -> None:
        """Collect what is new; the one place where an ended choice leaves the engine."""
        if self._collect(choice):
            self._imports.drop((choice.sequence,), "request_ended")
            self._scheduler.finish(choice.sequence)
            del self._choices[choice.sequence]

    def _collect(self, choice: Choice) -> bool:
        """Hand on and count what is new; whether that was the choice's end."""
        self._fresh.pop(choice.sequence, None)
        chunk = choice.drain()
        if chunk is None:
            return False
        self._chunks.append(chunk)
        self.totals["generated_tokens"] += len(chunk.kinds)
        self.totals["thinking_tokens"] += chunk.kinds.count(TokenKind.THOUGHT)
        if chunk.finish_reason is None:
            return False
        self.finished[chunk.finish_reason.value] += 1
        if chunk.thought_end is not None:
            self.totals[f"thought_{chunk.thought_end.value}"] += 1
        # Choices that were never forked end with the one they would have come from.
        self._chunks += [replace(chunk, index=index) for index in choice.pending_indices]
        return True

    # --- views ----------------------------------------------------------------------------------

    @property
    def has_news(self) -> bool:
        """Whether ``take`` would give anything."""
        return bool(self._chunks)

    def take(self) -> list[TokenChunk]:
        """The chunks since it was last called."""
        # Only now: chunks of choices that go on are made while the device computes on.
        for choice in list(self._fresh.values()):
            self._collect(choice)
        chunks, self._chunks = self._chunks, []
        return chunks

    def next_deadline(self) -> float | None:
        """The nearest deadline of an open choice."""
        return min((s.deadline for s in self._choices if s.deadline is not None), default=None)

    def num_thoughts_ended(self, how: ThoughtEnd) -> int:
        """Finished choices whose thought ended so."""
        return self.totals[f"thought_{how.value}"]

    def _seed(self, request: GenerateRequest, index: int) -> int:
        return choice_seed(
            request.params.seed,
            index,
            engine_seed=self._engine_seed,
            request_id=request.request_id,
        )


def refused(request: GenerateRequest, error: RequestError) -> list[TokenChunk]:
    """The only chunks of a request that was never queued: one for each choice that was to run."""
    usage = Usage(len(request.prompt_token_ids), 0, 0, 0)
    told = {part.index: len(part.token_ids) for part in request.resume}
    return [
        TokenChunk(
            request.request_id,
            index,
            first=told.get(index, 0),
            token_ids=(),
            kinds=(),
            usage=usage,
            finish_reason=FinishReason.ERROR,
            error=error,
        )
        for index in request.choice_indices
    ]
