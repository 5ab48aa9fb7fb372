"""From an engine's token chunks to what a client reads: content, reasoning and tool calls.

The kinds of the tokens say what each piece is; nothing here guesses a phase from text. Pieces
are handed out while they come and joined give exactly the whole answer, wherever chunks are cut.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from enum import Enum, auto

from ..types import FinishReason, TokenChunk, TokenKind
from .pieces import Piece, PieceStream
from .token_text import TokenText, chunk_token_texts
from .tokenizer import Tokenizer
from .tool_calls import ToolCall, ToolCallBlock, ToolCallDelta


@dataclass(frozen=True, slots=True)
class OutputDelta:
    """What became known of one choice. ``logprobs`` has an entry for each token of the chunk."""

    content: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCallDelta, ...] = ()
    logprobs: tuple[TokenText, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.content or self.reasoning or self.tool_calls or self.logprobs)


@dataclass(frozen=True, slots=True)
class AssembledOutput:
    """The whole of one choice. ``reasoning`` is None where there was none."""

    content: str
    reasoning: str | None
    tool_calls: tuple[ToolCall, ...]
    logprobs: tuple[TokenText, ...]
    finish_reason: str | None


class ChunkOrderError(RuntimeError):
    """A chunk came twice, out of order, or one before it was lost."""


class _Gap(Enum):
    """What lies before the content that comes next, which says what its newlines mean."""

    START = auto()
    THOUGHT = auto()
    CALL = auto()
    TEXT = auto()


def new_call_id() -> str:
    """A fresh id for a tool call."""
    return f"call_{secrets.token_hex(12)}"


class OutputAssembler:
    """Assembles one choice: ``feed`` every chunk, then ``finish`` once.

    With ``parse`` the thought becomes reasoning, without the newlines around it, and is dropped
    if it is only whitespace; with ``tools`` as well, tool call blocks become calls. Without
    ``parse`` all text with its tags is content, as completions want it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        parse: bool = True,
        tools: bool = False,
        stop: tuple[str, ...] = (),
        include_stop: bool = False,
        stop_in_thought: bool = False,
        min_tokens: int = 0,
        make_call_id: Callable[[], str] = new_call_id,
    ) -> None:
        self._tokenizer = tokenizer
        self._parse = parse
        self._tools = tools
        self._make_call_id = make_call_id
        self._pieces = PieceStream(
            tokenizer,
            stop,
            everywhere=stop_in_thought,
            include_stop=include_stop,
            min_tokens=min_tokens,
        )
        self._num_tokens = 0
        self._gap = _Gap.START
        self._pending = ""  # newlines (at the start: whitespace) that may not be content
        self._thought_pending = ""
        self._thought_begun = False
        self._has_content = False
        self._block: ToolCallBlock | None = None
        self._open_tag = ""  # of a block that has not become a call
        self._num_calls = 0
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[ToolCallDelta] = []
        self.complete_calls = 0

    def feed(self, chunk: TokenChunk) -> OutputDelta:
        """What ``chunk`` adds. Raises ``ChunkOrderError`` unless it continues the last one."""
        if chunk.first != self._num_tokens:
            raise ChunkOrderError(
                f"{chunk.request_id}[{chunk.index}]: a chunk begins at output token "
                f"{chunk.first}, expected is {self._num_tokens}"
            )
        self._num_tokens += len(chunk.token_ids)
        for token, kind in zip(chunk.token_ids, chunk.kinds, strict=True):
            self._read(self._pieces.feed(token, kind))
        return self._take(chunk_token_texts(chunk, self._tokenizer))

    def finish(self) -> OutputDelta:
        """What was held back until the end was known."""
        self._read(self._pieces.flush())
        if self._block is not None:
            self._end_block(self._block, "")
        if self._gap in (_Gap.START, _Gap.TEXT):
            self._emit(self._pending)
        self._pending = self._thought_pending = ""
        return self._take(())

    def finish_reason(self, reason: FinishReason | None) -> str | None:
        """The reason for clients: ``tool_calls`` where a whole call was the answer's end."""
        if reason is FinishReason.STOP and self.complete_calls:
            return "tool_calls"
        return None if reason is None else reason.value

    def _take(self, logprobs: tuple[TokenText, ...]) -> OutputDelta:
        delta = OutputDelta(
            "".join(self._content), "".join(self._reasoning), tuple(self._calls), logprobs
        )
        self._content, self._reasoning, self._calls = [], [], []
        return delta

    def _read(self, pieces: Iterable[Piece]) -> None:
        for piece in pieces:
            if not self._parse:
                self._emit(piece.text)
                continue
            if piece.kind is TokenKind.TAG:
                self._read_tag(piece)
            elif piece.kind is TokenKind.THOUGHT:
                self._read_thought(piece.text)
            elif piece.kind is TokenKind.TOOL_CALL and self._block is not None:
                self._read_block(self._block, piece.text)
            else:
                self._read_content(piece.text)

    def _read_tag(self, piece: Piece) -> None:
        tags = self._tokenizer.tags
        if piece.tag is None:
            return  # a tag cut short by a stop string
        if piece.tag == tags.think_open or piece.tag == tags.think_close:
            self._end_thought()
        elif self._tools and piece.tag == tags.tool_open:
            self._block = ToolCallBlock()
            self._open_tag = piece.text
        elif self._block is not None and piece.tag == tags.tool_close:
            self._end_block(self._block, piece.text)
        else:
            self._read_content(piece.text)

    def _end_thought(self) -> None:
        """Leave a thought, or enter one: what is held back was only space around it."""
        self._gap = _Gap.THOUGHT
        self._pending = self._thought_pending = ""

    def _read_thought(self, text: str) -> None:
        self._thought_pending += text
        if not self._thought_begun:
            if not self._thought_pending.strip():
                return
            self._thought_begun = True
            self._thought_pending = self._thought_pending.lstrip("\n")
        body = self._thought_pending.rstrip("\n")
        if body:
            self._reasoning.append(body)
            self._thought_pending = self._thought_pending[len(body) :]

    def _read_content(self, text: str) -> None:
        self._pending += text
        if self._gap is _Gap.THOUGHT or (self._gap is _Gap.CALL and not self._has_content):
            self._pending = self._pending.lstrip("\n")
        if self._gap is _Gap.START and not self._pending.strip():
            return
        body = self._pending.rstrip("\n")
        if body:
            self._emit(body)
            self._pending = self._pending[len(body) :]
            self._gap = _Gap.TEXT

    def _emit(self, text: str) -> None:
        if text:
            self._content.append(text)
            self._has_content = True

    def _read_block(self, block: ToolCallBlock, text: str) -> None:
        begun = block.name is not None
        arguments, content = block.feed(text)
        if block.name is not None and not begun:
            self._pending = self._open_tag = ""
            self._gap = _Gap.CALL
            call_id = self._make_call_id()
            self._calls.append(ToolCallDelta(self._num_calls, call_id, block.name, arguments))
            self._num_calls += 1
        elif arguments:
            self._calls.append(ToolCallDelta(self._num_calls - 1, None, None, arguments))
        if content:
            self._read_content(self._open_tag + content)
            self._open_tag = ""

    def _end_block(self, block: ToolCallBlock, close_tag: str) -> None:
        self._block = None
        self.complete_calls += block.complete
        if block.name is None:
            self._read_content(self._open_tag + block.end() + close_tag)
            self._open_tag = ""


def assemble(assembler: OutputAssembler, chunks: Iterable[TokenChunk]) -> AssembledOutput:
    """The whole answer of one choice: the same pieces as a stream's, joined."""
    deltas = []
    reason = None
    for chunk in chunks:
        deltas.append(assembler.feed(chunk))
        reason = chunk.finish_reason or reason
    deltas.append(assembler.finish())
    return AssembledOutput(
        content="".join(delta.content for delta in deltas),
        reasoning="".join(delta.reasoning for delta in deltas) or None,
        tool_calls=_join_calls(call for delta in deltas for call in delta.tool_calls),
        logprobs=tuple(entry for delta in deltas for entry in delta.logprobs),
        finish_reason=assembler.finish_reason(reason),
    )


def _join_calls(deltas: Iterable[ToolCallDelta]) -> tuple[ToolCall, ...]:
    calls: list[ToolCall] = []
    for delta in deltas:
        if delta.id is not None and delta.name is not None:
            calls.append(ToolCall(delta.id, delta.name, delta.arguments))
        else:
            calls[-1] = replace(calls[-1], arguments=calls[-1].arguments + delta.arguments)
    return tuple(calls)
