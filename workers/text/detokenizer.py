"""Token ids to text, a few at a time, never half a character."""

from __future__ import annotations

import codecs
from collections.abc import Iterable

from .tokenizer import Tokenizer


class Detokenizer:
    """Decodes one stream of tokens. All pieces joined equal ``Tokenizer.decode`` of all ids.

    Bytes that may still become a character are held back until the next tokens or ``flush``;
    bytes that cannot become U+FFFD at once.
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` complete."""
        data = self._tokenizer.decode_bytes(ids, skip_special=self._skip_special)
        return self._decoder.decode(data)

    def flush(self) -> str:
        """What was held back, as U+FFFD; the next ``feed`` begins anew."""
        text = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return text
