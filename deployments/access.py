"""Counts every HTTP answer by route and status."""

from __future__ import annotations

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .metrics import Metrics

# Paths as metric labels: a fixed set, so that clients cannot grow the number of time series.
KNOWN = frozenset(
    {
        "/v1/chat/completions",
        "/v1/completions",
        "/v1/models",
        "/tokenize",
        "/detokenize",
        "/health",
        "/version",
        "/metrics",
        "/openapi.json",
    }
)


class AccessMiddleware:
    """Adds one to ``inference_pio_http_requests_total`` when an answer starts."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        route = scope["path"] if scope["path"] in KNOWN else "other"

        async def counting_send(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.http_requests.labels(route, message["status"]).inc()
            await send(message)

        await self._app(scope, receive, counting_send)
