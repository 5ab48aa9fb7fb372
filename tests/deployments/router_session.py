"""A real Serve session around the request router; prints what went where as JSON.

Run by ``test_replica_router.py`` in a process of its own: the two replicas only say who they are.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from contextlib import suppress
from typing import Any

import ray
from ray import serve
from ray.serve.config import RequestRouterConfig

from inference_pio.deployments.replica_choice import session_home
from inference_pio.deployments.router_registry import has_replica
from inference_pio.deployments.wire import RouteHints, RoutingStats, route_hints

ROUTER = "inference_pio.deployments.replica_router:AimedRequestRouter"
LIMIT_S = 60.0


@serve.deployment(
    num_replicas=2,
    max_ongoing_requests=1000,
    ray_actor_options={"num_cpus": 0},
    request_router_config=RequestRouterConfig.model_validate(
        {"request_router_class": ROUTER, "request_routing_stats_period_s": 0.2}
    ),
    health_check_period_s=0.5,
    graceful_shutdown_timeout_s=1,
)
class Recorder:
    """Says who it is; its load is what it is told."""

    def __init__(self) -> None:
        self._me = serve.get_replica_context().replica_id.unique_id
        self._load = 0

    async def submit(self, *, hints: RouteHints) -> str:
        return self._me

    async def who(self, *, replica_id: str) -> str:
        return self._me

    async def set_load(self, load: int, *, replica_id: str) -> None:
        self._load = load

    async def die(self, *, replica_id: str) -> None:
        os._exit(1)

    async def record_routing_stats(self) -> dict[str, Any]:
        return RoutingStats(time.time(), self._load, 0.0, 100_000, self._me).as_dict()


async def until(call: Any, wanted: Any) -> bool:
    """Whether what a call answers becomes what is wanted."""
    end = time.monotonic() + LIMIT_S
    while time.monotonic() < end:
        if wanted(await call()):
            return True
        await asyncio.sleep(0.1)
    return False


async def session(handle: Any) -> dict[str, Any]:
    async def submit(hints: RouteHints) -> str:
        name: str = await handle.submit.remote(hints=hints)
        return name

    async def who(replica_id: str) -> str:
        name: str = await handle.who.remote(replica_id=replica_id)
        return name

    found: dict[str, Any] = {}
    one, other = sorted(set(await asyncio.gather(*[submit(RouteHints()) for _ in range(4)])))
    # Reports may be late by any time here, and until then what was sent counts as load: so few
    # requests, the sessions in turn, that no replica can become hot. That is a test of its own.
    names = [f"user {number}" for number in range(100)]
    homes = [(name, session_home([one, other], name)) for name in names]
    pairs = zip(
        [name for name, home in homes if home == one],
        [name for name, home in homes if home == other],
        strict=False,
    )
    sessions = [RouteHints(session=name) for pair in list(pairs)[:5] for name in pair]
    found["homes"] = [one, other] * (len(sessions) // 2)
    found["sessions"] = [await submit(hints) for hints in sessions]
    prompts = [route_hints(range(start, start + 8192)) for start in range(4)]
    found["prefixes"] = [await submit(prompt) for prompt in prompts]
    found["prefixes_again"] = [await submit(prompt) for prompt in prompts]
    if found["prefixes"][0] == other:
        one, other = other, one
    found["replicas"] = [one, other]
    found["burst"] = await asyncio.gather(*[submit(RouteHints()) for _ in range(40)])
    found["aimed"] = [await who(name) for name in (one, other, one, other)]
    found["avoiding"] = [
        await submit(RouteHints(prompt.prefix, "user 0", avoid=(one,))) for prompt in prompts
    ]
    # A prompt that the one holds, until that one reports many sequences.
    await handle.set_load.remote(90, replica_id=one)
    found["left_a_hot_replica"] = await until(
        lambda: submit(prompts[0]), lambda name: name == other
    )
    await handle.set_load.remote(0, replica_id=one)
    found["came_back"] = await until(lambda: submit(RouteHints()), lambda name: name == one)
    try:
        await handle.die.remote(replica_id=one)
    except Exception as error:
        found["death"] = type(error).__name__
    found["after_death"] = [await submit(RouteHints(session=f"{n}")) for n in range(10)]
    found["aimed_at_the_dead"] = await who(one)
    found["replaced"] = await until(
        lambda: submit(RouteHints(avoid=(other,))), lambda name: name not in (one, other)
    )
    found["has_replica"] = [has_replica(handle.app_name, handle.deployment_name)]
    while has_replica(handle.app_name, handle.deployment_name):  # Serve may be quick with a new one
        with suppress(Exception):
            await handle.die.remote(replica_id="any")
    found["has_replica"].append(has_replica(handle.app_name, handle.deployment_name))
    await submit(RouteHints())
    found["has_replica"].append(has_replica(handle.app_name, handle.deployment_name))
    return found


def main(folder: str) -> None:
    ray.init(
        address="local",
        num_cpus=1,
        include_dashboard=False,
        log_to_driver=False,
        configure_logging=False,
        _temp_dir=folder,
    )
    try:
        serve.start(proxy_location="Disabled")
        handle = serve.run(Recorder.bind(), route_prefix=None)
        print("FOUND" + json.dumps(asyncio.run(session(handle))))
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
