"""Real services on Ray: one with every kind of pool, one whose object store is small.

Where NIXL is installed a second decode pool takes from the same prefill pool by it.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import httpx
import psutil
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from inference_pio.deployments.local_ports import free_ports

SETTLE_S = 90.0
ANSWER = b"answer: "
HAS_NIXL = find_spec("nixl") is not None
DIRECT = {
    "name": "direct",
    "num_cpus": 0.25,
    "role": "decode",
    "served_model_name": "direct",
    "prefill": {"pool": "prefill", "when": "always", "transport": "nixl"},
}
SMALL_STORE_BYTES = 80 * 2**20  # Ray takes no less than 75 MiB
NO_DISK = {"RAY_automatic_object_spilling_enabled": "0", "RAY_local_fs_capacity_threshold": "0"}
"""Neither spilling nor Ray's other way out of a full store, which is to put objects into files."""
APPLICATION: dict[str, Any] = {
    "name": "pools",
    "route_prefix": "/",
    "import_path": "inference_pio.deployments.app:build",
    "args": {
        "engine": {
            "model": "embedded",
            "dtype": "float32",
            "block_size": 16,
            "kv_cache_bytes": 32 * 2**20,
            "num_threads": 1,
            "max_batched_tokens": 256,
        },
        "pools": [
            {"name": "one", "num_cpus": 0.25, "served_model_name": "unified"},
            {
                "name": "answer",
                "num_cpus": 0.25,
                "role": "decode",
                "served_model_name": "split",
                "prefill": {"pool": "prefill", "when": "always"},
            },
            {"name": "prefill", "num_cpus": 0.25, "role": "prefill"},
            {
                "name": "ranks",
                "num_cpus": 0.25,
                "served_model_name": "ranks",
                "engine": {"parallel": {"tensor": 2}},
            },
            *([DIRECT] if HAS_NIXL else []),
        ],
    },
}


@dataclass(frozen=True)
class Split:
    """A decode pool that has its prompts prefilled elsewhere."""

    pool: str
    model: str


SPLITS = {"object_store": Split("answer", "split"), "nixl": Split("direct", "direct")}


@dataclass
class PoolsService:
    """The running service: its API, numbers and processes."""

    client: httpx.Client
    folder: Path
    process: subprocess.Popen[bytes]
    application: dict[str, Any]

    def complete(self, model: str, prompt: list[int], **settings: Any) -> dict[str, Any]:
        """One greedy completion; anything but 200 fails the test."""
        body = {"model": model, "prompt": prompt, "temperature": 0, "ignore_eos": True}
        answer = self.client.post("/v1/completions", json={**body, **settings})
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    @property
    def pools(self) -> list[str]:
        """The names of its pools."""
        return [str(pool["name"]) for pool in self.application["args"]["pools"]]

    @property
    def decode_pools(self) -> list[str]:
        """Those that have their prompts prefilled elsewhere."""
        return [split.pool for split in SPLITS.values() if split.pool in self.pools]

    def text(self, model: str, prompt: list[int], max_tokens: int = 12) -> str:
        return str(self.complete(model, prompt, max_tokens=max_tokens)["choices"][0]["text"])

    def numbers(self, name: str, pool: str, by: str | None = None) -> dict[str, float]:
        """A metric of a pool, its replicas summed up, by one of its labels."""
        found: dict[str, float] = defaultdict(float)
        text = self.client.get("/metrics").text
        for family in text_string_to_metric_families(text):
            for sample in family.samples:
                if sample.name == f"inference_pio_{name}" and sample.labels.get("pool") == pool:
                    found[sample.labels[by] if by else ""] += sample.value
        return found

    def number(self, name: str, pool: str) -> float:
        return self.numbers(name, pool)[""]

    def processes(self, title: str) -> list[psutil.Process]:
        """The service's processes whose command line begins so."""
        found = []
        for process in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if " ".join(process.cmdline()).startswith(title):
                    found.append(process)
            except psutil.Error:
                continue  # it has ended meanwhile
        return found

    def expect_quiet(self) -> None:
        """Wait until nobody holds anything: no request, block, handoff or ticket."""
        held = (
            "kv_imports_running",
            "kv_exports_running",
            "requests_running",
            "requests_waiting",
            "kv_cache_used_ratio",
            "handoffs_running",
            "handoffs_waiting",
            "prefill_lent_bytes",
        )
        for pool in self.pools:
            for name in held:
                until(lambda n=name, p=pool: self.number(n, p) == 0, f"{pool}: {name}")
        # Serve keeps some hundred kilobytes of its own there.
        until(lambda: self.object_store_bytes() < 2**20, "tickets stay in the object store")

    def object_store_bytes(self) -> int:
        """What lies in Ray's object store now."""
        return int(self._ask("store"))

    def fill_store(self) -> None:
        """Put objects into Ray's store until not even one of 128 KiB fits."""
        assert self._ask("fill") == "full"

    def drain_store(self) -> None:
        """Let go of what ``fill_store`` put there."""
        assert self._ask("drain") == "drained"

    def deploy(self, change: Callable[[dict[str, Any]], None]) -> None:
        """Deploy the application with changed arguments over itself, as ``serve deploy`` does."""
        application = copy.deepcopy(self.application)
        change(application)
        file = self.folder / "changed.yaml"
        file.write_text(yaml.safe_dump({"applications": [application]}))
        assert self._ask(f"deploy {file}") == "deployed"

    def _ask(self, command: str) -> str:
        assert self.process.stdin is not None
        self.process.stdin.write(command.encode() + b"\n")
        self.process.stdin.flush()
        answer = self.answer()
        assert answer is not None, "the service has ended"
        return answer

    def answer(self) -> str | None:
        """The next line that is meant for the tests; ``None`` when the service has ended."""
        assert self.process.stdout is not None
        for line in self.process.stdout:  # Ray's own lines come between
            if line.startswith(ANSWER):
                return line.removeprefix(ANSWER).decode().strip()
        return None


