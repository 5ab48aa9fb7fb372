"""The phase machine: prompt, thinking, answer, tool call, from token ids alone.

The life of one sequence:
1. The prompt's ids give the thinking mode and the phase in which generation starts.
2. Before each forward pass the caller asks ``take_forced``: ids that must follow (a thought is out
   of budget, or caught in a loop) are appended in place of a sampled token.
3. Every generated token, sampled or forced, passes through ``append``, which says what it is.
Whoever needs the phase, the mode, the kind of a token or a count of thought tokens asks here.
Replaying a sequence's output through a new machine gives the same state.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Self

from .config import LoopGuardConfig
from .loop_guard import LoopGuard
from .types import SequencePhase, ThinkingMode, ThoughtEnd, TokenKind


@dataclass(frozen=True, slots=True)
class PhaseTokens:
    """The ids by which a checkpoint marks phases.

    ``think_open`` is ``None`` for a checkpoint that never thinks. ``whitespace`` holds the ids of
    line ends and blanks that may stand before ``<think>`` and in an empty block. ``stop_text_ids``
    is what ends a thought by force: a sentence, ``</think>`` and what follows it. ``eos`` are the
    ids that close a turn in a prompt.
    """

    think_open: int | None = None
    think_close: int | None = None
    tool_open: int | None = None
    tool_close: int | None = None
    whitespace: frozenset[int] = frozenset()
    stop_text_ids: tuple[int, ...] = ()
    eos: frozenset[int] = frozenset()
    bare_stop_ids: tuple[int, ...] = field(init=False)
    """``stop_text_ids`` from ``</think>`` on."""

    def __post_init__(self) -> None:
        bare: tuple[int, ...] = ()
        if self.think_open is not None:
            if self.think_close is None:
                raise ValueError("a checkpoint with a <think> token needs a </think> token")
            if self.think_close not in self.stop_text_ids:
                raise ValueError(
                    f"stop_text_ids has no </think> (id {self.think_close}): "
                    "appending it would not end a thought"
                )
            bare = self.stop_text_ids[self.stop_text_ids.index(self.think_close) :]
        object.__setattr__(self, "bare_stop_ids", bare)


class PhaseMachine:
    """Where one sequence stands, and what each of its tokens is.

    ``phase`` is the phase of the next token. ``PROMPT`` lasts until the first generated token that
    is not whitespace: in thinking mode it may be ``<think>``, and everywhere later that id is plain
    content. ``budget`` bounds the thought's own tokens, forced stop text not counted; 0 ends the
    thought at once, without stop text. ``stop_ids`` are the ids that end the sequence (by default
    the checkpoint's ``eos``; pass the empty set for ``ignore_eos``, add a request's own stop ids);
    they act in every phase, before any tag.
    """

    def __init__(
        self,
        prompt_token_ids: Sequence[int],
        tokens: PhaseTokens,
        *,
        budget: int | None,
        loop_guard: LoopGuardConfig | None,
        stop_ids: frozenset[int] | None = None,
    ):
        self._tokens = tokens
        self._budget = budget
        self._guard = None if loop_guard is None else LoopGuard(loop_guard)
        self._stop_ids = tokens.eos if stop_ids is None else stop_ids
        self._length = len(prompt_token_ids)
        self._ending: ThoughtEnd | None = None
        self._forced_taken = False
        self._thought_stop: int | None = None
        start = read_prompt(prompt_token_ids, tokens)
        self.mode = start.mode
        self.phase = start.phase
        self.reasoning_tokens = 0
        self.thought_end: ThoughtEnd | None = None
        self._thought_start = start.thought_start
        if start.phase is SequencePhase.THINKING:
            self._watch_budget()

    @property
    def thought_span(self) -> tuple[int, int] | None:
        """Sequence positions ``[start, stop)`` of the thought without its tags; ``None`` if none.

        The positions count the prompt. While the thought is open, ``stop`` is the length so far.
        """
        if self._thought_start is None:
            return None
        stop = self._length if self._thought_stop is None else self._thought_stop
        return self._thought_start, stop

    def append(self, token_id: int) -> TokenKind:
        """Take the next generated token, sampled or forced; says what it is to a reader."""
        kind = self._classify(token_id)
        self._length += 1
        return kind

    def take_forced(self) -> tuple[int, ...]:
        """The ids that must follow now, for the caller to ``append``, every one; () when free.

        They are given once.
        """
        if self._ending is None or self._forced_taken or self.phase is not SequencePhase.THINKING:
            return ()
        self._forced_taken = True
        return self._tokens.bare_stop_ids if self._budget == 0 else self._tokens.stop_text_ids

    def fork(self) -> Self:
        """An independent machine in the same state."""
        other = copy.copy(self)
        if self._guard is not None:
            other._guard = self._guard.fork()
        return other

    def _classify(self, token_id: int) -> TokenKind:
        tokens = self._tokens
        if token_id in self._stop_ids:
            return TokenKind.STOP
        if self.phase is SequencePhase.THINKING:
            return self._inside_thought(token_id)
        if self.phase is SequencePhase.TOOL_CALL:
            if token_id != tokens.tool_close:
                return TokenKind.TOOL_CALL
            self.phase = SequencePhase.ANSWER
            return TokenKind.TAG
        if token_id == tokens.tool_open:
            self.phase = SequencePhase.TOOL_CALL
            return TokenKind.TAG
        if self.phase is SequencePhase.PROMPT:
            if token_id == tokens.think_open:
                self._open_thought()
                return TokenKind.TAG
            if token_id not in tokens.whitespace:
                self.phase = SequencePhase.ANSWER
        return TokenKind.CONTENT

    def _open_thought(self) -> None:
        self.phase = SequencePhase.THINKING
        self._thought_start = self._length + 1
        self._watch_budget()

    def _inside_thought(self, token_id: int) -> TokenKind:
        if token_id == self._tokens.think_close:
            self._close_thought(self._ending or ThoughtEnd.NATURAL, SequencePhase.ANSWER)
            return TokenKind.TAG
        if token_id == self._tokens.tool_open:
            self._close_thought(ThoughtEnd.TOOL_CALL, SequencePhase.TOOL_CALL)
            return TokenKind.TAG
        self.reasoning_tokens += 1
        self._watch_budget()
        if self._ending is None and self._guard is not None and self._guard.append(token_id):
            self._ending = ThoughtEnd.LOOP
        return TokenKind.THOUGHT

    def _close_thought(self, reason: ThoughtEnd, phase: SequencePhase) -> None:
        self.thought_end = reason
        self.phase = phase
        self._thought_stop = self._length
        self._guard = None

    def _watch_budget(self) -> None:
        if self._budget is not None and self.reasoning_tokens >= self._budget:
            self._ending = self._ending or ThoughtEnd.BUDGET


@dataclass(frozen=True, slots=True)
class PromptReading:
    """What a prompt's ids say: the mode, the first phase, where an open thought begins."""

    mode: ThinkingMode
    phase: SequencePhase
    thought_start: int | None = None


