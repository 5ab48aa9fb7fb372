"""The one validator: from request fields to ``SamplingParams`` and checked prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...workers.sampling.checks import check_token_ids
from ...workers.types import (
    MAX_STOP_STRINGS,
    SAMPLING_PROFILES,
    RequestError,
    SamplingParams,
    SamplingProfile,
)
from .protocol import SamplingFields

EncodeWord = Callable[[str], Sequence[int]]


def sampling_params(
    request: SamplingFields,
    *,
    num_tokens: int,
    encode_word: EncodeWord,
    max_tokens: int | None,
    logprobs: int | None,
    prompt_logprobs: int | None = None,
    thinking_budget: int | None = None,
    default_profile: str | None = None,
) -> SamplingParams:
    """The engine's parameters; every id is checked against the ``num_tokens`` that exist.

    Raises ``RequestError`` naming the field for anything out of range.
    """
    profile = _profile(request.sampling_profile or default_profile)
    stop = [request.stop] if isinstance(request.stop, str) else request.stop
    if len(stop) > MAX_STOP_STRINGS:
        raise RequestError(
            f"{len(stop)} stop strings; at most {MAX_STOP_STRINGS} are taken", param="stop"
        )
    allowed = request.allowed_token_ids
    params = SamplingParams(
        temperature=request.temperature,
        top_p=request.top_p,
        top_k=request.top_k,
        min_p=request.min_p,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        repetition_penalty=request.repetition_penalty,
        logit_bias=_logit_bias(request.logit_bias),
        bad_words=_bad_words(request.bad_words, encode_word),
        allowed_token_ids=None if allowed is None else tuple(allowed),
        seed=request.seed,
        n=request.n,
        max_tokens=max_tokens,
        min_tokens=request.min_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids),
        include_stop_str_in_output=request.include_stop_str_in_output,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        thinking_budget=thinking_budget,
        thinking=profile.thinking if profile else None,
        answer=profile.answer if profile else None,
    )
    check_token_ids(params, num_tokens)
    return params


def check_prompt_ids(ids: Sequence[int], num_tokens: int, param: str = "prompt") -> None:
    """Raise ``RequestError`` for an empty prompt or an id that names no token."""
    if not ids:
        raise RequestError("the prompt is empty; at least one token is needed", param=param)
    # min and max run in C: a long prompt costs well under a millisecond.
    for token in (min(ids), max(ids)):
        if not 0 <= token < num_tokens:
            raise RequestError(
                f"{param} holds id {token}; the model's tokens are 0 to {num_tokens - 1}",
                param=param,
            )


def check_context(prompt_tokens: int, max_tokens: int | None, limit: int, param: str) -> None:
    """Raise ``RequestError`` (``context_length_exceeded``) with the numbers.

    Without ``max_tokens`` the prompt must leave room for one token.
    """
    wanted = max_tokens if max_tokens is not None else 1
    if prompt_tokens + wanted > limit:
        raise RequestError(
            f"the context holds {limit} tokens; the prompt has {prompt_tokens} and "
            f"{wanted} more were asked for ({prompt_tokens + wanted} in all)",
            param=param,
            code="context_length_exceeded",
        )


def _profile(name: str | None) -> SamplingProfile | None:
    if name is None:
        return None
    if name not in SAMPLING_PROFILES:
        raise RequestError(
            f"no sampling profile {name[:64]!r}; there are {', '.join(SAMPLING_PROFILES)}",
            param="sampling_profile",
        )
    return SAMPLING_PROFILES[name]


def _logit_bias(bias: dict[str, float]) -> dict[int, float]:
    result: dict[int, float] = {}
    for key, value in bias.items():
        # str.isdigit takes other scripts' digits too, which are no token ids.
        if not (key.isascii() and key.isdigit() and len(key) < 12):
            raise RequestError(
                f"logit_bias has the key {key[:32]!r}; keys are token ids", param="logit_bias"
            )
        result[int(key)] = value
    return result


def _bad_words(words: Sequence[str], encode: EncodeWord) -> tuple[tuple[int, ...], ...]:
    """Each word as it reads at the start of a text and after a space."""
    banned: dict[tuple[int, ...], None] = {}
    for word in words:
        if not word.strip() or len(word) > 256:
            raise RequestError("a bad word has 1 to 256 characters", param="bad_words")
        for spelling in (word.lstrip(), " " + word.lstrip()):
            banned[tuple(encode(spelling))] = None
    return tuple(banned)
