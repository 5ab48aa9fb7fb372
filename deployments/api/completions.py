"""``POST /v1/completions``: raw prompts, as text or as token ids, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

from starlette.responses import Response

from ...workers.types import GenerateRequest, RequestError
from ..routing.classifier import Route
from ..routing.complexity import Question, measure
from ..routing.directory import ServedModel
from ..wire import RouteHints
from .answers import Answer
from .completion_choice import CompletionChoice
from .endpoint import Call
from .protocol import CompletionRequest, StreamOptions
from .routes import Routed, decide, enter, fit_context, hints_for, serve_first
from .thinking import raw_wishes
from .validation import check_prompt_ids, sampling_params

DEFAULT_MAX_TOKENS = 16  # what the OpenAI API does for completions
CHARS_PER_TOKEN = 4  # of English text, roughly


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt: its ids, and its text as an echo shows it."""

    ids: list[int]
    text: str


@dataclass(frozen=True, slots=True)
class CompletionPlan:
    """Engine requests, in the order of the prompts."""

    prompts: list[Prompt]
    requests: list[GenerateRequest]
    routed: Routed
    hints: RouteHints
    prompt_only: bool


async def completions(call: Call[CompletionRequest]) -> Response:
    """Complete prompts, whole or as a stream.

    Raises ``RequestError``, and ``ApiError`` where every pool that could serve them is full.
    """
    body, service = call.body, call.service
    candidates = service.directory.candidates(body.model)
    service.directory.refuse_if_full(candidates)
    given = _given_prompts(call)
    found = decide(service, candidates, raw_wishes(body), measure(_question(given)))

    async def serve(route: Route, held: ExitStack) -> Response:
        answer = _answer(call, await plan_completions(call, given, route, held))
        if body.stream:
            return await answer.stream(body.stream_options or StreamOptions())
        return await answer.whole()

    return await serve_first(service, found, call.held, serve)


async def plan_completions(
    call: Call[CompletionRequest],
    given: Sequence[str | list[int]],
    route: Route,
    held: ExitStack,
) -> CompletionPlan:
    """Check everything else a request says, enter a pool of its route and tokenise its prompts.

    All prompts go to one pool. Raises ``RequestError``, and ``ApiError`` where every pool of the
    route is full.
    """
    body, service = call.body, call.service
    routed = enter(service, route, held)
    model = routed.model
    asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    # Scoring a text: nothing is to be generated, only the prompt's probabilities are wanted.
    prompt_only = asked == 0 and body.echo
    max_tokens = 1 if prompt_only else asked
    params = sampling_params(
        body,
        num_tokens=model.num_tokens,
        encode_word=model.text.encode_word,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        thinking_budget=route.budget,
        default_profile=service.config.thinking.sampling_profile,
    )
    prompts = [await _prompt(model, prompt, echo=body.echo) for prompt in given]
    lengths = [len(prompt.ids) for prompt in prompts]
    fit_context(routed, lengths, max_tokens, "prompt")
    requests = [
        service.engine_request(
            f"{call.id}-{number}", prompt.ids, params, body.priority, body.cache_salt
        )
        for number, prompt in enumerate(prompts)
    ]
    hints = hints_for(service, call.headers, body, prompts[0].ids)
    return CompletionPlan(prompts, requests, routed, hints, prompt_only)


def _given_prompts(call: Call[CompletionRequest]) -> list[str | list[int]]:
    given, limit = call.body.prompt, call.service.config.api.max_prompts
    many: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if not many:
        raise RequestError("the prompt is empty; at least one token is needed", param="prompt")
    ids = [item for item in many if isinstance(item, int)]
    if ids:
        return [ids]
    if len(many) > limit:
        raise RequestError(f"{len(many)} prompts; at most {limit} are taken", param="prompt")
    return [item for item in many if not isinstance(item, int)]


def _question(given: Sequence[str | list[int]]) -> Question:
    """What is measured of raw prompts: the longest text; ids only count by their number."""
    texts = [prompt for prompt in given if isinstance(prompt, str)]
    ids = max((len(prompt) for prompt in given if not isinstance(prompt, str)), default=0)
    return Question(max(texts, key=len, default=""), context_chars=ids * CHARS_PER_TOKEN)


async def _prompt(model: ServedModel, given: str | list[int], *, echo: bool) -> Prompt:
    if isinstance(given, str):
        ids = await model.text.encode(given)
        check_prompt_ids(ids, model.num_tokens)
        return Prompt(ids, given)
    check_prompt_ids(given, model.num_tokens)
    shown = model.text.tokenizer.decode(given, skip_special=False) if echo else ""
    return Prompt(given, shown)


def _answer(call: Call[CompletionRequest], plan: CompletionPlan) -> Answer:
    body, model = call.body, plan.routed.model
    return Answer(
        service=call.service,
        routed=plan.routed,
        hints=plan.hints,
        arrived=call.arrived,
        requests=plan.requests,
        choices={
            (request.request_id, index): CompletionChoice(
                number * body.n + index,
                body,
                model.text.tokenizer,
                request,
                echo=prompt.text if body.echo else None,
                prompt_only=plan.prompt_only,
            )
            for number, (request, prompt) in enumerate(
                zip(plan.requests, plan.prompts, strict=True)
            )
            for index in range(body.n)
        },
        head={
            "id": f"cmpl-{call.id}",
            "object": "text_completion",
            "created": call.created,
            "model": model.name,
        },
    )