def until(condition: Callable[[], bool], what: str, timeout_s: float = SETTLE_S) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.1)


@pytest.fixture(
    params=[
        "object_store",
        pytest.param(
            "nixl",
            marks=pytest.mark.skipif(
                not HAS_NIXL, reason="NIXL is not installed: pip install 'inference-pio[nixl]'"
            ),
        ),
    ]
)
def split(request: pytest.FixtureRequest) -> Split:
    """The decode pool of each transport in turn."""
    return SPLITS[request.param]


@pytest.fixture
def settle() -> Callable[..., None]:
    """``settle(condition, what)``: wait for a condition; its failure says ``what``."""
    return until


@pytest.fixture(scope="session")
def pools_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolsService]:
    """The service as users start it; every prefill replica has been met when it is handed out."""
    with running_service(tmp_path_factory.mktemp("pools"), APPLICATION) as service:
        yield service


@pytest.fixture(scope="module")
def small_store_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PoolsService]:
    """One engine alone, and two between which KV travels, on a Ray whose store is soon full."""
    application = copy.deepcopy(APPLICATION)
    pools = application["args"]["pools"]
    pools[:] = [pool for pool in pools if pool["name"] != "ranks"]
    # Far beyond what any test here needs: where KV is late, something else must say so before.
    pools[1]["prefill"]["deadline_s"] = 60
    # Many tickets, each just too large for Ray to send it inline: a handoff takes a while.
    pools[2]["engine"] = {"max_batched_tokens": 64}
    with running_service(
        tmp_path_factory.mktemp("small"), application, str(SMALL_STORE_BYTES), environment=NO_DISK
    ) as service:
        yield service


@contextmanager
def running_service(
    folder: Path,
    application: dict[str, Any],
    *options: str,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[PoolsService]:
    """``application`` under ``serve_and_obey.py``, which takes the ``options``."""
    file, log, (port,) = folder / "pools.yaml", folder / "log", free_ports(1)
    file.write_text(yaml.safe_dump({"applications": [application]}))
    script = Path(__file__).parent / "serve_and_obey.py"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, str(script), str(file), str(port), *options],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            env={**os.environ, **environment},
        )
    assert process.stdin is not None
    assert process.stdout is not None
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=120) as client:
        service = PoolsService(client, folder, process, application)
        try:
            assert service.answer() == "ready", f"it did not start:\n{log.read_text()[-4000:]}"
            for pool in service.decode_pools:
                until(lambda p=pool: service.number("prefill_peers", p) == 1, f"{pool}: no peer")
            yield service
            assert process.poll() is None, f"the service died:\n{log.read_text()[-4000:]}"
        finally:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()
