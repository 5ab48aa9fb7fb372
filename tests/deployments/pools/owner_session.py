"""A reader of KV tickets whose owner dies while it reads; prints what it was told as JSON.

Run by ``test_lost_tickets.py`` in a process of its own: a real prefill replica behind Serve, and
this process as the one that pulls from it, so that it can stop reading at the ticket it likes.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import aclosing
from typing import Any

import psutil
import ray
from ray import serve

from inference_pio.deployments.config import load_config
from inference_pio.deployments.kv_transport import Arrival
from inference_pio.deployments.object_store_transport import ObjectStoreTransport
from inference_pio.deployments.prefill_replica import PrefillReplica
from inference_pio.deployments.wire import RouteHints
from inference_pio.workers.types import PrefillRequest

LIMIT_S = 60.0
TOKENS = 2000
ENGINE = {
    "model": "embedded",
    "dtype": "float32",
    "block_size": 16,
    "kv_cache_bytes": 32 * 2**20,
    "num_threads": 1,
    "max_batched_tokens": 64,  # tickets just too large for Ray to send them inline
}


async def until(condition: Any, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not await condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        await asyncio.sleep(0.1)


def request(name: str) -> PrefillRequest:
    ids = tuple(20 + i % 97 for i in range(TOKENS))
    return PrefillRequest(name, 1, 1, token_ids=ids, start=0, cache_salt="", deadline_s=LIMIT_S)


async def session(transport: ObjectStoreTransport) -> dict[str, Any]:
    async def exported() -> bool:
        (report,) = await transport.reports()
        return report.stats.kv_exported_tokens == 2 * TOKENS

    async def tickets_are_gone() -> bool:
        # All but the one that is being read, whose memory stays as long as somebody looks at it.
        name = "object_store_memory"
        used = ray.cluster_resources()[name] - ray.available_resources().get(name, 0)
        return bool(used < 2**20)

    found: dict[str, Any] = {"whole": 0, "read": 1}
    async with aclosing(transport.pull(request("whole"), RouteHints())) as stream:
        async for item in stream:
            found["whole"] += isinstance(item, Arrival)
    (owner,) = [
        process
        for process in psutil.Process().children(recursive=True)
        if process.name().startswith("ray::ServeReplica:")
    ]
    async with aclosing(transport.pull(request("broken"), RouteHints())) as stream:
        await anext(stream)
        await anext(stream)
        await until(exported, "the other tickets were not made")
        owner.kill()
        owner.wait(10)
        await until(tickets_are_gone, "Ray keeps what nobody owns")
        try:
            async for _ in stream:
                found["read"] += 1
        except Exception as error:
            found["reason"] = transport.failure_reason(error)
    return found


def main(folder: str) -> None:
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray.init(
        address="local",
        num_cpus=1,
        object_store_memory=80 * 2**20,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
    )
    try:
        serve.start(proxy_location="Disabled")
        replica = serve.deployment(
            ray_actor_options={"num_cpus": 0}, health_check_period_s=1, name="prefill"
        )(PrefillReplica)
        application = replica.bind(load_config({"engine": ENGINE}).engine, 30.0, ["object_store"])
        handle = serve.run(application, route_prefix=None)
        print("FOUND" + json.dumps(asyncio.run(session(ObjectStoreTransport(handle)))))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
