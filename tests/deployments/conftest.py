"""One real service for every HTTP test, and real engines in this process for everything smaller."""

from __future__ import annotations

import asyncio
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AbstractAsyncContextManager, AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from inference_pio.deployments.config import load_config
from inference_pio.deployments.engine_service import EngineService
from inference_pio.deployments.ingress import create_app
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.engine import Engine
from inference_pio.workers.model_source import resolve_model

ENGINE = {"model": "embedded", "block_size": 16, "kv_cache_bytes": 32 * 2**20, "num_threads": 1}
START_S = 180.0
FOR_THE_SESSION = {"service_url", "pools_service"}
"""Fixtures that start a service for all tests that come after."""

InProcess = Callable[..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, EngineService]]]
InProcessPools = Callable[
    ..., AbstractAsyncContextManager[tuple[httpx.AsyncClient, dict[str, EngineService]]]
]


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files whose tests share a service come last: it works even where nobody asks it anything."""
    sharing = {
        item.path
        for item in items
        if not FOR_THE_SESSION.isdisjoint(getattr(item, "fixturenames", ()))
    }
    items.sort(key=lambda item: item.path in sharing)


@asynccontextmanager
async def running_engine(
    config: EngineConfig, replica_id: str = "replica"
) -> AsyncIterator[EngineService]:
    """A real engine in its own thread, without Ray; ends with an empty and sound state."""
    engine = Engine(config)
    service = EngineService(engine, replica_id, str(resolve_model(config.model)))
    service.start()
    try:
        yield service
    finally:
        async with asyncio.timeout(10):
            while engine.has_work:
                await asyncio.sleep(0.01)
        service.stop()
        engine.check_integrity()
        stats = engine.stats()
        assert (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


@asynccontextmanager
async def running_pools(
    **sections: Any,
) -> AsyncIterator[tuple[httpx.AsyncClient, dict[str, EngineService]]]:
    """The real ASGI application on a real engine for each pool, in this process."""
    config = load_config({"engine": ENGINE, **sections})
    async with AsyncExitStack() as engines:
        services = {
            pool.name: await engines.enter_async_context(
                running_engine(config.engine_of(pool), f"replica-of-{pool.name}")
            )
            for pool in config.serving_pools
        }
        transport = httpx.ASGITransport(await create_app(config, services))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            yield client, services


@asynccontextmanager
async def running_app(**sections: Any) -> AsyncIterator[tuple[httpx.AsyncClient, EngineService]]:
    """The same with the one pool of the default configuration."""
    async with running_pools(**sections) as (client, services):
        yield client, services["engine"]


@pytest.fixture
def quick_orphans(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replica that nobody can reach hears of no abort; it soon sweeps what nobody reads."""
    monkeypatch.setattr("inference_pio.deployments.engine_service.ORPHAN_S", 0.3)


@pytest.fixture
def in_process() -> InProcess:
    """Starts the application without Ray: ``async with in_process(api={...}) as (client, _)``."""
    return running_app


@pytest.fixture
def in_process_pools() -> InProcessPools:
    """The same with several pools: ``async with in_process_pools(pools=[...]) as (client, _)``."""
    return running_pools


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def service_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of the service as users start it: the CLI, Ray Serve, HAProxy, one engine."""
    folder = tmp_path_factory.mktemp("service")
    file, log, port = folder / "service.yaml", folder / "log", _free_port()
    args = {
        "engine": ENGINE,
        "api": {"max_body_bytes": 2**20, "body_timeout_s": 2.0},
        "thinking": {"max_budget": 3000},
        "replicas": {"idle_subscription_s": 0.5},
    }
    application = {
        "name": "test",
        "route_prefix": "/",
        "import_path": "inference_pio.deployments.app:build",
        "args": args,
    }
    file.write_text(yaml.safe_dump({"applications": [application]}))
    command = [
        sys.executable,
        "-c",
        "from inference_pio.deployments.cli import main; main()",
        *("serve", "--config", str(file), "--port", str(port)),
    ]
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        _wait_until_healthy(url, process, log)
        yield url
        assert process.poll() is None, f"the service died:\n{log.read_text()[-4000:]}"
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(60)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if process.poll() is not None:
            break
        try:
            if httpx.get(f"{url}/health", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the service did not start:\n{log.read_text()[-4000:]}")


@pytest.fixture
def client(service_url: str) -> Iterator[httpx.Client]:
    """A plain HTTP client of the service."""
    with httpx.Client(base_url=service_url, timeout=60) as connection:
        yield connection
