"""What an engine refuses before it touches any state: pure functions of requests and limits."""

from __future__ import annotations

from collections.abc import Sequence

from .sampling.checks import check_token_ids
from .types import GenerateRequest, PrefillRequest, RequestError


def check_request(request: GenerateRequest, *, num_tokens: int, max_model_len: int) -> None:
    """Raise ``RequestError`` for ids that are no tokens and for more than the context holds."""
    params, num_prompt = request.params, len(request.prompt_token_ids)
    if num_prompt == 0:
        raise RequestError("the prompt is empty; at least one token is needed", param="prompt")
    _check_ids(request.prompt_token_ids, num_tokens, "the prompt", "prompt")
    check_token_ids(params, num_tokens)
    wanted = num_prompt + (params.max_tokens or 1)
    if wanted > max_model_len:
        raise RequestError(
            f"the context limit is {max_model_len} tokens; the prompt has {num_prompt} "
            f"and {params.max_tokens or 'at least 1'} are to be generated: {wanted} in all",
            param="max_tokens" if num_prompt < max_model_len else "prompt",
            code="context_length_exceeded",
        )
    if request.resume:
        _check_resumptions(request, num_tokens, max_model_len - num_prompt)


def _check_resumptions(request: GenerateRequest, num_tokens: int, room: int) -> None:
    params = request.params
    most = room if params.max_tokens is None else params.max_tokens
    indices = [part.index for part in request.resume]
    if len(set(indices)) != len(indices):
        raise RequestError(f"choices {indices} are resumed: one of them twice", param="resume")
    for part in request.resume:
        who = f"the resumed choice {part.index}"
        if not 0 <= part.index < params.n:
            raise RequestError(f"{who} is none of the request's {params.n}", param="resume")
        if len(part.token_ids) > most:
            raise RequestError(
                f"{who} has {len(part.token_ids)} tokens; {most} are the most it may have",
                param="resume",
            )
        _check_ids(part.token_ids, num_tokens, who, "resume")


def check_prefill(
    request: PrefillRequest, *, num_tokens: int, max_model_len: int, block_size: int
) -> None:
    """Raise ``RequestError`` for a prefill that this engine cannot compute."""
    length = len(request.token_ids)
    if not 0 <= request.start < length or request.start % block_size:
        raise RequestError(
            f"the prefill asks for tokens {request.start} to {length}; a span begins at a multiple "
            f"of the block size {block_size} and is not empty",
            param="start",
        )
    if length > max_model_len:
        raise RequestError(
            f"the context limit is {max_model_len} tokens; {length} are to be computed",
            param="token_ids",
            code="context_length_exceeded",
        )
    _check_ids(request.token_ids, num_tokens, "the prefill", "token_ids")


def _check_ids(token_ids: Sequence[int], num_tokens: int, who: str, param: str) -> None:
    for token_id in token_ids:
        if not 0 <= token_id < num_tokens:
            raise RequestError(
                f"{who} holds id {token_id}; the model's tokens are 0 to {num_tokens - 1}",
                param=param,
            )
