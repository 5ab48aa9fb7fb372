"""A strict JSON checker that takes one character at a time.

It knows after every character whether the text so far can still become valid JSON (RFC 8259).
"""

from __future__ import annotations

from enum import Enum, auto

MAX_DEPTH = 64


class JsonState(Enum):
    """What the checker expects next."""

    VALUE = auto()
    VALUE_OR_END = auto()  # behind "["
    KEY_OR_END = auto()  # behind "{"
    KEY = auto()  # behind "," in an object
    COLON = auto()
    COMMA_OR_END = auto()
    STRING = auto()
    ESCAPE = auto()
    HEX = auto()
    NUMBER = auto()
    LITERAL = auto()
    DONE = auto()


# A number as an automaton: state -> character class -> state; "0" a zero, "1" another digit.
_NUMBER_STEPS: dict[str, dict[str, str]] = {
    "minus": {"0": "zero", "1": "integer"},
    "zero": {".": "point", "e": "exponent"},
    "integer": {"0": "integer", "1": "integer", ".": "point", "e": "exponent"},
    "point": {"0": "fraction", "1": "fraction"},
    "fraction": {"0": "fraction", "1": "fraction", "e": "exponent"},
    "exponent": {"+": "sign", "-": "sign", "0": "power", "1": "power"},
    "sign": {"0": "power", "1": "power"},
    "power": {"0": "power", "1": "power"},
}
_NUMBER_ENDS = frozenset({"zero", "integer", "fraction", "power"})
_NUMBER_STARTS = {"-": "minus", "0": "zero", **dict.fromkeys("123456789", "integer")}
_CLASSES = {"E": "e", **dict.fromkeys("123456789", "1")}
_LITERALS = {"t": "rue", "f": "alse", "n": "ull"}
_SPACE = " \t\n\r"


class JsonPrefix:
    """One JSON value, character by character. ``depth`` counts the objects and arrays open."""

    def __init__(self) -> None:
        self.state = JsonState.VALUE
        self._open: list[str] = []
        self._is_key = False
        self._number = ""
        self._left = ""  # of a literal
        self._hex_left = 0

    @property
    def depth(self) -> int:
        return len(self._open)

    def feed(self, character: str) -> bool:
        """Take one character; False where the text can no longer become valid JSON."""
        state = self.state
        if state is JsonState.STRING:
            return self._in_string(character)
        if state is JsonState.NUMBER:
            return self._in_number(character)
        if state is JsonState.ESCAPE or state is JsonState.HEX:
            return self._in_escape(character)
        if state is JsonState.LITERAL:
            return self._in_literal(character)
        if character in _SPACE:
            return True
        if state is JsonState.COLON:
            self.state = JsonState.VALUE
            return character == ":"
        if state is JsonState.COMMA_OR_END:
            return self._comma_or_end(character)
        if state is JsonState.KEY or state is JsonState.KEY_OR_END:
            return self._key(character)
        if state is JsonState.DONE:
            return False
        return self._value(character)

    def _value(self, character: str) -> bool:
        if character == "]" and self.state is JsonState.VALUE_OR_END:
            return self._close("[")
        if character in "{[":
            self._open.append(character)
            self.state = JsonState.KEY_OR_END if character == "{" else JsonState.VALUE_OR_END
            return len(self._open) <= MAX_DEPTH
        if character == '"':
            self._is_key = False
            self.state = JsonState.STRING
            return True
        if character in _NUMBER_STARTS:
            self._number = _NUMBER_STARTS[character]
            self.state = JsonState.NUMBER
            return True
        if character in _LITERALS:
            self._left = _LITERALS[character]
            self.state = JsonState.LITERAL
            return True
        return False

    def _key(self, character: str) -> bool:
        if character == "}" and self.state is JsonState.KEY_OR_END:
            return self._close("{")
        self._is_key = True
        self.state = JsonState.STRING
        return character == '"'

    def _comma_or_end(self, character: str) -> bool:
        if character == ",":
            self.state = JsonState.KEY if self._open[-1] == "{" else JsonState.VALUE
            return True
        return self._close({"}": "{", "]": "["}.get(character, ""))

    def _close(self, opened: str) -> bool:
        if self._open[-1] != opened:
            return False
        self._open.pop()
        self._end_value()
        return True

    def _end_value(self) -> None:
        self.state = JsonState.COMMA_OR_END if self._open else JsonState.DONE

    def _in_string(self, character: str) -> bool:
        if character == '"':
            if self._is_key:
                self.state = JsonState.COLON
            else:
                self._end_value()
        elif character == "\\":
            self.state = JsonState.ESCAPE
        return character >= " "

    def _in_escape(self, character: str) -> bool:
        if self.state is JsonState.HEX:
            self._hex_left -= 1
            if self._hex_left == 0:
                self.state = JsonState.STRING
            return character in "0123456789abcdefABCDEF"
        if character == "u":
            self._hex_left = 4
            self.state = JsonState.HEX
            return True
        self.state = JsonState.STRING
        return character in '"\\/bfnrt'

    def _in_number(self, character: str) -> bool:
        kind = _CLASSES.get(character, character)
        following = _NUMBER_STEPS[self._number].get(kind)
        if following is not None:
            self._number = following
            return True
        if self._number not in _NUMBER_ENDS:
            return False
        # Only what follows a number ends it, and that is looked at as such.
        self._end_value()
        return self.feed(character)

    def _in_literal(self, character: str) -> bool:
        right = character == self._left[0]
        self._left = self._left[1:]
        if not self._left:
            self._end_value()
        return right
