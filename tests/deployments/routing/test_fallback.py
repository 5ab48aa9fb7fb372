"""A request that left the model to us falls back to the other one; a named model never does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.ingress import create_app
from inference_pio.workers.engine import Engine
from inference_pio.workers.model_source import resolve_model

CHAT, COMPLETE = "/v1/chat/completions", "/v1/completions"
HARD = "Prove that x^2 + y^2 = 4 has how many integer solutions, and explain why: 1 + 3 = 4?"
EASY = "hi"
SMALL, LARGE = "small-hybrid", "large-instruct"


def models(folder: Path, **large: Any) -> dict[str, Any]:
    """A hybrid and one that never thinks, with one place in each pool."""
    own = {"modes": ["non_thinking"], "max_in_flight": 1, **large}
    return {
        "pools": [
            {"name": "small", "served_model_name": SMALL, "max_in_flight": 1},
            {"name": "large", "model": str(folder), "served_model_name": LARGE, **own},
        ],
        "routing": {"auto_models": [SMALL, LARGE], "large_from": 0.5},
    }


def ask(text: str, model: str = "auto", **fields: Any) -> dict[str, Any]:
    message = {"role": "user", "content": text}
    return {"model": model, "messages": [message], "max_tokens": 4, **fields}


def served(answer: httpx.Response) -> tuple[str, str]:
    """The pool and the reason, as the header says them; the body's model must be the pool's."""
    assert answer.status_code == 200, answer.text
    header = answer.headers["x-inference-pio-route"]
    found = dict(part.split("=", 1) for part in header.split("; "))
    if answer.headers["content-type"] == "application/json":
        assert answer.json()["model"] == {"small": SMALL, "large": LARGE}[found["pool"]]
    return found["pool"], found["reason"]


async def running(service: EngineService, wanted: int) -> None:
    async with asyncio.timeout(10):
        while (await service.stats(replica_id=service.replica_id)).running != wanted:
            await asyncio.sleep(0.005)


@asynccontextmanager
async def full(
    client: httpx.AsyncClient, services: dict[str, EngineService], *pools: str
) -> AsyncIterator[None]:
    """The only place of each pool is taken for the block."""
    endless = {"max_tokens": 4000, "ignore_eos": True, "temperature": 1.0}
    names = {"small": SMALL, "large": LARGE}
    tasks = [
        asyncio.create_task(client.post(CHAT, json=ask(EASY, names[pool], **endless)))
        for pool in pools
    ]
    await asyncio.gather(*(running(services[pool], 1) for pool in pools))
    yield
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    await asyncio.gather(*(running(services[pool], 0) for pool in pools))


@pytest.mark.parametrize("stream", [False, True])
def test_a_full_pool_hands_over_to_the_other_model(
    in_process_pools: Any, never_thinks: Path, stream: bool
) -> None:
    async def main() -> None:
        async with in_process_pools(**models(never_thinks)) as (client, services):

            async def post(text: str, model: str = "auto", **fields: Any) -> httpx.Response:
                return await client.post(CHAT, json=ask(text, model, stream=stream, **fields))

            assert served(await post(HARD)) == ("large", "model_auto:large,model:never_thinks")
            async with full(client, services, "large"):
                reason = "fallback:full,model_auto:small,default:template"
                assert served(await post(HARD)) == ("small", reason)
                raw = {"model": "auto", "prompt": HARD, "max_tokens": 2, "stream": stream}
                assert served(await client.post(COMPLETE, json=raw)) == ("small", reason)
                named = await post(HARD, LARGE)
                assert (named.status_code, named.headers["retry-after"]) == (503, "1")
                assert named.json()["error"]["code"] == "overloaded"
            async with full(client, services, "small"):
                reason = "fallback:full,model_auto:large,model:never_thinks"
                assert served(await post(EASY)) == ("large", reason)
                # Only the small one can think: the wish stands above the wish for an answer.
                wished = await post(EASY, enable_thinking=True)
                assert wished.json()["error"]["code"] == "overloaded"
                answered = await post(EASY, enable_thinking=False)
                assert served(answered)[0] == "large"
            async with full(client, services, "small", "large"):
                refused = await post(HARD)
                assert refused.status_code == 503
                assert "small (1 of 1), large (1 of 1)" in refused.json()["error"]["message"]
            assert served(await post(HARD))[1] == "model_auto:large,model:never_thinks"
            text = (await client.get("/metrics")).text
            for pool in ("small", "large"):
                assert f'pool_requests_in_flight{{pool="{pool}"}} 0.0' in text
            counted = (
                'inference_pio_routes_total{mode="thinking",model_name="small-hybrid",'
                'pool="small",reason="fallback:full,model_auto:small,default:template"} 2.0'
            )
            assert f"\n{counted}\n" in text

    asyncio.run(main())


def test_a_pool_without_a_replica_hands_over_at_once(
    in_process_pools: Any, never_thinks: Path
) -> None:
    async def main() -> None:
        async with in_process_pools(**models(never_thinks)) as (client, services):
            services["large"].stop()
            reason = "fallback:unavailable,model_auto:small,default:template"
            assert served(await client.post(CHAT, json=ask(HARD))) == ("small", reason)
            named = await client.post(CHAT, json=ask(HARD, LARGE))
            assert named.json()["error"]["code"] == "engine_unavailable"
            async with full(client, services, "small"):
                # Nobody else could: it waits for the one whose replica may come back.
                lost = await client.post(CHAT, json=ask(HARD))
                assert lost.json()["error"]["code"] == "engine_unavailable"
            text = (await client.get("/metrics")).text
            assert 'inference_pio_refusals_total{reason="engine_unavailable"} 2.0' in text
            assert 'pool="large",reason=' not in text, "it has served nothing"

    asyncio.run(main())


def test_of_one_models_pools_one_with_a_replica_serves(in_process_pools: Any) -> None:
    pools = [{"name": "one"}, {"name": "two", "max_in_flight": 2}]

    async def main() -> None:
        async with in_process_pools(pools=pools) as (client, services):
            body = {"prompt": [5, 6], "max_tokens": 2}
            for stopped, pool in ((None, "one"), ("one", "two")):
                if stopped is not None:
                    services[stopped].stop()
                answer = await client.post(COMPLETE, json=body)
                assert f"pool={pool};" in answer.headers["x-inference-pio-route"]

    asyncio.run(main())


class NotKnownDead(EngineService):
    """A real engine; its router has not heard of its death."""

    def has_replica(self) -> bool:
        return True


@asynccontextmanager
async def application(folder: Path, **large: Any) -> AsyncIterator[tuple[Any, dict[str, Any]]]:
    engine = {"model": "embedded", "block_size": 16, "kv_cache_bytes": 2**24, "num_threads": 1}
    sections = {"engine": engine, "api": {"max_prompts": 1}}
    config = load_config({**sections, **models(folder, **large)})
    async with AsyncExitStack() as stack:
        services = {}
        for pool in config.serving_pools:
            own = config.engine_of(pool)
            service = NotKnownDead(Engine(own), pool.name, str(resolve_model(own.model)))
            service.start()
            stack.callback(service.stop)
            services[pool.name] = service
        transport = httpx.ASGITransport(await create_app(config, services))
        client = httpx.AsyncClient(transport=transport, base_url="http://test")
        yield await stack.enter_async_context(client), services


@pytest.mark.parametrize("stream", [False, True])
def test_a_submission_that_fails_falls_back_before_anything_is_told(
    never_thinks: Path, stream: bool
) -> None:
    async def main() -> None:
        async with application(never_thinks) as (client, services):
            services["large"].stop()
            body = ask(HARD, stream=stream)
            reason = "fallback:unavailable,model_auto:small,default:template"
            assert served(await client.post(CHAT, json=body)) == ("small", reason)
            wrong = await client.post(CHAT, json={**body, "temperature": -1})
            assert wrong.status_code == 400
            text = (await client.get("/metrics")).text
            for pool in ("small", "large"):
                assert f'pool_requests_in_flight{{pool="{pool}"}} 0.0' in text
            assert text.count("\ninference_pio_routes_total{") == 1

    asyncio.run(main())


def test_a_full_queue_of_the_engine_counts_as_full(never_thinks: Path) -> None:
    few = {"max_num_seqs": 1, "max_waiting": 1}

    async def main() -> None:
        large = {"max_in_flight": 9, "engine": few}
        async with application(never_thinks, **large) as (client, services):
            endless = ask(EASY, LARGE, max_tokens=4000, ignore_eos=True)
            tasks = [asyncio.create_task(client.post(CHAT, json=endless))]
            await running(services["large"], 1)
            tasks.append(asyncio.create_task(client.post(CHAT, json=endless)))
            async with asyncio.timeout(10):
                while (await services["large"].stats(replica_id="large")).waiting == 0:
                    await asyncio.sleep(0.005)
            named = await client.post(CHAT, json=ask(HARD, LARGE))
            assert named.json()["error"]["code"] == "queue_full"
            pool, reason = served(await client.post(CHAT, json=ask(HARD)))
            assert (pool, reason.split(",")[0]) == ("small", "fallback:full")
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    asyncio.run(main())
