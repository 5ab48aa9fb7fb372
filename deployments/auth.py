"""API keys: every route is denied without one, ``/health`` aside."""

from __future__ import annotations

import hmac
from collections.abc import Sequence

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .api.errors import ApiError

OPEN_PATHS = frozenset({"/health"})


def key_matches(given: str, keys: Sequence[str]) -> bool:
    """Compare with every key in constant time, so that timing tells nothing about any of them."""
    candidate = given.encode("utf-8", "surrogateescape")
    found = False
    for key in keys:
        found |= hmac.compare_digest(candidate, key.encode("utf-8"))
    return found


def bearer_token(headers: Headers) -> str:
    """The key a request brings: ``Authorization: Bearer …`` or ``X-Api-Key``; empty if none."""
    scheme, _, token = headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token:
        return token.strip()
    return headers.get("x-api-key", "")


class ApiKeyMiddleware:
    """Refuses with 401 what brings no valid key; the raw path decides, before any routing."""

    def __init__(self, app: ASGIApp, keys: Sequence[str]) -> None:
        self._app = app
        self._keys = tuple(keys)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_open = scope["type"] != "http" or scope["path"] in OPEN_PATHS
        if is_open or key_matches(bearer_token(Headers(scope=scope)), self._keys):
            await self._app(scope, receive, send)
        else:
            error = ApiError(
                401,
                "a valid API key is required: send it as 'Authorization: Bearer <key>'",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
            await error.response()(scope, receive, send)
