"""Talks to a model loaded in this process, without Ray."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from ...workers.llm import LLM, StreamDelta
from ...workers.types import SamplingParams
from .console import progress
from .talk import Manner, Message, Piece


class LocalTalker:
    """One model; a context manager that gives its memory back."""

    def __init__(self, model: str, engine: Mapping[str, Any]) -> None:
        self.name = model
        with progress() as say:
            say(f"loading {model}")
            self._llm = LLM(model, **{"max_num_seqs": 1, **engine})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._llm.close()

    def reply(self, messages: Sequence[Message], manner: Manner) -> Iterator[Piece]:
        params = SamplingParams(
            temperature=manner.temperature,
            seed=manner.seed,
            max_tokens=manner.max_tokens,
            thinking_budget=manner.budget,
        )
        stream = self._llm.stream(messages, params, enable_thinking=manner.thinking)
        with asyncio.Runner() as runner:
            try:
                while (step := runner.run(anext(stream, None))) is not None:
                    if (piece := _piece(step)) is not None:
                        yield piece
            finally:
                runner.run(stream.aclose())


def _piece(step: StreamDelta) -> Piece | None:
    content = step.delta.content + "".join(call.arguments for call in step.delta.tool_calls)
    return Piece(step.delta.reasoning, content) if step.delta.reasoning or content else None
