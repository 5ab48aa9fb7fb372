"""The checkpoint's tokenizer: text to ids and back, with control tokens only where asked for.

Text is encoded by a tokenizer that knows no control tokens, so ``<|im_start|>`` in a user's text
stays text. Where control tokens are wanted, the text is cut at them first and the pieces between
are encoded, which gives the same ids as the full tokenizer.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import tokenizers

from ..types import RequestError
from .errors import TextFilesError
from .token_files import read_token_files
from .unicode import refuse_surrogates

STOP_TEXT = (
    "Considering the limited time by the user, I have to give the solution based on the thinking "
    "directly now."
)
"""What Qwen writes into a thought whose budget is spent (Qwen3 technical report, section 4.3)."""

# How far from the cut BPE may still change its mind about a prefix of a text, in tokens. Merges
# reach no farther than a few of the longest tokens; one of those is 128 characters in Qwen3.
_PREFIX_SLACK = 512

# The library's regex engine panics after ten million steps back within one match, and Qwen's
# pattern takes one for each character of a run of whitespace. A million takes a second.
_MAX_WHITESPACE_RUN = 2**20
_WHITESPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class TagIds:
    """Token ids the phase machine works with; ``None`` or empty where the tokenizer has no such.

    ``whitespace`` holds every token of whitespace alone. ``stop_text_ids`` ends a thought that has
    to end; it holds ``</think>`` as its control id and is empty without one.
    """

    think_open: int | None
    think_close: int | None
    tool_open: int | None
    tool_close: int | None
    whitespace: frozenset[int]
    stop_text_ids: tuple[int, ...]
    eos: int | None


class Tokenizer:
    """A byte-level BPE tokenizer. Immutable after loading, safe to share between threads."""

    def __init__(
        self,
        plain: tokenizers.Tokenizer,
        token_bytes: Sequence[bytes],
        control: dict[str, int],
        special: frozenset[int],
        eos: int | None,
    ) -> None:
        self._plain = plain
        self._bytes = tuple(token_bytes)
        self._visible = tuple(
            b"" if token in special else data for token, data in enumerate(self._bytes)
        )
        self.control = control
        self.special_ids = special
        self.eos = eos
        self.num_tokens = len(self._bytes)
        self.longest_token_bytes = max(map(len, self._bytes))
        self._control_pattern = re.compile(f"({_alternation(control)})")
        self._control_start = re.compile(f"(?=(?:{_alternation(control)})).", re.DOTALL)
        self.tags = self._find_tags()

    @classmethod
    def load(cls, folder: Path) -> Tokenizer:
        """Load the tokenizer of a checkpoint folder.

        Raises ``TextFilesError`` where files are missing, broken or not byte-level BPE.
        """
        files = read_token_files(folder)
        try:
            # The library raises a bare Exception for a document it cannot use.
            plain = tokenizers.Tokenizer.from_str(files.plain_json)
        except Exception as error:
            raise TextFilesError(f"{folder / 'tokenizer.json'}: {error}") from error
        table = _byte_table(files.vocab, files.control, folder)
        eos = files.control.get(files.eos_token) if files.eos_token is not None else None
        return cls(plain, table, files.control, files.special, eos)

    def encode(
        self,
        text: str,
        *,
        parse_special: bool = False,
        max_tokens: int | None = None,
        param: str = "prompt",
    ) -> list[int]:
        """Token ids of ``text``; control tokens in it count as such only with ``parse_special``.

        Raises ``RequestError`` for lone surrogates and for more than ``max_tokens`` tokens; the
        time spent on too long a text depends on ``max_tokens`` and not on the text's length.
        """
        refuse_surrogates(text, param)
        pieces = self.split_control(text) if parse_special else [text]
        return self.encode_pieces(pieces, max_tokens=max_tokens, param=param)

    def encode_pieces(
        self, pieces: Iterable[str | int], *, max_tokens: int | None, param: str
    ) -> list[int]:
        """Ids of plain texts with control ids between them; errors as in ``encode``."""
        ids: list[int] = []
        for piece in pieces:
            if isinstance(piece, int):
                ids.append(piece)
            elif piece:
                room = None if max_tokens is None else max_tokens - len(ids)
                ids += self._encode_plain(piece, room, max_tokens, param)
            if max_tokens is not None and len(ids) > max_tokens:
                raise _too_long(max_tokens, param)
        return ids

    def split_control(self, text: str) -> list[str | int]:
        """Cut ``text`` at control tokens: plain texts, and ids where a control token stood."""
        parts = self._control_pattern.split(text)
        return [
            self.control[part] if number % 2 else part
            for number, part in enumerate(parts)
            if part or number % 2
        ]

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of ``ids``; bytes that are no UTF-8 become U+FFFD."""
        return self.decode_bytes(ids, skip_special=skip_special).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int], *, skip_special: bool = True) -> bytes:
        """The bytes of ``ids``, joined. Raises ``RequestError`` for an id that is no token."""
        table = self._visible if skip_special else self._bytes
        return b"".join(table[self._checked(token)] for token in ids)

    def token_bytes(self, token: int) -> bytes:
        """The bytes one token stands for; a control token's are its text."""
        return self._bytes[self._checked(token)]

    def break_control(self, text: str, mark: str) -> str:
        """Put ``mark`` behind the first character of every control token spelled in ``text``."""
        return self._control_start.sub(lambda found: found[0] + mark, text)

    def _checked(self, token: int) -> int:
        if not 0 <= token < self.num_tokens:
            raise RequestError(
                f"token id {token} is outside the vocabulary of {self.num_tokens} tokens",
                param="token_ids",
            )
        return token

    def _encode_plain(
        self, text: str, room: int | None, max_tokens: int | None, param: str
    ) -> list[int]:
        _refuse_whitespace_run(text, param)
        if room is not None and max_tokens is not None:
            # A text that is far too long is known to be so from its beginning.
            length = 2 * (room + _PREFIX_SLACK)
            while length < len(text):
                found = len(self._plain.encode(text[:length], add_special_tokens=False).ids)
                if found > room + _PREFIX_SLACK:
                    raise _too_long(max_tokens, param)
                length *= 4
        return self._plain.encode(text, add_special_tokens=False).ids

    def _find_tags(self) -> TagIds:
        close = self.control.get("</think>")
        return TagIds(
            think_open=self.control.get("<think>"),
            think_close=close,
            tool_open=self.control.get("<tool_call>"),
            tool_close=self.control.get("</tool_call>"),
            whitespace=frozenset(
                token for token, data in enumerate(self._bytes) if data and data.isspace()
            ),
            stop_text_ids=self._closing(f"\n\n{STOP_TEXT}\n", close),
            eos=self.eos,
        )

    def _closing(self, words: str, close: int | None) -> tuple[int, ...]:
        if close is None:
            return ()
        return (*self.encode(words), close, *self.encode("\n\n"))


