from __future__ import annotations

import asyncio
from typing import Any

import httpx
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from inference_pio.deployments.edge import EdgeMiddleware, middlewares


async def show(request: Request) -> Response:
    return JSONResponse(dict(request.headers))


def ask(app: ASGIApp, headers: Any) -> httpx.Response:
    async def main() -> httpx.Response:
        transport = httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            return await client.get("/", headers=headers)

    return asyncio.run(main())


def app(limit: int = 4096) -> ASGIApp:
    return EdgeMiddleware(Starlette(routes=[Route("/", show)]), limit)


def test_a_good_id_goes_through_and_comes_back() -> None:
    answer = ask(app(), {"x-request-id": "aZ09_-"})
    assert answer.json()["x-request-id"] == answer.headers["x-request-id"] == "aZ09_-"


def test_any_other_id_is_replaced() -> None:
    bad = ["", "a b", "a" * 65, "a\u00e9", "http://a", "a\tb", "a,b"]
    for value in bad:
        answer = ask(app(), {"x-request-id": value.encode("latin-1")})
        assert answer.headers["x-request-id"] != value
        assert len(answer.headers["x-request-id"]) == 32
    twice = ask(app(), [("x-request-id", "one"), ("x-request-id", "two")])
    assert twice.headers["x-request-id"] not in ("one", "two")


def test_headers_that_steer_serve_do_not_pass() -> None:
    answer = ask(app(), {"x-request-timeout-seconds": "0.001", "x-other": "kept"})
    assert "x-request-timeout-seconds" not in answer.json()
    assert answer.json()["x-other"] == "kept"


def test_too_many_bytes_of_headers_are_a_431() -> None:
    assert ask(app(), {"x-big": "a" * 3000}).status_code == 200
    for headers in ({"x-big": "a" * 5000}, {f"x-{n}": "a" * 100 for n in range(50)}):
        answer = ask(app(), headers)
        assert answer.status_code == 431
        assert answer.json()["error"]["code"] == "headers_too_large"


def test_around_a_server_that_echoes_the_id_there_is_one_id() -> None:
    """As Serve does it: it takes the id it is given and adds it to the answer."""

    class Echo:
        def __init__(self, inner: ASGIApp) -> None:
            self.inner = inner

        async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
            given = dict(scope["headers"])[b"x-request-id"]

            async def send_with_id(message: Message) -> None:
                if message["type"] == "http.response.start":
                    message["headers"].append((b"X-Request-ID", given))
                await send(message)

            await self.inner(scope, receive, send_with_id)

    (outer,) = middlewares()
    answer = ask(outer.cls(Echo(app()), *outer.args, **outer.kwargs), {"x-request-id": "a/b"})
    (only,) = answer.headers.get_list("x-request-id")
    assert only == answer.json()["x-request-id"]


def test_a_session_passes_under_another_name_however_often_the_layer_is_there() -> None:
    twice = EdgeMiddleware(app())
    headers = ask(twice, {"x-session-id": "abc"}).json()
    assert headers["x-inference-pio-session"] == "abc"
    assert "x-session-id" not in headers
