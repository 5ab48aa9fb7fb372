"""From tokens and their kinds to pieces of text, with stop strings cut out.

Both sides of the wire use it: the engine to see that a stop string ended an answer, the reader to
cut the same text at the same character.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..types import TokenKind
from .detokenizer import Detokenizer
from .stops import StopMatcher
from .tokenizer import Tokenizer


@dataclass(frozen=True, slots=True)
class Piece:
    """Some text of one kind. ``tag`` is the token id of a whole tag."""

    kind: TokenKind
    text: str
    tag: int | None = None


class PieceStream:
    """Turns one sequence's tokens into pieces; what may become a stop string is held back.

    Stop strings are looked for in runs of content, or with ``everywhere`` in the whole output
    with its tags; one that is complete within the first ``min_tokens`` tokens is passed over.
    After a match (``matched``) no more text comes.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: tuple[str, ...] = (),
        *,
        everywhere: bool = False,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        self._tokenizer = tokenizer
        self._detokenizer = Detokenizer(tokenizer)
        self._matcher = StopMatcher(stops)
        self._everywhere = everywhere
        self._include_stop = include_stop
        self._tokens_to_pass = min_tokens
        self._kind = TokenKind.CONTENT
        self._held: list[Piece] = []
        self._ready: list[Piece] = []

    @property
    def matched(self) -> str | None:
        """The stop string that ended the text."""
        return self._matcher.matched

    def feed(self, token: int, kind: TokenKind) -> list[Piece]:
        """The pieces that one more token completes."""
        if kind is not self._kind or kind is TokenKind.TAG:
            self._end_run()
            self._kind = kind
        if kind is TokenKind.TAG:
            self._add(Piece(kind, self._tokenizer.decode([token]), token))
        elif kind is not TokenKind.STOP:
            self._add(Piece(kind, self._detokenizer.feed((token,))))
        self._tokens_to_pass -= 1
        return self._take()

    def flush(self) -> list[Piece]:
        """What is left at the end of the output."""
        self._end_run()
        self._release()
        return self._take()

    def _end_run(self) -> None:
        self._add(Piece(self._kind, self._detokenizer.flush()))
        if not self._everywhere:
            self._release()

    def _add(self, piece: Piece) -> None:
        if not piece.text or self.matched is not None:
            return
        if not self._everywhere and piece.kind is not TokenKind.CONTENT:
            self._ready.append(piece)
            return
        self._held.append(piece)
        before = sum(len(held.text) for held in self._held[:-1])
        end = self._matcher.feed(piece.text, may_stop=self._tokens_to_pass <= 0)
        if self.matched is None or end is None:
            self._pass_on(before + len(piece.text) - self._matcher.held)
            return
        self._cut(before + end - (0 if self._include_stop else len(self.matched)))

    def _pass_on(self, length: int) -> None:
        """Move up to ``length`` characters from what is held to what is ready."""
        while self._held and length >= len(self._held[0].text):
            piece = self._held.pop(0)
            self._ready.append(piece)
            length -= len(piece.text)
        # A tag is one thing: it goes when all of it may go.
        if length > 0 and self._held[0].kind is not TokenKind.TAG:
            piece = self._held[0]
            self._ready.append(Piece(piece.kind, piece.text[:length]))
            self._held[0] = Piece(piece.kind, piece.text[length:])

    def _cut(self, length: int) -> None:
        """End the text ``length`` characters into what is held."""
        for piece in self._held:
            if length <= 0:
                break
            whole = len(piece.text) <= length
            self._ready.append(piece if whole else Piece(piece.kind, piece.text[:length]))
            length -= len(piece.text)
        self._held.clear()

    def _release(self) -> None:
        self._ready += self._held
        self._held.clear()
        self._matcher.reset()

    def _take(self) -> list[Piece]:
        ready, self._ready = self._ready, []
        return ready
