"""One choice of one request: its sequence, and what turns sampled tokens into output.

1. ``row`` says how the next token is sampled, in the phase the machine is in.
2. ``take`` receives the sampled token, and behind it whatever the phase machine forces. Each passes
   through the same steps: kind, counts, stop ids, stop strings, length.
3. ``drain`` gives what is new since the last call as one numbered chunk.
4. ``finish`` is the one way to end; the first reason given stays.
A choice that another engine began ``replay``s its output first: the same steps, told to nobody.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass

from .config import LoopGuardConfig
from .phases import PhaseMachine, PhaseTokens
from .sampling.resolve import SamplingDefaults
from .sampling.row import SampledToken, SamplingRow
from .sampling.state import SamplingState
from .sequence import Sequence
from .text.pieces import PieceStream
from .text.tokenizer import Tokenizer
from .types import (
    FinishReason,
    GenerateRequest,
    RequestError,
    Resumption,
    Timing,
    TokenChunk,
    TokenKind,
    TokenLogprob,
    Usage,
)


@dataclass(frozen=True, slots=True)
class DecodingContext:
    """What all choices of an engine share."""

    tokenizer: Tokenizer
    phase_tokens: PhaseTokens
    defaults: SamplingDefaults
    loop_guard: LoopGuardConfig
    eos: frozenset[int]


def beginnings(request: GenerateRequest) -> list[tuple[Resumption, tuple[int, ...]]]:
    """The sequences a request begins with: where each starts, and the choices forked from it.

    Choices that have no output yet share one sequence until the prompt is computed.
    """
    parts = request.resume or tuple(Resumption(index, ()) for index in range(request.params.n))
    fresh = [part for part in parts if not part.token_ids]
    found: list[tuple[Resumption, tuple[int, ...]]] = [(p, ()) for p in parts if p.token_ids]
    if fresh:
        found.append((fresh[0], tuple(part.index for part in fresh[1:])))
    return found


class Choice:
    """The mutable output state of one sequence."""

    def __init__(
        self,
        request: GenerateRequest,
        sequence: Sequence,
        context: DecodingContext,
        seed: int,
        *,
        other_indices: tuple[int, ...] = (),
    ) -> None:
        """``other_indices`` are the choices that are to be forked from this one."""
        params = request.params
        self.request = request
        self.sequence = sequence
        self.finish_reason: FinishReason | None = None
        self.stop_reason: str | int | None = None
        self.error: RequestError | None = None
        self.prompt_logprobs: list[TokenLogprob | None] = [None]  # the first token has none
        self._other_indices = other_indices
        self._own_stop_ids = frozenset(params.stop_token_ids)
        stop_ids = self._own_stop_ids | (frozenset() if params.ignore_eos else context.eos)
        self.phase = PhaseMachine(
            request.prompt_token_ids,
            context.phase_tokens,
            budget=params.thinking_budget,
            loop_guard=context.loop_guard if params.loop_guard else None,
            stop_ids=stop_ids,
        )
        self._sampling = SamplingState(
            params,
            context.defaults,
            self.phase.mode,
            request.prompt_token_ids,
            seed=seed,
            stop_ids=stop_ids,
        )
        self._tokenizer = context.tokenizer
        self._text = self._new_text()
        self._kinds: list[TokenKind] = []
        self._logprobs: list[TokenLogprob] = []
        self._num_replayed = 0
        self._num_drained = 0
        self._finish_drained = False
        self._prompt_logprobs_drained = sequence.params.prompt_logprobs is None

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None

    @property
    def pending_indices(self) -> tuple[int, ...]:
        """The choices still to be forked from this one."""
        return self._other_indices if self.sequence.num_pending_choices else ()

    def fork(self, sequence: Sequence, seed: int) -> Choice:
        """Another choice of the same prompt, before either has output."""
        assert not self._kinds, "choices part before the first output token"
        other = object.__new__(Choice)
        other.__dict__.update(self.__dict__)
        other.sequence = sequence
        other.phase = self.phase.fork()
        other._sampling = self._sampling.fork(seed)
        other._text = other._new_text()
        other._kinds = []
        other._logprobs = []
        return other

    def replay(self, token_ids: tuple[int, ...]) -> None:
        """Take the output so far of a choice that goes on here, before anything else.

        Only what follows is drained. That may be at once: the rest of a forced text that was cut,
        or the end, where the output was complete. Raises ``RequestError`` for tokens that cannot
        be this engine's output.
        """
        if not token_ids:
            return
        forced = list(self.phase.take_forced())
        for position, token_id in enumerate(token_ids):
            if self.finished:
                raise self._not_ours(f"{len(token_ids)} tokens, but it ends after {position}")
            if forced and forced.pop(0) != token_id:
                raise self._not_ours(f"id {token_id} at {position}, where another one is forced")
            self._append(token_id, None)
            forced = forced or list(self.phase.take_forced())
        self._num_replayed = self._num_drained = len(token_ids)
        self._append_certain(forced)

    def _not_ours(self, what: str) -> RequestError:
        return RequestError(
            f"choice {self.sequence.index} of {self.request.request_id} is resumed with {what}; "
            "only the output of an engine with the same model and settings can be gone on with",
            param="resume",
            code="resume_mismatch",
        )

    def row(self) -> SamplingRow:
        """How the next token is sampled."""
        return self._sampling.row(self.phase.phase)

    def row_behind(self) -> SamplingRow | None:
        """How the token behind the next one is sampled, unless that makes a difference.

        ``None`` where the next token must be known first. Once it is, ``continues`` tells whether
        this was right.
        """
        if self.pending_indices:
            return None  # its choices part at the next token
        return self._sampling.row_behind(self.phase.phase)

    def continues(self, sampled: SampledToken, row: SamplingRow) -> bool:
        """Whether ``sampled`` is the last token, and the next one is sampled as ``row`` says.

        Not where the token was an end, was followed or replaced by forced ids, began a phase that
        is sampled otherwise, or is none that the phase's repetition penalty counts.
        """
        if self.finished or self.sequence.token_ids[-1] != sampled.token_id:
            return False
        return self._sampling.holds(row, self.phase.phase, self._kinds[-1])

    def take(self, sampled: SampledToken) -> None:
        """Append a sampled token and the ids that the phase machine forces behind it.

        A prompt may end inside a thought that has no budget; then the forced ids come first, and
        the sampled token, which would have stood in their place, is dropped.
        """
        if self._append_forced():
            return
        self._append(sampled.token_id, sampled.logprob)
        if not self.finished:
            self._append_forced()

    def _append_forced(self) -> bool:
        forced = self.phase.take_forced()
        self._append_certain(forced)
        return bool(forced)

    def _append_certain(self, token_ids: Iterable[int]) -> None:
        """Append forced ids, up to the choice's end: nothing else could have stood there."""
        for token_id in token_ids:
            if self.finished:
                break
            best = ((token_id, 0.0),) if self.request.params.logprobs else ()
            self._append(token_id, TokenLogprob(token_id, 0.0, best))

    def finish(
        self,
        reason: FinishReason,
        *,
        stop_reason: str | int | None = None,
        error: RequestError | None = None,
    ) -> None:
        """End the choice; a second reason changes nothing."""
        if self.finish_reason is None:
            self.finish_reason = reason
            self.stop_reason = stop_reason
            self.error = error

    def drain(self) -> TokenChunk | None:
        """What is new since the last drain; ``None`` if nothing is."""
        first = self._num_drained
        fresh = self._kinds[first:]
        ending = self.finished and not self._finish_drained
        if not fresh and not ending:
            return None
        self._num_drained += len(fresh)
        self._finish_drained = self.finished
        prompt_logprobs = None
        if not self._prompt_logprobs_drained:
            prompt_logprobs = tuple(self.prompt_logprobs)
            self._prompt_logprobs_drained = True
        start = self.sequence.num_prompt_tokens + first
        return TokenChunk(
            request_id=self.request.request_id,
            index=self.sequence.index,
            first=first,
            token_ids=tuple(self.sequence.token_ids[start : start + len(fresh)]),
            kinds=tuple(fresh),
            usage=self.usage(),
            logprobs=(
                tuple(self._logprobs[first - self._num_replayed :])
                if self.request.params.logprobs is not None
                else None
            ),
            prompt_logprobs=prompt_logprobs,
            finish_reason=self.finish_reason,
            stop_reason=self.stop_reason,
            thought_end=self.phase.thought_end,
            timing=self._timing() if first == 0 and fresh else None,
            error=self.error,
        )

    def _timing(self) -> Timing | None:
        sequence = self.sequence
        if sequence.index != 0 or sequence.admitted_at is None:
            return None
        return Timing(
            queue=sequence.admitted_at - sequence.arrival,
            prefill=time.monotonic() - sequence.admitted_at,
        )

    def usage(self) -> Usage:
        """Token counts so far."""
        return Usage(
            prompt_tokens=self.sequence.num_prompt_tokens,
            cached_tokens=self.sequence.num_cached_tokens,
            completion_tokens=len(self._kinds),
            reasoning_tokens=self.phase.reasoning_tokens,
        )

    def _new_text(self) -> PieceStream | None:
        """The output's text, followed only where stop strings are to be found in it."""
        params = self.request.params
        if not params.stop:
            return None
        return PieceStream(
            self._tokenizer,
            params.stop,
            everywhere=params.stop_in_thought,
            min_tokens=params.min_tokens,
        )

    def _append(self, token_id: int, logprob: TokenLogprob | None) -> None:
        kind = self.phase.append(token_id)
        self.sequence.append(token_id)
        self._sampling.append(token_id, kind)
        self._kinds.append(kind)
        if logprob is not None:
            self._logprobs.append(logprob)
        if kind is TokenKind.STOP:
            own = token_id if token_id in self._own_stop_ids else None
            self.finish(FinishReason.STOP, stop_reason=own)
            return
        if self._text is not None:
            self._text.feed(token_id, kind)
            if self._text.matched is not None:
                self.finish(FinishReason.STOP, stop_reason=self._text.matched)
                return
        if self.sequence.room == 0:
            self.finish(FinishReason.LENGTH)
