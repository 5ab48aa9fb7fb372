"""A service on a cluster of three nodes that loses one in the middle of its streams.

Run by ``test_node_kill.py`` in a process of its own; prints what happened as JSON. Two engines lie
on different nodes, the third node has room for a successor.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import httpx
import psutil

from inference_pio.deployments import haproxy
from inference_pio.deployments.local_ports import free_ports
from inference_pio.deployments.ray_settings import private_files, serve_settings

STREAMS = 6
TOKENS = 400
LIMIT_S = 180.0


def application() -> dict[str, Any]:
    return {
        "name": "nodes",
        "route_prefix": "/",
        "import_path": "inference_pio.deployments.app:build",
        "args": {
            "engine": {
                "model": "embedded",
                "dtype": "float32",
                "block_size": 16,
                "kv_cache_bytes": 32 * 2**20,
                "num_threads": 1,
            },
            "pools": [
                {"name": "engine", "replicas": 2, "num_cpus": 0.1, "resources": {"engine_slot": 1}}
            ],
        },
    }


def body(number: int) -> dict[str, Any]:
    return {
        "prompt": [30 + number, *range(40, 60)],
        "max_tokens": TOKENS,
        "seed": number,
        "temperature": 1.0,
        "ignore_eos": True,
        "stream": True,
    }


async def stream(client: httpx.AsyncClient, number: int, started: asyncio.Event) -> str:
    text = []
    async with client.stream("POST", "/v1/completions", json=body(number)) as answer:
        async for line in answer.aiter_lines():
            if not line or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                return f"error: {event['error']}"
            text.append(event["choices"][0]["text"])
            if len(text) > 10:
                started.set()
    return "".join(text)


async def all_streams(url: str, at_start: Any = None) -> list[str]:
    async with httpx.AsyncClient(base_url=url, timeout=LIMIT_S) as client:
        events = [asyncio.Event() for _ in range(STREAMS)]
        work = [
            asyncio.create_task(stream(client, number, event))
            for number, event in enumerate(events)
        ]
        if at_start is not None:
            await asyncio.gather(*(event.wait() for event in events))
            await asyncio.to_thread(at_start)
        return await asyncio.gather(*work)


def engines() -> dict[int, str]:
    """Process id to node id of the engine replicas."""
    from ray._private.state import actors

    return {
        actor["Pid"]: actor["Address"]["NodeID"]
        for actor in actors().values()
        if actor["State"] == "ALIVE" and actor["ActorClassName"] == "ServeReplica:nodes:engine"
    }


def wait_for(condition: Any, what: str) -> None:
    end = time.monotonic() + LIMIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(what)
        time.sleep(0.2)


def is_healthy(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", timeout=5).status_code == 200
    except httpx.TransportError:
        return False


def session(url: str, port: int, cluster: Any, others: list[Any]) -> dict[str, Any]:
    from ray.serve._private.api import serve_start
    from ray.serve.schema import ServeDeploySchema

    document = {"applications": [application()], "proxy_location": "HeadOnly"}
    schema = ServeDeploySchema.model_validate(document)
    serve_start(
        http_options={"host": "127.0.0.1", "port": port}, proxy_location=schema.proxy_location
    ).deploy_apps(schema)
    wait_for(lambda: is_healthy(url), "the service is not healthy")
    wait_for(lambda: len(engines()) == 2, "there are not two engines")
    unbroken = asyncio.run(all_streams(url))
    before = engines()
    (victim,) = [node for node in others if node.node_id in before.values()][:1]
    lost = [pid for pid, node in before.items() if node == victim.node_id]

    def kill() -> None:
        cluster.remove_node(victim, allow_graceful=False)

    broken = asyncio.run(all_streams(url, at_start=kill))
    wait_for(lambda: len(engines()) == 2 and is_healthy(url), "no successor was started")
    metrics = httpx.get(f"{url}/metrics", timeout=30).text
    moved = [
        line
        for line in metrics.splitlines()
        if line.startswith("inference_pio_migrations_total") and 'outcome="moved"' in line
    ]
    return {
        "unbroken": unbroken,
        "broken": broken,
        "nodes": len(set(before.values())),
        "lost_pids_alive": [pid for pid in lost if psutil.pid_exists(pid)],
        "moved": moved,
        "again": asyncio.run(all_streams(url)),
    }


def main(folder: Path) -> None:
    port, metrics, statistics, proxy = free_ports(4)
    os.environ.update(serve_settings(2) | private_files(folder))
    os.environ["RAY_SERVE_HAPROXY_METRICS_PORT"] = str(metrics)
    os.environ["RAY_SERVE_HAPROXY_STATS_PORT"] = str(statistics)
    os.environ["RAY_SERVE_FALLBACK_PROXY_HTTP_PORT"] = str(proxy)
    os.environ[haproxy.BINARY_SETTING] = str(haproxy.write_wrapper(folder))
    import ray
    from ray import serve
    from ray.cluster_utils import Cluster

    # Cluster notes its address there, and only Ray's own default folder is made by it.
    Path("/tmp/ray").mkdir(exist_ok=True)
    sizes = {"object_store_memory": 100 * 2**20, "include_dashboard": False}
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "temp_dir": str(folder), **sizes}
    )
    others = [cluster.add_node(num_cpus=2, resources={"engine_slot": 1}, **sizes) for _ in range(3)]
    try:
        ray.init(address=cluster.address, namespace="serve", log_to_driver=False)
        found = session(f"http://127.0.0.1:{port}", port, cluster, others)
        serve.shutdown()
    finally:
        ray.shutdown()
        cluster.shutdown()
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
