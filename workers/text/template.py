"""The checkpoint's chat template: a conversation to token ids.

Only the template writes control tokens. Before rendering, every control token spelled out in a
message or a tool gets a mark behind its first character; after rendering, the text is cut at the
control tokens that are left, which are the template's own, and the marks are taken out of the
pieces between. The mark is a lone surrogate: no accepted text can hold one, so nothing of a
client's is ever taken for a mark.

Content without control tokens is rendered and encoded as transformers does it. For content with
them the template sees the marked text, so its own string tests (Qwen's look for
``<tool_response>`` in user turns and ``</think>`` in assistant turns) treat it as any other text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2

from ..types import RequestError
from .errors import TextFilesError
from .sandbox import RenderLimitError, SandboxedTemplate
from .token_files import read_json
from .tokenizer import Tokenizer

RENDER_SECONDS = 5.0
"""Time limit of one rendering."""

_MARK = "\ud800"


class ChatTemplate:
    """A chat template, compiled once. Safe to share between threads."""

    def __init__(
        self, source: str, tokenizer: Tokenizer, *, render_seconds: float = RENDER_SECONDS
    ) -> None:
        try:
            self._template = SandboxedTemplate(source)
        except jinja2.TemplateSyntaxError as error:
            raise TextFilesError(
                f"the chat template is broken at line {error.lineno}: {error.message}"
            ) from error
        self._tokenizer = tokenizer
        self._render_seconds = render_seconds
        self.supports_thinking = self._probe_thinking()

    @classmethod
    def load(
        cls, folder: Path, tokenizer: Tokenizer, *, render_seconds: float = RENDER_SECONDS
    ) -> ChatTemplate:
        """Load a checkpoint's template: ``chat_template.jinja``, else tokenizer_config.json's.

        Raises ``TextFilesError`` where there is none or it cannot be compiled.
        """
        return cls(_source(folder), tokenizer, render_seconds=render_seconds)

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
        max_tokens: int | None = None,
    ) -> list[int]:
        """Token ids of a normalised conversation (see ``messages.normalise_messages``).

        ``enable_thinking=None`` leaves the choice to the template. Raises ``RequestError`` where
        the template refuses the conversation, runs out of its time, or the ids are more than
        ``max_tokens``.
        """
        text = self._render_marked(messages, tools, enable_thinking, add_generation_prompt)
        pieces = [
            piece.replace(_MARK, "") if isinstance(piece, str) else piece
            for piece in self._tokenizer.split_control(text)
        ]
        return self._tokenizer.encode_pieces(pieces, max_tokens=max_tokens, param="messages")

    def render_text(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] = (),
        *,
        enable_thinking: bool | None = None,
        add_generation_prompt: bool = True,
    ) -> str:
        """The rendered prompt as text, for people to read; ids come from ``render`` alone."""
        text = self._render_marked(messages, tools, enable_thinking, add_generation_prompt)
        return text.replace(_MARK, "")

    def _render_marked(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]],
        enable_thinking: bool | None,
        add_generation_prompt: bool,
    ) -> str:
        variables: dict[str, Any] = {
            "messages": [self._marked(message) for message in messages],
            "tools": [self._marked(tool) for tool in tools] or None,
            "add_generation_prompt": add_generation_prompt,
        }
        if enable_thinking is not None:
            variables["enable_thinking"] = enable_thinking
        try:
            return self._template.render(variables, seconds=self._render_seconds)
        except RenderLimitError as error:
            raise RequestError(f"the chat template {error}", param="messages") from error
        except Exception as error:
            # A template is a program of the checkpoint's: it may raise anything, and what it
            # raises depends on the conversation it was given.
            raise RequestError(
                f"the chat template refuses this conversation: {error}", param="messages"
            ) from error

    def _marked(self, value: Any) -> Any:
        if isinstance(value, str):
            return self._tokenizer.break_control(value, _MARK)
        if isinstance(value, Mapping):
            return {self._marked(key): self._marked(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self._marked(item) for item in value]
        return value

    def _probe_thinking(self) -> bool:
        question = [{"role": "user", "content": "?"}]
        return self._render_marked(question, (), True, True) != self._render_marked(
            question, (), False, True
        )


def _source(folder: Path) -> str:
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        # Several named templates: transformers takes the one called default.
        template = {entry.get("name"): entry.get("template") for entry in template}.get("default")
    if not isinstance(template, str):
        raise TextFilesError(
            f"{folder} has no chat template: neither chat_template.jinja nor chat_template in "
            "tokenizer_config.json"
        )
    return template
