"""What crosses a boundary: requests in, numbered token chunks out, and the errors between.

Nothing here needs torch, so an ingress process, a client or a test can use it without the engine.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from enum import IntEnum, StrEnum
from typing import Any, NewType

import numpy as np
from numpy.typing import NDArray

TokenId = NewType("TokenId", int)
BlockId = NewType("BlockId", int)
BlockHash = NewType("BlockHash", bytes)

SEED_LIMIT = 2**63
MAX_TOP_LOGPROBS = 20
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 1024


class RequestError(ValueError):
    """A request that cannot be served as it stands: the caller's mistake, with its place.

    ``param`` names the field, ``code`` is the stable word programs test for
    (``invalid_value``, ``context_length_exceeded``, ...).
    """

    def __init__(self, message: str, *, param: str | None = None, code: str = "invalid_value"):
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[Any, ...]:
        return (_rebuild_request_error, (type(self), self.message, self.param, self.code))


def _rebuild_request_error(
    kind: type[RequestError], message: str, param: str | None, code: str
) -> RequestError:
    return kind(message, param=param, code=code)


class QueueFullError(RequestError):
    """The engine's bounded queue has no place left; try again after a while."""


class ThinkingMode(StrEnum):
    """What a rendered prompt asks of the model."""

    THINKING = "thinking"
    NON_THINKING = "non_thinking"


class SequencePhase(StrEnum):
    """Where a sequence stands; only the phase machine decides it."""

    PROMPT = "prompt"
    THINKING = "thinking"
    ANSWER = "answer"
    TOOL_CALL = "tool_call"


class TokenKind(IntEnum):
    """What one generated token is to a reader of the output; given by the phase machine."""

    CONTENT = 0
    THOUGHT = 1
    TOOL_CALL = 2
    TAG = 3  # <think>, </think>, <tool_call>, </tool_call> where they act as tags
    STOP = 4  # the token that ended the sequence; it has no text


class ThoughtEnd(StrEnum):
    """Why a thought ended."""

    NATURAL = "natural"
    BUDGET = "budget"
    LOOP = "loop"
    TOOL_CALL = "tool_call"


class FinishReason(StrEnum):
    """Why a sequence ended."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True)
class PhaseSampling:
    """Sampling values for one phase; ``None`` keeps the request's value.

    ``repetition_penalty`` here counts only the tokens generated in that phase, never the prompt.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None


@dataclass(frozen=True, slots=True)
class SamplingProfile:
    """A named pair of phase settings."""

    thinking: PhaseSampling
    answer: PhaseSampling


