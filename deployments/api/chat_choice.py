"""One choice of a chat completion, as a whole or as stream deltas made of the same pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from ...workers.text.assembler import OutputAssembler, OutputDelta
from ...workers.text.token_text import TokenText
from ...workers.text.tokenizer import Tokenizer
from ...workers.text.tool_calls import ToolCallDelta
from ...workers.types import SamplingParams, TokenChunk
from .logprobs import chat_logprobs
from .protocol import ChatCompletionRequest


class ChatChoice:
    """Turns the chunks of one choice into OpenAI's JSON."""

    def __init__(
        self,
        index: int,
        body: ChatCompletionRequest,
        tokenizer: Tokenizer,
        params: SamplingParams,
        *,
        has_tools: bool,
    ) -> None:
        self._index = index
        self._body = body
        self._assembler = OutputAssembler(
            tokenizer,
            parse=True,
            tools=has_tools,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            stop_in_thought=params.stop_in_thought,
            min_tokens=params.min_tokens,
        )
        self._begun = False
        self._content: list[str] = []
        self._reasoning: list[str] = []
        self._calls: list[dict[str, Any]] = []
        self._logprobs: list[TokenText] = []
        self._finish_reason: str | None = None
        self._stop_reason: str | int | None = None

    def feed(self, chunk: TokenChunk) -> None:
        """Take a chunk of an answer that is sent whole."""
        for delta in self._deltas(chunk):
            self._logprobs += delta.logprobs
            self._content.append(delta.content)
            self._reasoning.append(delta.reasoning)
            for call in self._calls_of(delta):
                self._add_call(call)

    def whole(self) -> dict[str, Any]:
        """The choice after its last chunk."""
        content, reasoning = "".join(self._content), self._shown_reasoning()
        message: dict[str, Any] = {
            "role": "assistant",
            "content": None if self._calls and not content else content,
            "refusal": None,
            "reasoning_content": reasoning,
            "reasoning": reasoning,
        }
        if self._calls:
            message["tool_calls"] = self._calls
        return {
            "index": self._index,
            "message": message,
            "logprobs": self._logprobs_json(self._logprobs),
            "finish_reason": self._finish_reason,
            "stop_reason": self._stop_reason,
        }

    def _shown_reasoning(self) -> str | None:
        if not self._body.include_reasoning:
            return None
        return "".join(self._reasoning) or None

    def stream(self, chunk: TokenChunk) -> Iterator[dict[str, Any]]:
        """The stream choices for one chunk: the role first, the finish reason only in the last."""
        if not self._begun:
            self._begun = True
            yield self._piece({"role": "assistant", "content": ""})
        for delta in self._deltas(chunk):
            body = self._delta_json(delta)
            if body or delta.logprobs:
                yield self._piece(body, delta.logprobs)
        if chunk.finish_reason is not None:
            last = self._piece({})
            last["finish_reason"] = self._finish_reason
            last["stop_reason"] = self._stop_reason
            yield last

    def _deltas(self, chunk: TokenChunk) -> Iterator[OutputDelta]:
        yield self._assembler.feed(chunk)
        if chunk.finish_reason is not None:
            yield self._assembler.finish()
            self._finish_reason = self._assembler.finish_reason(chunk.finish_reason)
            self._stop_reason = chunk.stop_reason

    def _piece(self, delta: dict[str, Any], logprobs: Sequence[TokenText] = ()) -> dict[str, Any]:
        return {
            "index": self._index,
            "delta": delta,
            "logprobs": self._logprobs_json(logprobs) if logprobs else None,
            "finish_reason": None,
        }

    def _logprobs_json(self, logprobs: Sequence[TokenText]) -> dict[str, Any] | None:
        if not self._body.logprobs:
            return None
        return chat_logprobs(logprobs, self._body.top_logprobs)

    def _delta_json(self, delta: OutputDelta) -> dict[str, Any]:
        body: dict[str, Any] = {}
        if delta.reasoning and self._body.include_reasoning:
            body["reasoning_content"] = body["reasoning"] = delta.reasoning
        if delta.content:
            body["content"] = delta.content
        calls = [_call_json(call) for call in self._calls_of(delta)]
        if calls:
            body["tool_calls"] = calls
        return body

    def _calls_of(self, delta: OutputDelta) -> list[ToolCallDelta]:
        one_only = not self._body.parallel_tool_calls
        return [call for call in delta.tool_calls if call.index == 0 or not one_only]

    def _add_call(self, delta: ToolCallDelta) -> None:
        if delta.id is not None:
            function = {"name": delta.name, "arguments": ""}
            self._calls.append({"id": delta.id, "type": "function", "function": function})
        self._calls[-1]["function"]["arguments"] += delta.arguments


def _call_json(delta: ToolCallDelta) -> dict[str, Any]:
    function: dict[str, Any] = {"arguments": delta.arguments}
    call: dict[str, Any] = {"index": delta.index, "function": function}
    if delta.id is not None:
        function["name"] = delta.name
        call |= {"id": delta.id, "type": "function"}
    return call
