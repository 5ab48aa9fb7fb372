"""One choice of one request while it is in the engine.

Progress is two counters: ``num_computed_tokens`` have their K and V in the cache, ``num_tokens``
are known. Their difference is what the next steps compute: a prompt, one sampled token, a forced
text, or everything after a preemption. A sequence samples in the step that closes the gap, if it
has room for a token: one that is only computed for another engine has none.

A third counter, ``num_awaited_tokens``, says up to where K and V come from elsewhere, from another
engine or from a tier behind the KV pool: until so many tokens are there, the sequence keeps its
blocks and waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from enum import Enum

from .types import BlockHash, BlockId, GenerateRequest, PrefillRequest, Resumption, SamplingParams

_FROM_THE_START = Resumption(0, ())
_NOTHING_TO_SAMPLE = SamplingParams(max_tokens=1)
"""Of a sequence that is only computed: its worst case is its own length."""


class SequenceStatus(Enum):
    """Where a sequence is in the scheduler."""

    WAITING = "waiting"  # holds no blocks
    RUNNING = "running"
    FINISHED = "finished"  # holds no blocks, never comes back


@dataclass(frozen=True, slots=True, order=True)
class Rank:
    """The order of admission and, backwards, of preemption: the smaller goes first.

    ``effective`` is priority - waited / aging_seconds without the part that is the same for
    everybody: priority + arrival / aging_seconds. Two sequences therefore never change places.
    """

    effective: float
    arrival: float
    ticket: int
    index: int


@dataclass(slots=True, eq=False)
class Sequence:
    """Tokens, counters and blocks of one choice. Compared and hashed by identity.

    The engine appends tokens; the scheduler and the KV manager own every other changing field.
    """

    request_id: str
    params: SamplingParams
    token_ids: list[int]
    num_prompt_tokens: int
    max_len: int
    """Prompt plus output, at most; the engine ends the sequence there."""
    index: int = 0
    priority: int = 0
    arrival: float = 0.0
    deadline: float | None = None
    cache_salt: str = ""
    num_computed_tokens: int = 0
    num_cached_tokens: int = 0
    """Prompt tokens that the first admission found in the prefix cache or in a tier behind it."""
    num_awaited_tokens: int = 0
    """Leading tokens whose K and V come from elsewhere; 0 where all are computed here."""
    sends_from: int | None = None
    """First token whose K and V are sent to another engine; ``None``: none are."""
    num_pending_choices: int = 0
    """Choices to be forked from this one once its prompt is computed."""
    num_preemptions: int = 0
    num_priority_preemptions: int = 0
    """Those among them that made room for a better priority."""
    admitted_at: float | None = None
    """When it first left the queue."""
    status: SequenceStatus = SequenceStatus.WAITING
    rank: Rank = Rank(0.0, 0.0, 0, 0)
    block_table: list[BlockId] = field(default_factory=list)
    """By block number; ``NO_BLOCK`` where the block is needed no more."""
    block_hashes: list[BlockHash] = field(default_factory=list)
    """Names of the leading full blocks, as far as they have been worked out."""

    @classmethod
    def from_request(
        cls,
        request: GenerateRequest,
        *,
        arrival: float,
        max_len: int,
        start: Resumption = _FROM_THE_START,
        num_pending_choices: int | None = None,
    ) -> Sequence:
        """A choice of a request that came at ``arrival`` (seconds), still without output.

        ``max_len`` is the context limit in tokens; a named ``max_tokens`` lowers it. ``start``
        names the choice; by default it is the first, from which all others are forked. A choice
        that has told tokens elsewhere has told the prompt's log-probabilities with them.
        """
        num_prompt = len(request.prompt_token_ids)
        if num_prompt == 0:
            raise ValueError(f"request {request.request_id} has an empty prompt")
        params = request.params
        if num_pending_choices is None:
            num_pending_choices = params.n - 1
        limit = params.max_tokens
        told = bool(start.token_ids) and params.prompt_logprobs is not None
        return cls(
            request_id=request.request_id,
            params=replace(params, prompt_logprobs=None) if told else params,
            token_ids=list(request.prompt_token_ids),
            num_prompt_tokens=num_prompt,
            max_len=max_len if limit is None else min(max_len, num_prompt + limit),
            index=start.index,
            priority=request.priority,
            arrival=arrival,
            deadline=None if request.deadline_s is None else arrival + request.deadline_s,
            cache_salt=request.cache_salt,
            num_pending_choices=num_pending_choices,
        )

    @classmethod
    def from_prefill(cls, request: PrefillRequest, name: str, *, arrival: float) -> Sequence:
        """A sequence that is computed for another engine, under a name of its own, and ends there.

        It has no room, so nothing is ever sampled for it.
        """
        return cls(
            request_id=name,
            params=_NOTHING_TO_SAMPLE,
            token_ids=list(request.token_ids),
            num_prompt_tokens=len(request.token_ids),
            max_len=len(request.token_ids),
            priority=request.priority,
            arrival=arrival,
            deadline=arrival + request.deadline_s,
            cache_salt=request.cache_salt,
            sends_from=request.start,
        )

    @property
    def num_tokens(self) -> int:
        """Tokens known, prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated so far, forced ones included."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def output_token_ids(self) -> list[int]:
        """The generated tokens, as a new list."""
        return self.token_ids[self.num_prompt_tokens :]

    @property
    def num_uncomputed_tokens(self) -> int:
        """Tokens known but not in the KV cache."""
        return len(self.token_ids) - self.num_computed_tokens

    @property
    def is_awaiting(self) -> bool:
        """Whether K and V of some of its tokens are still to come from elsewhere."""
        return self.num_computed_tokens < self.num_awaited_tokens

    @property
    def room(self) -> int:
        """Tokens that may still be appended."""
        return self.max_len - len(self.token_ids)

    def append(self, token_id: int) -> None:
        """Add one generated token, sampled or forced."""
        self.token_ids.append(token_id)

    def worst_case_tokens(self, default_reservation: int) -> int:
        """Tokens to reserve room for: all it may reach where the caller named ``max_tokens``,
        else ``default_reservation`` more than it has now."""
        if self.params.max_tokens is not None:
            return self.max_len
        return min(self.max_len, len(self.token_ids) + default_reservation)

    def fork(self, index: int) -> Sequence:
        """Choice ``index`` of the same request at the same point, as yet without blocks."""
        return Sequence(
            request_id=self.request_id,
            params=self.params,
            token_ids=list(self.token_ids),
            num_prompt_tokens=self.num_prompt_tokens,
            max_len=self.max_len,
            index=index,
            priority=self.priority,
            arrival=self.arrival,
            deadline=self.deadline,
            cache_salt=self.cache_salt,
            num_computed_tokens=self.num_computed_tokens,
            num_cached_tokens=self.num_cached_tokens,
            admitted_at=self.admitted_at,
            block_hashes=list(self.block_hashes),
        )
