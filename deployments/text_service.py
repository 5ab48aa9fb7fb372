"""One checkpoint's tokenizer and template, with long work kept off the event loop."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ..workers.text.messages import normalise_tools
from ..workers.text.template import ChatTemplate
from ..workers.text.tokenizer import Tokenizer
from .off_loop import OffLoop

_PROBE = [{"role": "user", "content": "?"}]


class TextService:
    """Text to ids within the context limit; safe to call from any request.

    ``thinks``: the template knows thinking; ``thinks_by_default``: and leaves the model to think
    when it is told nothing.
    """

    def __init__(self, checkpoint: Path, max_model_len: int, off_loop: OffLoop) -> None:
        self.tokenizer = Tokenizer.load(checkpoint)
        self._template = ChatTemplate.load(checkpoint, self.tokenizer)
        self.thinks = self._template.supports_thinking
        told = self._template.render_text(_PROBE, enable_thinking=True)
        self.thinks_by_default = self.thinks and self._template.render_text(_PROBE) == told
        # Twice the limit: what is a little too long is refused later, with its exact length.
        self._max_tokens = 2 * max_model_len
        self._off_loop = off_loop

    async def encode(self, text: str, param: str = "prompt") -> list[int]:
        """Ids of plain text. Raises ``RequestError`` where it is far beyond the context."""
        encode = partial(self.tokenizer.encode, text, max_tokens=self._max_tokens, param=param)
        return await self._off_loop.run(encode, len(text))

    async def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Any] | None,
        *,
        enable_thinking: bool | None,
        add_generation_prompt: bool = True,
        size: int,
    ) -> list[int]:
        """Ids of a normalised conversation. ``size`` is about its length in characters."""

        def work() -> list[int]:
            return self._template.render(
                messages,
                normalise_tools(tools),
                enable_thinking=enable_thinking,
                add_generation_prompt=add_generation_prompt,
                max_tokens=self._max_tokens,
            )

        return await self._off_loop.run(work, size)

    def encode_word(self, word: str) -> list[int]:
        """Ids of a short text."""
        return self.tokenizer.encode(word, param="bad_words")