SAMPLING_PROFILES: dict[str, SamplingProfile] = {
    "loop_averse": SamplingProfile(
        thinking=PhaseSampling(repetition_penalty=1.5),
        answer=PhaseSampling(repetition_penalty=1.0),
    ),
}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one request is decoded. ``None`` means the checkpoint's own default.

    Raises ``RequestError`` with the field's name for a value outside its range.
    """

    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None  # 0 or -1: all tokens
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0  # over prompt and output, as transformers defines it
    logit_bias: dict[int, float] = field(default_factory=dict)
    bad_words: tuple[tuple[int, ...], ...] = ()  # token id sequences that must not appear
    allowed_token_ids: tuple[int, ...] | None = None
    seed: int | None = None
    n: int = 1
    max_tokens: int | None = None  # None: up to the context limit
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    stop_in_thought: bool = False  # stop strings are looked for in the answer only, unless set
    ignore_eos: bool = False
    logprobs: int | None = None  # None: none; k: the sampled token's and the k best
    prompt_logprobs: int | None = None
    thinking_budget: int | None = None  # thought tokens before the thought is ended
    thinking: PhaseSampling | None = None
    answer: PhaseSampling | None = None
    loop_guard: bool = True

    def __post_init__(self) -> None:
        _check_range("temperature", self.temperature, 0.0, 100.0)
        _check_range("top_p", self.top_p, 0.0, 1.0, open_low=True)
        _check_int("top_k", self.top_k, -1, 2**31 - 1)
        _check_range("min_p", self.min_p, 0.0, 1.0)
        _check_range("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _check_range("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_range("repetition_penalty", self.repetition_penalty, 0.0, 100.0, open_low=True)
        _check_int("seed", self.seed, -SEED_LIMIT, SEED_LIMIT - 1)
        _check_int("n", self.n, 1, 128)
        _check_int("max_tokens", self.max_tokens, 1, 2**31 - 1)
        _check_int("min_tokens", self.min_tokens, 0, 2**31 - 1)
        _check_int("logprobs", self.logprobs, 0, MAX_TOP_LOGPROBS)
        _check_int("prompt_logprobs", self.prompt_logprobs, 0, MAX_TOP_LOGPROBS)
        _check_int("thinking_budget", self.thinking_budget, 0, 2**31 - 1)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise RequestError(
                f"min_tokens is {self.min_tokens}, above max_tokens {self.max_tokens}",
                param="min_tokens",
            )
        if len(self.stop) > MAX_STOP_STRINGS:
            raise RequestError(
                f"{len(self.stop)} stop strings; at most {MAX_STOP_STRINGS} are taken",
                param="stop",
            )
        for text in self.stop:
            if not text or len(text) > MAX_STOP_STRING_CHARS:
                raise RequestError(
                    f"a stop string has 1 to {MAX_STOP_STRING_CHARS} characters, "
                    f"this one has {len(text)}",
                    param="stop",
                )
        for token, bias in self.logit_bias.items():
            _check_range(f"logit_bias[{token}]", bias, -100.0, 100.0)

    def with_max_tokens(self, max_tokens: int) -> SamplingParams:
        """The same settings with a resolved ``max_tokens``."""
        return replace(self, max_tokens=max_tokens, min_tokens=min(self.min_tokens, max_tokens))


def _check_range(
    name: str, value: float | None, low: float, high: float, *, open_low: bool = False
) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RequestError(f"{name} is a number, got {type(value).__name__}", param=name)
    outside = not math.isfinite(value) or value > high or value < low
    if outside or (open_low and value == low):
        bracket = "(" if open_low else "["
        raise RequestError(f"{name} is {value}; it lies in {bracket}{low}, {high}]", param=name)


def _check_int(name: str, value: int | None, low: int, high: int) -> None:
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise RequestError(f"{name} is an integer, got {type(value).__name__}", param=name)
    if not low <= value <= high:
        raise RequestError(f"{name} is {value}; it lies in [{low}, {high}]", param=name)


@dataclass(frozen=True, slots=True)
class Resumption:
    """Where one choice of an interrupted request goes on: its number and the tokens it has."""

    index: int
    token_ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """One prompt to complete ``params.n`` times.

    ``request_id`` stays the request's name in every process. ``cache_salt`` separates tenants in
    the prefix cache. ``deadline_s`` counts from arrival at the engine. A lower ``priority`` goes
    first.

    ``resume`` names the choices that another engine began and that this one is to go on with, as
    if it had written their tokens itself: only they run, their chunks are numbered on from there.
    Empty: every choice starts anew.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    params: SamplingParams
    priority: int = 0
    cache_salt: str = ""
    deadline_s: float | None = None
    resume: tuple[Resumption, ...] = ()

    @property
    def choice_indices(self) -> tuple[int, ...]:
        """The choices that run: those to go on with, or all of them."""
        if self.resume:
            return tuple(part.index for part in self.resume)
        return tuple(range(self.params.n))


@dataclass(frozen=True, slots=True)
class PrefillRequest:
    """Compute the KV of ``token_ids`` for another engine, which has the first ``start`` of them.

    ``start`` is a multiple of the block size. ``attempt`` tells a repeated request of the same id
    from the one before, ``epoch`` (63 random bits) one life of the asking engine from the next.
    ``deadline_s`` counts from arrival at the engine.
    """

    request_id: str
    attempt: int
    epoch: int
    token_ids: tuple[int, ...]
    start: int
    cache_salt: str
    deadline_s: float
    priority: int = 0


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """Log-probability of one token and of the best alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one sequence so far, by ids."""

    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    reasoning_tokens: int


@dataclass(frozen=True, slots=True)
class Timing:
    """Where a request's time went before its first token, in seconds."""

    queue: float
    prefill: float


@dataclass(frozen=True, slots=True)
class TokenChunk:
    """What one engine step added to one sequence.

    ``first`` numbers the chunk: the output position of its first token, so a reader can see a gap
    or a repeat. ``kinds`` has one entry a token. A chunk with a ``finish_reason`` is the last.
    ``stop_reason`` is the stop string or stop id that ended it. ``prompt_logprobs`` comes once,
    with the first chunk, where it was asked for (the first prompt token has none). ``timing`` comes
    with the first tokens of choice 0.
    """

    request_id: str
    index: int
    first: int
    token_ids: tuple[int, ...]
    kinds: tuple[TokenKind, ...]
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] | None = None
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    thought_end: ThoughtEnd | None = None
    timing: Timing | None = None
    error: RequestError | None = None


