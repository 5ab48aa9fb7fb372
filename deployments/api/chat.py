"""``POST /v1/chat/completions``."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from starlette.responses import Response

from ...workers.text.messages import normalise_messages, soft_switch
from ...workers.types import GenerateRequest, RequestError
from ..routing.classifier import Route
from ..routing.complexity import Complexity, measure, question_of
from ..routing.directory import ServedModel
from ..wire import RouteHints
from .answers import Answer
from .chat_choice import ChatChoice
from .endpoint import Call
from .protocol import ChatCompletionRequest, StreamOptions, ThinkingFields
from .routes import Routed, decide, enter, fit_context, hints_for, serve_first
from .service import Service
from .thinking import chat_wishes
from .tool_schemas import tools_in_use
from .validation import sampling_params


@dataclass(frozen=True, slots=True)
class ChatPlan:
    """A chat request ready for the engines of its pool."""

    request: GenerateRequest
    routed: Routed
    hints: RouteHints
    has_tools: bool


@dataclass(frozen=True, slots=True)
class Conversation:
    """Normalised messages with what the classifier reads of them."""

    messages: Sequence[dict[str, Any]]
    soft_switch: bool | None
    complexity: Complexity


async def chat_completions(call: Call[ChatCompletionRequest]) -> Response:
    """Answer a conversation, whole or as a stream.

    Raises ``RequestError``, and ``ApiError`` where every pool that could serve it is full.
    """
    body, service = call.body, call.service
    candidates = service.directory.candidates(body.model)
    service.directory.refuse_if_full(candidates)
    tools = tools_in_use(body)
    conversation = await read_conversation(service, body.messages, tools, call.size)
    found = route_conversation(service, candidates, body, conversation)

    async def serve(route: Route, held: ExitStack) -> Response:
        answer = _answer(call, await plan_chat(call, conversation, tools, route, held))
        if body.stream:
            return await answer.stream(body.stream_options or StreamOptions())
        return await answer.whole()

    return await serve_first(service, found, call.held, serve)


async def plan_chat(
    call: Call[ChatCompletionRequest],
    conversation: Conversation,
    tools: Sequence[Any] | None,
    route: Route,
    held: ExitStack,
) -> ChatPlan:
    """Check everything else a request says, enter a pool of its route and render its prompt there.

    Raises ``RequestError``, and ``ApiError`` where every pool of its route is full.
    """
    body, service = call.body, call.service
    routed = enter(service, route, held)
    model, max_tokens = routed.model, _max_tokens(body)
    params = sampling_params(
        body,
        num_tokens=model.num_tokens,
        encode_word=model.text.encode_word,
        max_tokens=max_tokens,
        logprobs=body.top_logprobs if body.logprobs else None,
        thinking_budget=route.budget,
        default_profile=service.config.thinking.sampling_profile,
    )
    prompt = await model.text.render(
        conversation.messages, tools, enable_thinking=route.enable_thinking, size=call.size
    )
    fit_context(routed, [len(prompt)], max_tokens, "messages")
    return ChatPlan(
        service.engine_request(call.id, prompt, params, body.priority, body.cache_salt),
        routed,
        hints_for(service, call.headers, body, prompt),
        has_tools=tools is not None,
    )


async def read_conversation(
    service: Service, messages: Sequence[Any], tools: Sequence[Any] | None, size: int
) -> Conversation:
    """Normalise messages and look at them once. ``size`` is about their length in characters."""

    def work() -> Conversation:
        normal = normalise_messages(messages)
        complexity = measure(question_of(normal, len(tools or ())))
        return Conversation(normal, soft_switch(normal), complexity)

    return await service.off_loop.run(work, size)


def route_conversation(
    service: Service,
    candidates: Sequence[ServedModel],
    body: ThinkingFields,
    conversation: Conversation,
) -> tuple[Route, ...]:
    """The routes of a conversation under the request's own settings, the best one first."""
    wishes = chat_wishes(body, service.config.thinking, conversation.soft_switch)
    return decide(service, candidates, wishes, conversation.complexity)


def _max_tokens(body: ChatCompletionRequest) -> int | None:
    old, new = body.max_tokens, body.max_completion_tokens
    if old is not None and new is not None and old != new:
        raise RequestError(
            f"max_tokens ({old}) and max_completion_tokens ({new}) are one setting and differ",
            param="max_completion_tokens",
        )
    return old if new is None else new


def _answer(call: Call[ChatCompletionRequest], plan: ChatPlan) -> Answer:
    request, model = plan.request, plan.routed.model
    kind = "chat.completion.chunk" if call.body.stream else "chat.completion"
    return Answer(
        service=call.service,
        routed=plan.routed,
        hints=plan.hints,
        arrived=call.arrived,
        requests=[request],
        choices={
            (request.request_id, index): ChatChoice(
                index,
                call.body,
                model.text.tokenizer,
                request.params,
                has_tools=plan.has_tools,
            )
            for index in range(request.params.n)
        },
        head={
            "id": f"chatcmpl-{call.id}",
            "object": kind,
            "created": call.created,
            "model": model.name,
        },
    )
