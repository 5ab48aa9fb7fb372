"""Which talker answers: a server's, or a model loaded here."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from .talk import Talker


@contextmanager
def open_talker(url: str | None, model: str, dtype: str) -> Iterator[Talker]:
    """A server's talker where ``url`` is given, else one with the model loaded here."""
    if url is not None:
        from .talk_http import HttpTalker

        with HttpTalker(url) as remote:
            yield remote
    else:
        from .talk_local import LocalTalker

        with LocalTalker(model, dtype) as local:
            yield local
