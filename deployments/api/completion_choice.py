"""One choice of a completion: all text as the model wrote it, its prompt before it on an echo."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from ...workers.text.assembler import OutputAssembler
from ...workers.text.token_text import TokenText, token_text
from ...workers.text.tokenizer import Tokenizer
from ...workers.types import GenerateRequest, TokenChunk, TokenKind
from .logprobs import CompletionLogprobs
from .protocol import CompletionRequest

Scored = tuple[str, TokenText | None]
_LISTS = ("tokens", "token_logprobs", "top_logprobs", "text_offset")


class CompletionChoice:
    """Turns the chunks of one choice into OpenAI's JSON.

    With ``prompt_only`` the generated token is left out: only the prompt's scores were wanted.
    """

    def __init__(
        self,
        index: int,
        body: CompletionRequest,
        tokenizer: Tokenizer,
        request: GenerateRequest,
        *,
        echo: str | None,
        prompt_only: bool,
    ) -> None:
        params = request.params
        self._index = index
        self._tokenizer = tokenizer
        self._prompt_ids = request.prompt_token_ids
        self._echo = echo
        self._prompt_only = prompt_only
        self._assembler = OutputAssembler(
            tokenizer,
            parse=False,
            stop=params.stop,
            include_stop=params.include_stop_str_in_output,
            stop_in_thought=params.stop_in_thought,
            min_tokens=params.min_tokens,
        )
        self._scores = None if body.logprobs is None else CompletionLogprobs(body.logprobs)
        self._pieces: list[dict[str, Any]] = []

    def feed(self, chunk: TokenChunk) -> None:
        """Take a chunk of an answer that is sent whole."""
        self._pieces += self.stream(chunk)

    def whole(self) -> dict[str, Any]:
        """The choice after its last chunk: its stream's pieces, joined."""
        joined = dict(self._pieces[-1])
        joined["text"] = "".join(piece["text"] for piece in self._pieces)
        if self._scores is not None:
            scores = [piece["logprobs"] for piece in self._pieces if piece["logprobs"]]
            joined["logprobs"] = {
                name: [item for part in scores for item in part[name]] for name in _LISTS
            }
        return joined

    def stream(self, chunk: TokenChunk) -> Iterator[dict[str, Any]]:
        """The stream choices for one chunk."""
        if self._echo is not None:
            yield self._piece(self._echo, self._prompt_scores(chunk))
            self._echo = None
        delta = self._assembler.feed(chunk)
        if not self._prompt_only and (delta.content or delta.logprobs):
            yield self._piece(delta.content, [(entry.token, entry) for entry in delta.logprobs])
        if chunk.finish_reason is not None:
            rest = self._assembler.finish()
            last = self._piece("" if self._prompt_only else rest.content, [])
            last["finish_reason"] = self._assembler.finish_reason(chunk.finish_reason)
            last["stop_reason"] = chunk.stop_reason
            yield last

    def _piece(self, text: str, scored: list[Scored]) -> dict[str, Any]:
        scores = self._scores.render(scored) if self._scores is not None and scored else None
        return {"index": self._index, "text": text, "logprobs": scores, "finish_reason": None}

    def _prompt_scores(self, chunk: TokenChunk) -> list[Scored]:
        if self._scores is None or chunk.prompt_logprobs is None:
            return []
        scored: list[Scored] = []
        for token, entry in zip(self._prompt_ids, chunk.prompt_logprobs, strict=True):
            if entry is None:
                data = self._tokenizer.token_bytes(token)
                scored.append((data.decode("utf-8", errors="replace"), None))
            else:
                text = token_text(entry, TokenKind.CONTENT, self._tokenizer)
                scored.append((text.token, text))
        return scored