def _alternation(control: dict[str, int]) -> str:
    longest_first = sorted(control, key=len, reverse=True)
    return "|".join(map(re.escape, longest_first)) or "(?!)"  # without any, match nothing


def _refuse_whitespace_run(text: str, param: str) -> None:
    if len(text) <= _MAX_WHITESPACE_RUN:
        return
    longest = max((len(run[0]) for run in _WHITESPACE.finditer(text)), default=0)
    if longest > _MAX_WHITESPACE_RUN:
        raise RequestError(
            f"{param} holds {longest} whitespace characters in a row; at most "
            f"{_MAX_WHITESPACE_RUN} are taken",
            param=param,
        )


def _too_long(max_tokens: int, param: str) -> RequestError:
    return RequestError(
        f"{param} is longer than the {max_tokens} tokens that fit",
        param=param,
        code="context_length_exceeded",
    )


def _byte_table(vocab: dict[str, int], control: dict[str, int], folder: Path) -> list[bytes]:
    """Bytes of every token id; control tokens last, for they may repeat ids of the vocabulary."""
    bytes_of = _spelling()
    table: dict[int, bytes] = {}
    for name, number in vocab.items():
        try:
            table[number] = bytes(bytes_of[character] for character in name)
        except KeyError as error:
            raise TextFilesError(
                f"{folder / 'tokenizer.json'}: token {number} is spelled with {error}, which "
                "byte-level BPE does not use"
            ) from None
    for name, number in control.items():
        table[number] = name.encode("utf-8")
    missing = next((number for number in range(len(table)) if number not in table), None)
    if missing is not None:
        raise TextFilesError(
            f"{folder / 'tokenizer.json'}: ids go up to {max(table)}, yet none is {missing}; "
            "token ids must be gapless"
        )
    return [table[number] for number in range(len(table))]


def _spelling() -> dict[str, int]:
    """The byte each character of byte-level BPE stands for (GPT-2's table).

    Printable Latin-1 stands for itself; the other bytes, in order, for U+0100 and on.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(0x100 + number): byte for number, byte in enumerate(others)})
    return table
