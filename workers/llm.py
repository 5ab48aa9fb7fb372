"""The engine without a server: ``LLM(path).generate(prompts, params)`` and a streaming form."""

from __future__ import annotations

import asyncio
import itertools
import queue
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, cast

from .async_engine import AsyncEngine, build_engine
from .config import EngineConfig
from .engine import Engine
from .text.assembler import OutputAssembler, OutputDelta, assemble
from .text.messages import normalise_messages, normalise_tools
from .text.tool_calls import ToolCall
from .types import (
    FinishReason,
    GenerateRequest,
    QueueFullError,
    RequestError,
    SamplingParams,
    StepOutput,
    TokenChunk,
    TokenLogprob,
    Usage,
)

_RETRY_SECONDS = 0.05
"""Pause before a full queue is tried again; it may be full of other callers' requests."""

Message = Mapping[str, Any]
Prompt = str | Sequence[int]


@dataclass(frozen=True, slots=True)
class ChoiceOutput:
    """One finished completion.

    ``text`` is everything as the model wrote it, tags included; ``reasoning``, ``content`` and
    ``tool_calls`` are its parts, told apart by the phase machine.
    """

    index: int
    text: str
    reasoning: str | None
    content: str
    tool_calls: tuple[ToolCall, ...]
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None
    usage: Usage


