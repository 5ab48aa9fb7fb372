"""The served checkpoint's tokenizer and template, with long work kept off the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from ..workers.text.messages import normalise_messages, normalise_tools
from ..workers.text.template import ChatTemplate
from ..workers.text.tokenizer import Tokenizer

T = TypeVar("T")
INLINE_CHARS = 4096
"""Text up to this length is tokenised in the event loop: under a millisecond, less than a hop."""


class TextService:
    """Text to ids within the context limit; safe to call from any request."""

    def __init__(self, checkpoint: Path, max_model_len: int) -> None:
        self.tokenizer = Tokenizer.load(checkpoint)
        self.template = ChatTemplate.load(checkpoint, self.tokenizer)
        # Twice the limit: what is a little too long is refused later, with its exact length.
        self._max_tokens = 2 * max_model_len
        self._threads = ThreadPoolExecutor(max_workers=2, thread_name_prefix="text")

    async def encode(self, text: str, param: str = "prompt") -> list[int]:
        """Ids of plain text. Raises ``RequestError`` where it is far beyond the context."""
        encode = partial(self.tokenizer.encode, text, max_tokens=self._max_tokens, param=param)
        return await self.off_loop(encode, len(text))

    async def render(
        self,
        messages: Sequence[Any],
        tools: Sequence[Any] | None,
        *,
        enable_thinking: bool | None,
        add_generation_prompt: bool = True,
        size: int,
    ) -> list[int]:
        """Ids of a conversation. ``size`` is about its length in characters."""

        def work() -> list[int]:
            return self.template.render(
                normalise_messages(messages),
                normalise_tools(tools),
                enable_thinking=enable_thinking,
                add_generation_prompt=add_generation_prompt,
                max_tokens=self._max_tokens,
            )

        return await self.off_loop(work, size)

    async def off_loop(self, work: Callable[[], T], size: int) -> T:
        """Run small work here and large work in a thread."""
        if size <= INLINE_CHARS:
            return work()
        return await asyncio.get_running_loop().run_in_executor(self._threads, work)

    def encode_word(self, word: str) -> list[int]:
        """Ids of a short text."""
        return self.tokenizer.encode(word, param="bad_words")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(wait=False, cancel_futures=True)
