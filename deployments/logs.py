"""Logs: JSON lines on standard error, each with the request's id, never with what people wrote.

Prompts, messages and generated text are dropped from every event unless the level is ``debug``,
so a call site cannot leak them by carelessness.
"""

from __future__ import annotations

import sys
from typing import Literal, cast

import orjson
import structlog
from structlog.typing import EventDict, FilteringBoundLogger, WrappedLogger

Level = Literal["debug", "info", "warning", "error"]

PRIVATE_KEYS = frozenset(
    {
        "prompt",
        "prompts",
        "messages",
        "input",
        "content",
        "reasoning",
        "reasoning_content",
        "text",
        "token_ids",
        "prompt_token_ids",
        "arguments",
        "body",
    }
)
"""Keys under which an event may carry what a user or the model wrote."""

_LEVELS: dict[Level, int] = {"debug": 10, "info": 20, "warning": 30, "error": 40}


def configure(level: Level = "info") -> None:
    """Set up the logs of this process; a second call replaces the first.

    Raises ``ValueError`` for a level that does not exist.
    """
    if level not in _LEVELS:
        raise ValueError(f"log level is {level!r}; it is one of {', '.join(_LEVELS)}")
    processors: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    if level != "debug":
        processors.append(_drop_private)
    processors.append(structlog.processors.JSONRenderer(serializer=_to_json))
    structlog.configure(
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(_LEVELS[level]),
        logger_factory=_stderr_logger,
        cache_logger_on_first_use=False,
    )


def get_logger(name: str) -> FilteringBoundLogger:
    """A logger whose lines carry ``component: name``; configures the process if nothing has yet."""
    if not structlog.is_configured():
        configure()
    return cast(FilteringBoundLogger, structlog.get_logger(component=name))


def bind_request(request_id: str) -> None:
    """Put ``request_id`` on every line that the current task logs from here on."""
    structlog.contextvars.clear_contextvars()
    structlog.contextvars.bind_contextvars(request_id=request_id)


def _stderr_logger(*_args: object) -> structlog.WriteLogger:
    # Looked up at each use: a test, or Ray's worker start, may have replaced the stream.
    return structlog.WriteLogger(sys.stderr)


def _drop_private(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    return {key: value for key, value in event.items() if key not in PRIVATE_KEYS}


def _to_json(event: object, **_options: object) -> str:
    return orjson.dumps(event, default=repr).decode()
