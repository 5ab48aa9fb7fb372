"""What sampling remembers of one sequence between steps.

Its life: built at admission, ``row`` before each sampling pass, ``append`` after each token
(forced ones too), ``fork`` for another choice of the same prompt.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Self

import numpy as np

from ..types import SamplingParams, SequencePhase, ThinkingMode, TokenKind
from .bad_words import BadWords
from .penalties import PenaltyState
from .resolve import EffectiveSampling, SamplingDefaults, resolve
from .row import SamplingRow, TokenBias


class SamplingState:
    """Builds the ``SamplingRow`` of each step of one sequence.

    ``seed`` is the choice's own (``noise.choice_seed``). ``stop_ids`` are the ids that end the
    sequence: none of them is sampled before ``min_tokens`` tokens are out.
    """

    def __init__(
        self,
        params: SamplingParams,
        defaults: SamplingDefaults,
        mode: ThinkingMode,
        prompt_token_ids: Sequence[int],
        *,
        seed: int,
        stop_ids: frozenset[int],
    ):
        self._params = params
        self._seed = seed
        self._stop_ids = tuple(sorted(stop_ids))
        self._by_phase = {phase: resolve(params, defaults, mode, phase) for phase in SequencePhase}
        self._num_output = 0
        self._bad_words = BadWords(params.bad_words)
        self._tail: list[int] = []
        self._bias: TokenBias | None = None
        if params.logit_bias:
            self._bias = TokenBias(
                np.fromiter(params.logit_bias.keys(), dtype=np.int64),
                np.fromiter(params.logit_bias.values(), dtype=np.float32),
            )
        self._allowed = (
            None
            if params.allowed_token_ids is None
            else np.unique(np.array(params.allowed_token_ids, dtype=np.int64))
        )
        penalised = any(_has_penalty(sampling) for sampling in self._by_phase.values())
        self._penalties = PenaltyState(prompt_token_ids) if penalised else None

    def append(self, token_id: int, kind: TokenKind) -> None:
        """Take the next output token; ``kind`` as the phase machine gave it."""
        self._num_output += 1
        if self._penalties is not None:
            self._penalties.append(token_id, kind)
        if self._bad_words.tail_length:
            self._tail.append(token_id)
            del self._tail[: -self._bad_words.tail_length]

    def row(self, phase: SequencePhase) -> SamplingRow:
        """How the next token is sampled, in the phase the machine is in."""
        return self._row(phase, self._num_output)

    def row_behind(self, phase: SequencePhase) -> SamplingRow | None:
        """How the token behind the next one is sampled, if that leaves the phase as it is.

        Its penalties lack the next token, to be counted wherever that is drawn; ``holds`` tells
        whether that was right. ``None`` where the token may begin a bad word.
        """
        if self._bad_words.tail_length:
            return None
        return self._row(phase, self._num_output + 1)

    def holds(self, row: SamplingRow, phase: SequencePhase, kind: TokenKind) -> bool:
        """Whether a ``row_behind`` was right about the token that came last, of kind ``kind``."""
        now = self.row(phase)  # nothing else of a row changes from token to token
        if (now.step, now.sampling, now.banned) != (row.step, row.sampling, row.banned):
            return False
        if row.penalties is None or row.sampling.repetition_penalty == 1:
            return True
        return PenaltyState.counts_in(row.sampling.repetition_window, kind)

    def _row(self, phase: SequencePhase, step: int) -> SamplingRow:
        banned = self._bad_words.banned_after(self._tail)
        if step < self._params.min_tokens:
            banned += self._stop_ids
        return SamplingRow(
            sampling=self._by_phase[phase],
            seed=self._seed,
            step=step,
            penalties=self._penalties,
            banned=banned,
            bias=self._bias,
            allowed=self._allowed,
            num_logprobs=self._params.logprobs,
        )

    def fork(self, seed: int) -> Self:
        """An independent state with the same past and the seed of another choice."""
        other = copy.copy(self)
        other._seed = seed
        other._tail = self._tail.copy()
        other._penalties = None if self._penalties is None else self._penalties.fork()
        return other


def _has_penalty(sampling: EffectiveSampling) -> bool:
    return (
        sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
        or sampling.repetition_penalty != 1
    )
