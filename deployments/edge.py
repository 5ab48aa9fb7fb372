"""The outermost layer of HTTP: one clean request id, bounded headers.

Ray Serve echoes ``X-Request-Id`` as it came and acts on headers of its own, so ``build`` also puts
this layer around Serve's handling (``RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH``).
"""

from __future__ import annotations

import re
import uuid

from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .api.errors import ApiError

CALLBACK_IMPORT_PATH = "inference_pio.deployments.edge:middlewares"
MAX_HEADER_BYTES = 64 * 2**10

_REQUEST_ID = re.compile(rb"[A-Za-z0-9_-]{1,64}")
SESSION_HEADER = b"x-session-id"
PASSED_SESSION_HEADER = b"x-inference-pio-session"
"""Under this name a client's session reaches the ingress: the other one would steer Serve."""
# Headers by which a client could steer Serve itself: its time limit, its disconnect handling,
# and the replica that a request goes to.
_SERVE_HEADERS = frozenset(
    {
        b"x-request-timeout-seconds",
        b"x-request-disconnect-disabled",
        b"serve-multiplexed-model-id",
        b"serve_multiplexed_model_id",
        SESSION_HEADER,
    }
)


class EdgeMiddleware:
    """Replaces a request id that is not ``[A-Za-z0-9_-]{1,64}``; answers too large headers 431."""

    def __init__(self, app: ASGIApp, max_header_bytes: int = MAX_HEADER_BYTES) -> None:
        self._app = app
        self._max_header_bytes = max_header_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        kept = [h for h in headers if h[0] != b"x-request-id" and h[0] not in _SERVE_HEADERS]
        own_header = (b"x-request-id", _clean_id(headers))
        sessions = [(PASSED_SESSION_HEADER, h[1]) for h in headers if h[0] == SESSION_HEADER]
        scope = {**scope, "headers": [*kept, *sessions, own_header]}

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                others = [h for h in message["headers"] if h[0].lower() != b"x-request-id"]
                message = {**message, "headers": [*others, own_header]}
            await send(message)

        if sum(len(name) + len(value) for name, value in headers) > self._max_header_bytes:
            error = ApiError(
                431,
                f"the headers are larger than {self._max_header_bytes} bytes",
                code="headers_too_large",
                headers={"Connection": "close"},
            )
            await error.response()(scope, receive, send_with_id)
        else:
            await self._app(scope, receive, send_with_id)


def middlewares() -> list[Middleware]:
    """What Serve wraps around its own handling of every request."""
    return [Middleware(EdgeMiddleware)]


def _clean_id(headers: list[tuple[bytes, bytes]]) -> bytes:
    given = [value for name, value in headers if name == b"x-request-id"]
    if len(given) == 1 and _REQUEST_ID.fullmatch(given[0]):
        return given[0]
    return uuid.uuid4().hex.encode("ascii")
