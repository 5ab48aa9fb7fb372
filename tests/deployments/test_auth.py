from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import httpx
import pytest

KEYS = ("correct-horse-1", "battery-staple-2")
ROUTES = (
    "/",
    "/v1/models",
    "/v1/models/embedded",
    "/v1/chat/completions",
    "/v1/completions",
    "/tokenize",
    "/detokenize",
    "/version",
    "/metrics",
    "/openapi.json",
    "/nowhere",
    "/health/",
    "/HEALTH",
    "/health%2f",
    "/health/../metrics",
    "//health",
    "/health;a=b",
    "/health%00",
)


@pytest.fixture
def keys_file(tmp_path: Path) -> str:
    file = tmp_path / "keys"
    file.write_text("\n".join(KEYS))
    return str(file)


def check(in_process: Any, keys_file: str, work: Any) -> None:
    async def main() -> None:
        async with in_process(api={"keys_file": keys_file}) as (client, _):
            await work(client)

    asyncio.run(main())


def test_every_route_is_denied_without_a_key_but_health(in_process: Any, keys_file: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for route in ROUTES:
            for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "TRACE", "GETX"):
                url = httpx.URL("http://test").copy_with(raw_path=route.encode())
                answer = await client.request(method, url, headers={"host": "localhost"})
                assert answer.status_code == 401, (method, route)
                assert answer.headers["www-authenticate"] == "Bearer"
                if method != "HEAD":
                    assert answer.json()["error"]["code"] == "invalid_api_key"
        assert (await client.get("/health")).status_code == 200

    check(in_process, keys_file, work)


def test_each_key_opens_and_no_other_does(in_process: Any, keys_file: str) -> None:
    async def work(client: httpx.AsyncClient) -> None:
        for key in KEYS:
            for headers in ({"authorization": f"Bearer {key}"}, {"x-api-key": key}):
                assert (await client.get("/v1/models", headers=headers)).status_code == 200
        for value in (
            "",
            "Bearer",
            "Bearer ",
            f"Basic {KEYS[0]}",
            f"Bearer {KEYS[0]}x",
            f"Bearer {KEYS[0][:-1]}",
            f"Bearer {KEYS[0].upper()}",
            f"Bearer {','.join(KEYS)}",
            "Bearer \u00e9",
        ):
            answer = await client.get("/v1/models", headers={b"authorization": value.encode()})
            assert answer.status_code == 401, value

    check(in_process, keys_file, work)