@dataclass(frozen=True, slots=True, eq=False)
class KVExportOut:
    """One KV ticket on its way to the engine that asked for it: header and payload in one array."""

    request_id: str
    attempt: int
    buffer: NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class PrefillEnd:
    """A prefill for another engine has ended: every ticket is out, or ``error`` says why not."""

    request_id: str
    attempt: int
    error: RequestError | None = None


@dataclass(frozen=True, slots=True)
class RemoteQuery:
    """What an engine knows when it asks whether another one should compute a prompt.

    ``num_prompt_tokens`` are to be computed in all (a resumed request's replayed ones included),
    ``num_cached_tokens`` of them are here already; ``num_queued_tokens`` of other requests are
    known here and not yet computed.
    """

    request_id: str
    num_prompt_tokens: int
    num_cached_tokens: int
    num_queued_tokens: int


@dataclass(slots=True, eq=False)
class StepOutput:
    """Everything that came out of an engine since the step before; false when nothing did."""

    chunks: list[TokenChunk] = field(default_factory=list)
    tickets: list[KVExportOut] = field(default_factory=list)
    """What this engine computed for others, in order for each request."""
    prefill_ends: list[PrefillEnd] = field(default_factory=list)
    """Ends of prefills for others; behind a request's last ticket."""
    wanted: list[PrefillRequest] = field(default_factory=list)
    """What another engine is to compute for this one: its tickets are awaited from now on."""
    unwanted: list[tuple[str, int]] = field(default_factory=list)
    """Request id and attempt of what was wanted and is needed no longer: it ended here early."""

    def __bool__(self) -> bool:
        return bool(
            self.chunks or self.tickets or self.prefill_ends or self.wanted or self.unwanted
        )


@dataclass(frozen=True, slots=True)
class KVPagingStats:
    """Of the tiers behind the KV pool: bytes and pages now, the others totals since start.

    ``hit_tokens`` are prompt tokens that came back instead of being computed, by tier (``host``,
    ``disk``). ``restores`` counts prompts of which a tier had something, by how that ended
    (``done``: every block came; ``slower``: computing is faster). ``drops`` are blocks lost, by
    reason; ``checksum`` and ``truncated`` are damaged ones.
    """

    host_bytes: int
    disk_bytes: int
    pages_writing: int
    spilled_blocks: int
    hit_tokens: dict[str, int]
    restores: dict[str, int]
    drops: dict[str, int]


@dataclass(frozen=True, slots=True)
class EngineStats:
    """Sizes now and totals since start; gauges are sizes of sets, totals only grow.

    ``prefill_tokens_per_s`` is a moving average over steps that are mostly prefill, 0 before the
    first; ``queued_prefill_tokens`` are known and not computed, but for single tokens of running
    sequences and for what another engine computes. ``kv_import_ends`` counts prefills by other
    engines by how they ended (``done``: every token came), ``kv_tickets_ignored`` the tickets that
    were passed over, by reason. ``weight_bytes_streamed`` were read from the disk for layers that
    are not kept in memory; steps stood still for ``weight_wait_s`` seconds until those came.
    """

    running: int = 0
    waiting: int = 0
    kv_blocks_total: int = 0
    kv_blocks_used: int = 0
    kv_blocks_cached: int = 0
    prefix_query_tokens: int = 0
    prefix_hit_tokens: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    thinking_tokens: int = 0
    budget_ends: int = 0
    loops_cut: int = 0
    preemptions: int = 0
    steps: int = 0
    requests_finished: dict[str, int] = field(default_factory=dict)
    queued_prefill_tokens: int = 0
    prefill_tokens_per_s: float = 0.0
    kv_imports_running: int = 0
    kv_exports_running: int = 0
    kv_imported_tokens: int = 0
    kv_exported_tokens: int = 0
    kv_import_ends: dict[str, int] = field(default_factory=dict)
    kv_tickets_ignored: dict[str, int] = field(default_factory=dict)
    kv_paging: KVPagingStats | None = None
    """``None`` where there are no tiers."""
    weight_bytes_streamed: int = 0
    weight_wait_s: float = 0.0
