"""``POST /v1/chat/completions``."""

from __future__ import annotations

from dataclasses import dataclass

from starlette.responses import Response

from ...workers.types import GenerateRequest, RequestError
from .answers import Answer
from .chat_choice import ChatChoice
from .endpoint import Call
from .protocol import ChatCompletionRequest, StreamOptions
from .thinking import resolve_thinking
from .tool_schemas import tools_in_use
from .validation import check_context, check_model_name, sampling_params


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request ready for the engine."""

    request: GenerateRequest
    has_tools: bool


async def chat_completions(call: Call[ChatCompletionRequest]) -> Response:
    """Answer a conversation, whole or as a stream."""
    answer = _answer(call, await plan_chat(call))
    if call.body.stream:
        return await answer.stream(call.body.stream_options or StreamOptions())
    return await answer.whole()


async def plan_chat(call: Call[ChatCompletionRequest]) -> ChatPlan:
    """Check everything a request says and render its prompt. Raises ``RequestError``."""
    body, service = call.body, call.service
    check_model_name(body.model, service.model_name)
    setting = resolve_thinking(body, service.config.thinking)
    max_tokens = _max_tokens(body)
    params = sampling_params(
        body,
        num_tokens=service.facts.num_tokens,
        encode_word=service.text.encode_word,
        max_tokens=max_tokens,
        logprobs=body.top_logprobs if body.logprobs else None,
        thinking_budget=setting.budget,
        default_profile=service.config.thinking.sampling_profile,
    )
    tools = tools_in_use(body)
    prompt = await service.text.render(
        body.messages, tools, enable_thinking=setting.enabled, size=call.size
    )
    check_context(len(prompt), max_tokens, service.facts.max_model_len, "messages")
    request = service.engine_request(call.id, prompt, params, body.priority, body.cache_salt)
    return ChatPlan(request, has_tools=tools is not None)


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens ({old}) and max_completion_tokens ({new}) are one setting and differ",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _answer(call: Call[ChatCompletionRequest], plan: ChatPlan) -> Answer:
    request, service = plan.request, call.service
    kind = "chat.completion.chunk" if call.body.stream else "chat.completion"
    return Answer(
        service=service,
        requests=[request],
        choices={
            (request.request_id, index): ChatChoice(
                index,
                call.body,
                service.text.tokenizer,
                request.params,
                has_tools=plan.has_tools,
            )
            for index in range(request.params.n)
        },
        head={
            "id": f"chatcmpl-{call.id}",
            "object": kind,
            "created": call.created,
            "model": service.model_name,
        },
    )
