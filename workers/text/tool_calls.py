"""Tool calls in Hermes format, read while they are written.

A block is ``{"name": …, "arguments": {…}}`` between the tool call tags. Its text goes through a
strict JSON checker character by character. As soon as the name is known and the arguments have
begun as an object, the call counts as begun, and the text of its arguments is handed out as it
comes: nothing handed out can have been wrong at that point. Text that cannot be a call before
that point makes the whole block plain content. Where a call breaks after it, the call ends there,
incomplete, and the rest of the block is content. Both hold for streamed answers and whole ones.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

from .json_prefix import JsonPrefix, JsonState


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """A piece of the call number ``index``: its first has the id and name, all have arguments."""

    index: int
    id: str | None
    name: str | None
    arguments: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A call of the answer. ``arguments`` is JSON text, cut off where the answer was."""

    id: str
    name: str
    arguments: str


class ToolCallBlock:
    """One block between the tags.

    ``name`` is set once the call has begun. ``complete`` tells that its arguments are whole.
    ``broken`` tells that the text is no JSON of a call, so all that follows is content.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self.complete = False
        self.broken = False
        self._json = JsonPrefix()
        self._text = ""
        self._checked = 0
        self._key: str | None = None
        self._found: set[str] = set()
        self._value_start = 0  # of the key or value that is being read
        self._called: str | None = None
        self._arguments_start: int | None = None
        self._arguments_end: int | None = None
        self._handed_out = 0

    def feed(self, text: str) -> tuple[str, str]:
        """Read more of the block: the text of arguments and the text of content in it."""
        if self.broken:
            return "", text
        self._text += text
        while self._checked < len(self._text) and not self.broken:
            self.broken = not self._take(self._text[self._checked], self._checked)
            self._checked += not self.broken
        arguments = self._new_arguments()
        if not self.broken:
            return arguments, ""
        return arguments, self._text[self._checked if self.name is not None else 0 :]

    def end(self) -> str:
        """The text of content left at the block's end: all of it where no call ever began."""
        return self._text if self.name is None and not self.broken else ""

    def _new_arguments(self) -> str:
        if self._called is None or self._arguments_start is None:
            return ""
        self.name = self._called
        self.complete = self._arguments_end is not None
        start = max(self._handed_out, self._arguments_start)
        self._handed_out = self._checked if self._arguments_end is None else self._arguments_end
        return self._text[start : self._handed_out]

    def _take(self, character: str, position: int) -> bool:
        depth, state = self._json.depth, self._json.state
        if not self._json.feed(character):
            return False
        if depth == 0:
            return self._json.depth == 1 or state is JsonState.DONE or character in " \t\n\r"
        if depth == 1:
            return self._at_top(character, position, state)
        if depth == 2 and self._json.depth == 1 and self._key == "arguments":
            self._arguments_end = position + 1
        return True

    def _at_top(self, character: str, position: int, state: JsonState) -> bool:
        """Follow the block's own object: its keys and where their values begin and end."""
        after = self._json.state
        if state in (JsonState.KEY, JsonState.KEY_OR_END) and after is JsonState.STRING:
            self._value_start = position
        elif state is JsonState.VALUE and after is not JsonState.VALUE:
            return self._begin_value(character, position)
        elif state is JsonState.STRING and after is JsonState.COLON:
            return self._end_key(position)
        elif state is JsonState.STRING and after is JsonState.COMMA_OR_END:
            return self._end_string(position)
        return True

    def _begin_value(self, character: str, position: int) -> bool:
        self._value_start = position
        if self._key == "arguments" and character == "{":
            self._arguments_start = position
        if self._key == "arguments":
            return character == "{"
        return self._key != "name" or character == '"'

    def _end_key(self, position: int) -> bool:
        self._key = json.loads(self._text[self._value_start : position + 1])
        assert self._key is not None
        repeated = self._key in self._found
        self._found.add(self._key)
        return not repeated

    def _end_string(self, position: int) -> bool:
        if self._key != "name":
            return True
        name = json.loads(self._text[self._value_start : position + 1])
        # JSON can spell half a surrogate pair, which no answer can be encoded with; such a
        # name, or one with a line end, is no function's.
        if not name or not name.isprintable():
            return False
        self._called = name
        return True
