"""Refuses token ids that the model has no token for, before a request is admitted."""

from __future__ import annotations

from collections.abc import Iterable

from ..types import RequestError, SamplingParams


def check_token_ids(params: SamplingParams, num_tokens: int) -> None:
    """Raise ``RequestError`` for an id outside ``[0, num_tokens)`` in any sampling field.

    ``num_tokens`` counts the tokens that exist; the vocabulary's padding rows are not tokens.
    """
    _check("logit_bias", params.logit_bias, num_tokens)
    _check("stop_token_ids", params.stop_token_ids, num_tokens)
    if params.allowed_token_ids is not None:
        if not params.allowed_token_ids:
            raise RequestError(
                "allowed_token_ids is empty: no token could be sampled",
                param="allowed_token_ids",
            )
        _check("allowed_token_ids", params.allowed_token_ids, num_tokens)
    for word in params.bad_words:
        if not word:
            raise RequestError("bad_words holds an empty word", param="bad_words")
        _check("bad_words", word, num_tokens)


def _check(name: str, token_ids: Iterable[int], num_tokens: int) -> None:
    for token_id in token_ids:
        if isinstance(token_id, bool) or not isinstance(token_id, int):
            raise RequestError(
                f"{name} holds token ids, which are integers; got {type(token_id).__name__}",
                param=name,
            )
        if not 0 <= token_id < num_tokens:
            raise RequestError(
                f"{name} holds id {token_id}; the model's tokens are 0 to {num_tokens - 1}",
                param=name,
            )
