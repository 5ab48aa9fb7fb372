"""``POST /v1/completions``: raw prompts, as text or as token ids, one or many."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response

from ...workers.types import GenerateRequest, RequestError
from .answers import Answer
from .completion_choice import CompletionChoice
from .endpoint import Call
from .protocol import CompletionRequest, StreamOptions
from .thinking import under_ceiling
from .validation import check_context, check_model_name, check_prompt_ids, sampling_params

DEFAULT_MAX_TOKENS = 16  # what the OpenAI API does for completions


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
    prompt_only: bool


async def completions(call: Call[CompletionRequest]) -> Response:
    """Complete prompts, whole or as a stream."""
    answer = _answer(call, await plan_completions(call))
    if call.body.stream:
        return await answer.stream(call.body.stream_options or StreamOptions())
    return await answer.whole()


async def plan_completions(call: Call[CompletionRequest]) -> CompletionPlan:
    """Check everything a request says and tokenise its prompts. Raises ``RequestError``."""
    body, service = call.body, call.service
    check_model_name(body.model, service.model_name)
    asked = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    # Scoring a text: nothing is to be generated, only the prompt's probabilities are wanted.
    prompt_only = asked == 0 and body.echo
    max_tokens = 1 if prompt_only else asked
    params = sampling_params(
        body,
        num_tokens=service.facts.num_tokens,
        encode_word=service.text.encode_word,
        max_tokens=max_tokens,
        logprobs=body.logprobs,
        prompt_logprobs=body.logprobs if body.echo else None,
        thinking_budget=under_ceiling(body.thinking_token_budget, service.config.thinking),
        default_profile=service.config.thinking.sampling_profile,
    )
    prompts = await _prompts(call)
    for prompt in prompts:
        check_context(len(prompt.ids), max_tokens, service.facts.max_model_len, "prompt")
    requests = [
        service.engine_request(
            f"{call.id}-{number}", prompt.ids, params, body.priority, body.cache_salt
        )
        for number, prompt in enumerate(prompts)
    ]
    return CompletionPlan(prompts, requests, prompt_only)


async def _prompts(call: Call[CompletionRequest]) -> list[Prompt]:
    given, limit = call.body.prompt, call.service.config.api.max_prompts
    many: Sequence[str | int | list[int]] = [given] if isinstance(given, str) else given
    if not many:
        raise RequestError("the prompt is empty; at least one token is needed", param="prompt")
    ids = [item for item in many if isinstance(item, int)]
    if ids:
        return [await _prompt(call, ids)]
    if len(many) > limit:
        raise RequestError(f"{len(many)} prompts; at most {limit} are taken", param="prompt")
    return [await _prompt(call, item) for item in many if not isinstance(item, int)]


async def _prompt(call: Call[CompletionRequest], given: str | list[int]) -> Prompt:
    text, facts = call.service.text, call.service.facts
    if isinstance(given, str):
        ids = await text.encode(given)
        check_prompt_ids(ids, facts.num_tokens)
        return Prompt(ids, given)
    check_prompt_ids(given, facts.num_tokens)
    shown = text.tokenizer.decode(given, skip_special=False) if call.body.echo else ""
    return Prompt(given, shown)


def _answer(call: Call[CompletionRequest], plan: CompletionPlan) -> Answer:
    body, service = call.body, call.service
    return Answer(
        service=service,
        requests=plan.requests,
        choices={
            (request.request_id, index): CompletionChoice(
                number * body.n + index,
                body,
                service.text.tokenizer,
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
            "model": service.model_name,
        },
    )
