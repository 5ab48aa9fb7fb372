"""Clients that leave, over real HTTP without a proxy between."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import uvicorn

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.ingress import create_app
from inference_pio.workers.engine import Engine
from inference_pio.workers.model_source import resolve_model

ENGINE = {"model": "embedded", "block_size": 16, "kv_cache_bytes": 32 * 2**20, "num_threads": 1}
ENDLESS: dict[str, Any] = {
    "messages": [{"role": "user", "content": "hi"}],
    "ignore_eos": True,
    "max_tokens": 4000,
    "temperature": 1.0,
}
CHAT = "/v1/chat/completions"


@asynccontextmanager
async def served(**api: Any) -> AsyncIterator[tuple[str, EngineService]]:
    config = load_config({"engine": ENGINE, "api": api})
    engine = Engine(config.engine)
    service = EngineService(engine, "replica", str(resolve_model("embedded")))
    service.start()
    listener = socket.create_server(("127.0.0.1", 0))
    app = await create_app(config, {"engine": service})
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    running = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", service
    finally:
        server.should_exit = True
        await running
        service.stop()
        engine.check_integrity()


async def running(service: EngineService, wanted: int) -> None:
    """Wait until so many sequences run: far shorter than any of them would last by itself."""
    async with asyncio.timeout(5):
        while (await service.stats(replica_id="replica")).running != wanted:
            await asyncio.sleep(0.005)


async def steps(service: EngineService) -> int:
    return (await service.stats(replica_id="replica")).steps


def test_leaving_a_whole_answer_stops_it() -> None:
    async def main() -> None:
        async with served() as (url, service), httpx.AsyncClient(base_url=url) as client:
            for _ in range(3):
                ask = asyncio.create_task(client.post(CHAT, json={**ENDLESS, "n": 2}))
                await running(service, 2)
                ask.cancel()
                await asyncio.gather(ask, return_exceptions=True)
                await running(service, 0)
            assert await steps(service) < 4000
            text = (await client.get("/metrics")).text
            assert "inference_pio_clients_left_total 3.0" in text
            assert "inference_pio_requests_in_flight 0.0" in text

    asyncio.run(main())


def test_leaving_a_stream_stops_it() -> None:
    async def main() -> None:
        async with served() as (url, service), httpx.AsyncClient(base_url=url) as client:
            for _ in range(3):
                async with client.stream("POST", CHAT, json={**ENDLESS, "stream": True}) as answer:
                    await anext(answer.aiter_lines())
                    await running(service, 1)
                await running(service, 0)
            assert await steps(service) < 4000

    asyncio.run(main())


def test_a_stream_that_is_not_read_is_cut() -> None:
    # Twenty alternatives a token fill the sockets' buffers soon; then ours fills.
    asked = {**ENDLESS, "stream": True, "n": 4, "logprobs": True, "top_logprobs": 20}

    async def main() -> None:
        async with served(max_buffered_tokens=64) as (url, service):
            place = httpx.URL(url)
            with socket.create_connection((place.host, place.port)) as lazy:
                body = httpx.Request("POST", url, json=asked).read()
                head = (
                    f"POST {CHAT} HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
                    f"content-length: {len(body)}\r\n\r\n"
                )
                lazy.sendall(head.encode() + body)
                await running(service, 4)
                async with asyncio.timeout(60):
                    while (await service.stats(replica_id="replica")).running:
                        await asyncio.sleep(0.02)
            finished = (await service.stats(replica_id="replica")).requests_finished
            assert finished == {"abort": 4}

    asyncio.run(main())