@dataclass(frozen=True, slots=True)
class RequestOutput:
    """All completions of one prompt, by index."""

    request_id: str
    prompt_token_ids: tuple[int, ...]
    choices: tuple[ChoiceOutput, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None


@dataclass(frozen=True, slots=True)
class StreamDelta:
    """What one step added to one choice of a stream; the last has a ``finish_reason``."""

    index: int
    delta: OutputDelta
    usage: Usage
    finish_reason: FinishReason | None
    stop_reason: str | int | None


class LLM:
    """A model with its engine, in this process.

    ``model`` is ``"embedded"``, a checkpoint folder or a hub name, or a whole ``EngineConfig``;
    ``options`` are the other keys of ``EngineConfig``. The engine runs in a thread of its own, so
    any number of threads and tasks may call at a time and share its batch. ``close`` (or a ``with``
    block) ends it.
    """

    def __init__(self, model: str | EngineConfig = "embedded", **options: Any) -> None:
        if isinstance(model, EngineConfig):
            if options:
                raise ValueError(f"an EngineConfig takes no further options, got {list(options)}")
            config = model
        else:
            config = EngineConfig.model_validate({"model": str(model), **options})
        self._engine = build_engine(config)
        self._loop = AsyncEngine(self._engine, self._deliver)
        self._mailboxes: dict[str, Callable[[TokenChunk], None]] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._loop.start()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Complete raw prompts (text or token ids) in one batch; results in their order.

        ``params`` is one for all or one each. Raises ``RequestError`` for a request that cannot be
        served; the others of the call are aborted.
        """
        ids = [self._encode(prompt) for prompt in _as_list(prompts)]
        if params is None or isinstance(params, SamplingParams):
            each = [params or SamplingParams()] * len(ids)
        else:
            each = list(params)
        if len(each) != len(ids):
            raise ValueError(f"{len(ids)} prompts, but {len(each)} sampling params")
        return self._run(list(zip(ids, each, strict=True)))

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
    ) -> RequestOutput:
        """Answer a conversation through the checkpoint's chat template."""
        prompt = self._render(messages, tools, enable_thinking)
        return self._run([(prompt, params or SamplingParams())], tools=bool(tools))[0]

    async def stream(
        self,
        prompt: Prompt | Sequence[Message],
        params: SamplingParams | None = None,
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        enable_thinking: bool | None = None,
    ) -> AsyncGenerator[StreamDelta, None]:
        """Answer a raw prompt or a conversation as it is written, a delta a step and choice.

        Leaving the iterator early aborts the request.
        """
        params = params or SamplingParams()
        if _is_conversation(prompt):
            ids = self._render(cast(Sequence[Message], prompt), tools, enable_thinking)
        else:
            ids = self._encode(cast(Prompt, prompt))
        loop = asyncio.get_running_loop()
        chunks: asyncio.Queue[TokenChunk] = asyncio.Queue()

        request = self._request(ids, params)

        def deliver(chunk: TokenChunk) -> None:
            try:
                loop.call_soon_threadsafe(chunks.put_nowait, chunk)
            except RuntimeError:  # the reader's loop is closed: nobody is left to read
                self._forget(request.request_id, abort=True)

        self._submit(request, deliver)
        assemblers = [
            self._assembler(params, parse=True, tools=bool(tools)) for _ in range(params.n)
        ]
        open_choices = params.n
        try:
            while open_choices:
                chunk = await chunks.get()
                _raise_error(chunk)
                assembler = assemblers[chunk.index]
                delta = assembler.feed(chunk)
                if delta:
                    yield StreamDelta(chunk.index, delta, chunk.usage, None, None)
                if chunk.finish_reason is not None:
                    open_choices -= 1
                    yield StreamDelta(
                        chunk.index,
                        assembler.finish(),
                        chunk.usage,
                        chunk.finish_reason,
                        chunk.stop_reason,
                    )
        finally:
            self._forget(request.request_id, abort=open_choices > 0)

    @property
    def engine(self) -> Engine:
        """The engine itself, for its statistics and its tokenizer."""
        return self._engine

    def close(self) -> None:
        """Stop the engine; open requests end as aborted."""
        self._loop.stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- one call's requests --------------------------------------------------------------------

    def _run(
        self, wanted: list[tuple[list[int], SamplingParams]], *, tools: bool = False
    ) -> list[RequestOutput]:
        chunks: queue.SimpleQueue[TokenChunk] = queue.SimpleQueue()
        requests = [self._request(ids, params) for ids, params in wanted]
        for request in requests:
            self._engine.validate(request)
        received: dict[str, list[TokenChunk]] = {r.request_id: [] for r in requests}
        left = {r.request_id: r.params.n for r in requests}
        held = deque(requests)
        try:
            while left:
                self._submit_some(held, chunks.put)
                try:
                    chunk = chunks.get(timeout=_RETRY_SECONDS if held else None)
                except queue.Empty:
                    continue
                _raise_error(chunk)
                received[chunk.request_id].append(chunk)
                if chunk.finish_reason is not None:
                    left[chunk.request_id] -= 1
                    if left[chunk.request_id] == 0:
                        del left[chunk.request_id]
                        self._forget(chunk.request_id, abort=False)
        finally:
            for request_id in left:
                self._forget(request_id, abort=True)
        return [self._output(r, received[r.request_id], tools) for r in requests]

    def _submit_some(
        self, held: deque[GenerateRequest], mailbox: Callable[[TokenChunk], None]
    ) -> None:
        """Submit from the front of ``held`` for as long as the queue has places."""
        while held:
            try:
                self._submit(held[0], mailbox)
            except QueueFullError:
                return
            held.popleft()

    def _output(
        self, request: GenerateRequest, chunks: list[TokenChunk], tools: bool
    ) -> RequestOutput:
        by_choice: list[list[TokenChunk]] = [[] for _ in range(request.params.n)]
        for chunk in chunks:
            by_choice[chunk.index].append(chunk)
        prompt_logprobs = next((c.prompt_logprobs for c in chunks if c.prompt_logprobs), None)
        return RequestOutput(
            request.request_id,
            request.prompt_token_ids,
            tuple(self._choice(request.params, one, tools) for one in by_choice),
            prompt_logprobs,
        )

    def _choice(
        self, params: SamplingParams, chunks: list[TokenChunk], tools: bool
    ) -> ChoiceOutput:
        raw = assemble(self._assembler(params, parse=False), chunks)
        parts = assemble(self._assembler(params, parse=True, tools=tools), chunks)
        last = chunks[-1]
        assert last.finish_reason is not None
        return ChoiceOutput(
            index=last.index,
            text=raw.content,
            reasoning=parts.reasoning,
            content=parts.content,
            tool_calls=parts.tool_calls,
            token_ids=tuple(itertools.chain.from_iterable(c.token_ids for c in chunks)),
            logprobs=(
                tuple(itertools.chain.from_iterable(c.logprobs or () for c in chunks))
                if params.logprobs is not None
                else None
            ),
            finish_reason=last.finish_reason,
            stop_reason=last.stop_reason,
            usage=last.usage,
        )

    # --- plumbing -------------------------------------------------------------------------------

    def _assembler(
        self, params: SamplingParams, *, parse: bool, tools: bool = False
    ) -> OutputAssembler:
        return OutputAssembler(
            self._engine.loaded.tokenizer,
            parse=parse,
            tools=tools,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            stop_in_thought=params.stop_in_thought,
            min_tokens=params.min_tokens,
        )

    def _encode(self, prompt: Prompt) -> list[int]:
        if isinstance(prompt, str):
            # A raw prompt is the caller's own template, so its control tokens count.
            return self._engine.loaded.tokenizer.encode(
                prompt, parse_special=True, max_tokens=self._engine.max_model_len
            )
        return list(prompt)

    def _render(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None,
        enable_thinking: bool | None,
    ) -> list[int]:
        return self._engine.loaded.text.template.render(
            normalise_messages(messages),
            normalise_tools(tools),
            enable_thinking=enable_thinking,
            max_tokens=self._engine.max_model_len,
        )

    def _request(self, ids: Sequence[int], params: SamplingParams) -> GenerateRequest:
        with self._lock:
            number = next(self._numbers)
        return GenerateRequest(f"llm-{number}", tuple(ids), params)

    def _submit(self, request: GenerateRequest, mailbox: Callable[[TokenChunk], None]) -> None:
        self._mailboxes[request.request_id] = mailbox
        try:
            self._loop.submit(request)
        except BaseException:
            self._mailboxes.pop(request.request_id, None)
            raise

    def _forget(self, request_id: str, *, abort: bool) -> None:
        self._mailboxes.pop(request_id, None)
        if abort:
            self._loop.abort(request_id)

    def _deliver(self, output: StepOutput) -> None:
        for chunk in output.chunks:
            mailbox = self._mailboxes.get(chunk.request_id)
            if mailbox is not None:
                mailbox(chunk)


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [cast(Prompt, prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _is_conversation(prompt: Prompt | Sequence[Message]) -> bool:
    return not isinstance(prompt, str) and bool(prompt) and isinstance(prompt[0], Mapping)


def _raise_error(chunk: TokenChunk) -> None:
    if chunk.error is not None:
        raise chunk.error
    if chunk.finish_reason is FinishReason.ABORT:
        raise RequestError(f"request {chunk.request_id} was aborted", code="aborted")