def read_prompt(prompt_token_ids: Sequence[int], tokens: PhaseTokens) -> PromptReading:
    """Read mode and first phase from the part of a prompt after its last closed turn.

    An empty think block there means no thinking, a block with content means that the thought is
    over, an unclosed ``<think>`` that generation starts inside it.
    """
    last_tool_tag: int | None = None
    thinks = tokens.think_open is not None
    for position in range(len(prompt_token_ids) - 1, -1, -1):
        token_id = prompt_token_ids[position]
        if token_id in tokens.eos:
            break
        if token_id in (tokens.tool_open, tokens.tool_close):
            last_tool_tag = token_id if last_tool_tag is None else last_tool_tag
        elif thinks and token_id == tokens.think_open:
            if last_tool_tag is None:
                return PromptReading(
                    ThinkingMode.THINKING, SequencePhase.THINKING, thought_start=position + 1
                )
            return PromptReading(ThinkingMode.THINKING, _phase_after(last_tool_tag, tokens))
        elif thinks and token_id == tokens.think_close:
            empty = _is_empty_block(prompt_token_ids, position, tokens)
            mode = ThinkingMode.NON_THINKING if empty else ThinkingMode.THINKING
            return PromptReading(mode, _phase_after(last_tool_tag, tokens))
    mode = ThinkingMode.THINKING if thinks else ThinkingMode.NON_THINKING
    if thinks and last_tool_tag is None:
        return PromptReading(mode, SequencePhase.PROMPT)
    return PromptReading(mode, _phase_after(last_tool_tag, tokens))


def _phase_after(tool_tag: int | None, tokens: PhaseTokens) -> SequencePhase:
    if tool_tag is not None and tool_tag == tokens.tool_open:
        return SequencePhase.TOOL_CALL
    return SequencePhase.ANSWER


def _is_empty_block(
    prompt_token_ids: Sequence[int], close_position: int, tokens: PhaseTokens
) -> bool:
    position = close_position - 1
    while position >= 0 and prompt_token_ids[position] in tokens.whitespace:
        position -= 1
    return position >= 0 and prompt_token_ids[position] == tokens.think_open
