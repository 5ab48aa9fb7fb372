"""Which talker answers: a server's, or a model loaded here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from .talk import Talker


@contextmanager
def open_talker(url: str | None, model: str, engine: Mapping[str, Any]) -> Iterator[Talker]:
    """A server's talker where ``url`` is given, else one with the model loaded here.

    ``engine`` has keys of ``EngineConfig``.
    """
    if url is not None:
        from .talk_http import HttpTalker

        with HttpTalker(url) as remote:
            yield remote
    else:
        from .talk_local import LocalTalker

        with LocalTalker(model, engine) as local:
            yield local
