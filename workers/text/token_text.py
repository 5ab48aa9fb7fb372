"""Log-probabilities with the text of their tokens, as clients get them."""

from __future__ import annotations

from dataclasses import dataclass

from ..types import TokenChunk, TokenKind, TokenLogprob
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class TokenText:
    """One token: its bytes, its text (U+FFFD where the bytes are half a character), its log-prob.

    ``top`` has the best alternatives, best first, without alternatives of their own.
    """

    token_id: int
    token: str
    data: bytes
    logprob: float
    kind: TokenKind
    top: tuple[TokenText, ...] = ()


def chunk_token_texts(chunk: TokenChunk, tokenizer: Tokenizer) -> tuple[TokenText, ...]:
    """An entry for each token of the chunk that has text; none where none were asked for."""
    if chunk.logprobs is None:
        return ()
    return tuple(
        token_text(logprob, kind, tokenizer)
        for logprob, kind in zip(chunk.logprobs, chunk.kinds, strict=True)
        if kind is not TokenKind.STOP
    )


def token_text(logprob: TokenLogprob, kind: TokenKind, tokenizer: Tokenizer) -> TokenText:
    """One log-probability with its token's text and those of its alternatives."""
    top = tuple(_entry(token, value, kind, tokenizer) for token, value in logprob.top)
    return _entry(logprob.token_id, logprob.logprob, kind, tokenizer, top)


def _entry(
    token: int,
    value: float,
    kind: TokenKind,
    tokenizer: Tokenizer,
    top: tuple[TokenText, ...] = (),
) -> TokenText:
    data = tokenizer.token_bytes(token)
    return TokenText(token, data.decode("utf-8", errors="replace"), data, value, kind, top)
