"""Bounds on what one caller may cost: body size and time, requests inside at a time."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from starlette.requests import ClientDisconnect, Request

from .api.errors import ApiError
from .config import ApiConfig

DROPPED_BYTES = 32 * 2**20
"""So much of a body that is over the limit is still read, for the sake of its connection."""
_CLOSE = {"Connection": "close"}


def require_json(request: Request) -> None:
    """Refuse with 415 what is not declared as UTF-8 JSON."""
    declared = request.headers.get("content-type", "")
    media, _, parameters = declared.partition(";")
    charset = parameters.strip().lower().removeprefix("charset=").strip('"')
    is_json = media.strip().lower() == "application/json"
    if not is_json or charset not in ("", "utf-8", "utf8"):
        raise ApiError(
            415,
            f"the body is declared as {declared[:100]!r}; application/json in UTF-8 is expected",
            code="unsupported_media_type",
        )


async def read_body(request: Request, config: ApiConfig) -> bytes:
    """Read a body that is bounded in size (413) and in time (408), whatever its headers claim.

    A body somewhat over the limit is read to its end and dropped before it is refused: an answer
    that overtakes the body makes a proxy close the connection, and a client that keeps it open for
    its next request would lose that one.
    """
    limit = config.max_body_bytes
    declared = request.headers.get("content-length", "0")
    if declared.isascii() and declared.isdigit() and int(declared[:20]) > limit + DROPPED_BYTES:
        raise _too_large(limit, ended=False)
    parts: list[bytes] = []
    size = 0
    try:
        async with asyncio.timeout(config.body_timeout_s):
            async for part in request.stream():
                size += len(part)
                if size > limit + DROPPED_BYTES:
                    raise _too_large(limit, ended=False)
                if size <= limit:
                    parts.append(part)
    except TimeoutError:
        raise ApiError(
            408,
            f"the body did not arrive within {config.body_timeout_s:g} s",
            code="body_timeout",
            headers=_CLOSE,
        ) from None
    except ClientDisconnect:
        raise ApiError(400, "the client left before the body ended", code="disconnect") from None
    if size > limit:
        raise _too_large(limit, ended=True)
    return b"".join(parts)


def _too_large(limit: int, *, ended: bool) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes",
        code="body_too_large",
        headers={} if ended else _CLOSE,
    )


class AdmissionGate:
    """Counts the requests inside; entering is one step, so no two requests get the last place."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        self.limit = limit
        self._retry_after_s = retry_after_s
        self._inside = 0

    @property
    def inside(self) -> int:
        """Requests inside now."""
        return self._inside

    @property
    def is_full(self) -> bool:
        """Whether one more would be refused."""
        return self._inside >= self.limit

    def enter(self) -> None:
        """Take a place, to be given back with ``leave``.

        Raises ``ApiError`` 503 with ``Retry-After`` when every place is taken.
        """
        if self.is_full:
            raise self.refusal(f"{self._inside} requests are being served, the limit")
        self._inside += 1

    def leave(self) -> None:
        """Give a place back."""
        assert self._inside > 0
        self._inside -= 1

    @contextmanager
    def admit(self) -> Iterator[None]:
        """Hold one place for the block; raises as ``enter`` does."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    def refusal(self, reason: str) -> ApiError:
        """A 503 that says why and when to come back."""
        return ApiError(
            503,
            f"{reason}; try again later",
            code="overloaded",
            headers={"Retry-After": str(self._retry_after_s)},
        )
