"""The cluster's whole life on three hosts: launched over ssh, deployed, a host lost, taken down.

The tests are steps of one story and run in the order they are written in.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import yaml

from .hosts import Hosts
from .ray_cluster import CONFIGS, RayCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(1200)]

NUM_STREAMS = 8
TOKENS = 1500
GONE_S = 150.0
"""For workers to notice that their head is gone: Ray gives it a minute."""


def application() -> dict[str, Any]:
    """``disaggregated.yaml`` with the embedded model and every pool bound to hosts by resources.

    Both hosts with the resource ``decode`` have a replica of the one decode pool, so that one of
    them may be lost. The ingress is bound to the head: whoever loses it loses his connection.
    """
    document: dict[str, Any] = yaml.safe_load((CONFIGS / "disaggregated.yaml").read_text())
    (entry,) = document["applications"]
    prefill, decode = entry["args"]["pools"][:2]
    prefill |= {"num_cpus": 0.5, "resources": {"prefill": 1}}
    decode |= {
        "name": "decode",
        "modes": ["thinking", "non_thinking"],
        "replicas": 2,
        "num_cpus": 0.5,
        "resources": {"decode": 1},
        "prefill": {"pool": prefill["name"], "when": "always"},
    }
    entry["args"] |= {
        "pools": [prefill, decode],
        # float32: a stream that goes on elsewhere equals the unbroken one exactly.
        "engine": {"model": "embedded", "dtype": "float32", "block_size": 16, "num_threads": 1}
        | {"kv_cache_bytes": 2**28},
    }
    entry["args"]["replicas"] = {"ingress_resources": {"node:__internal_head__": 0.001}}
    return document


def prompt(number: int) -> str:
    return f"What is {400 + number} + 58 - 903? " * 8


class Stream(threading.Thread):
    """One streamed completion; ``text`` grows while it runs."""

    def __init__(self, url: str, number: int) -> None:
        super().__init__(daemon=True)
        self._url = url
        self._body = {
            "model": "embedded",
            "prompt": prompt(number),
            "temperature": 0,
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream": True,
        }
        self.text = ""
        self.finish_reason: str | None = None
        self.error: str | None = None

    def run(self) -> None:
        try:
            with httpx.stream(
                "POST", f"{self._url}/v1/completions", json=self._body, timeout=120
            ) as answer:
                for line in answer.iter_lines():
                    if line.startswith("data: {"):
                        self._take(line.removeprefix("data: "))
                    elif answer.status_code != 200:
                        self.error = line
        except httpx.TransportError as error:
            self.error = repr(error)

    def _take(self, event: str) -> None:
        data = yaml.safe_load(event)
        if "error" in data:
            self.error = str(data["error"])
            return
        for choice in data["choices"]:
            self.text += choice["text"]
            self.finish_reason = choice["finish_reason"] or self.finish_reason


def metric(url: str, name: str, labels: str = "") -> float:
    """The sum of a metric's series that have ``labels``."""
    lines = httpx.get(f"{url}/metrics", timeout=30).text.splitlines()
    rows = [line for line in lines if line.startswith(name) and labels in line]
    return sum(float(line.rpartition(" ")[2]) for line in rows)


def test_head_and_workers_come_up_over_ssh(cluster: RayCluster, hosts: Hosts) -> None:
    nodes = cluster.nodes()
    assert set(nodes) == {host.address for host in hosts.hosts}
    assert nodes[hosts.hosts[1].address]["prefill"] == 1
    for host in hosts.hosts:
        assert any("raylet" in words for words in host.processes().values()), host


def test_every_host_runs_the_package_that_was_sent(cluster: RayCluster, hosts: Hosts) -> None:
    for host in hosts.hosts:
        program = "cd /; ~/inference-pio/venv/bin/python -c"
        shown = hosts.ssh(host, f"{program} 'import inference_pio; print(inference_pio.__file__)'")
        assert "/inference-pio/venv/" in shown.stdout, shown


def test_whoever_lacks_the_token_stays_outside(cluster: RayCluster, hosts: Hosts) -> None:
    head = hosts.hosts[0]
    program = "import ray; ray.init(address='auto', logging_level='ERROR'); print(ray.nodes())"
    answer = hosts.ssh(
        hosts.hosts[1],
        f"cd / && RAY_AUTH_MODE=token RAY_AUTH_TOKEN=wrong RAY_ADDRESS={head.address}:6379 "
        f'timeout 60 ~/inference-pio/venv/bin/python -c "{program}"',
        timeout=90,
    )
    assert answer.returncode != 0
    assert "NodeID" not in answer.stdout


def test_the_pools_lie_on_the_hosts_they_were_bound_to(cluster: RayCluster, hosts: Hosts) -> None:
    cluster.deploy(application())
    first, second, third = (host.address for host in hosts.hosts)
    assert set(cluster.replicas("prefill").values()) == {second}
    assert set(cluster.replicas("decode").values()) == {first, third}
    assert set(cluster.replicas("ingress").values()) == {first}


def test_haproxy_and_serve_have_the_settings_of_the_package(
    cluster: RayCluster, hosts: Hosts
) -> None:
    head = hosts.hosts[0]
    haproxy = [words for words in head.processes().values() if "bin/haproxy " in words]
    assert haproxy
    assert all(" -dS " in words for words in haproxy)
    environment = hosts.ssh(head, "cat /proc/$(pgrep -x raylet)/environ | tr '\\0' '\\n'").stdout
    assert "RAY_SERVE_THROUGHPUT_OPTIMIZED=1" in environment
    assert "RAY_AUTH_MODE=token" in environment
    listening = hosts.ssh(head, "ss -ltnH | awk '{print $4}'").stdout.split()
    assert "0.0.0.0:8000" in listening
    for port in (9101, 8404):  # statistics
        assert f"127.0.0.1:{port}" in listening
        assert f"0.0.0.0:{port}" not in listening


def test_requests_are_answered_through_the_head(cluster: RayCluster) -> None:
    body = {
        "model": "embedded",
        "messages": [{"role": "user", "content": "What is 417 + 58 - 903?"}],
        "temperature": 0,
    }
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(
                lambda _: httpx.post(f"{cluster.url}/v1/chat/completions", json=body, timeout=120),
                range(16),
            )
        )
    for answer in answers:
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"] == "-428"
    assert metric(cluster.url, "inference_pio_kv_imported_tokens_total") > 0


def test_streams_go_on_when_a_host_is_lost(cluster: RayCluster, hosts: Hosts) -> None:
    unbroken = [Stream(cluster.url, number) for number in range(NUM_STREAMS)]
    for stream in unbroken:
        stream.start()
    for stream in unbroken:
        stream.join(300)
        assert (stream.finish_reason, stream.error) == ("length", None)

    streams = [Stream(cluster.url, number) for number in range(NUM_STREAMS)]
    for stream in streams:
        stream.start()
    wait_until(lambda: all(stream.text for stream in streams), 120)
    lost = hosts.hosts[2]
    hosts.kill(lost)
    before = [stream.text for stream in streams]
    assert not any(stream.finish_reason for stream in streams), "the streams were too short"

    for stream in streams:
        stream.join(300)
        assert (stream.finish_reason, stream.error) == ("length", None)
    for stream, reference, start in zip(streams, unbroken, before, strict=True):
        assert stream.text.startswith(start)
        assert stream.text == reference.text
    # The fault was real: Ray itself has lost the node.
    wait_until(lambda: lost.address not in cluster.nodes(), 120)
    assert metric(cluster.url, "inference_pio_migrations_total", 'outcome="moved"') > 0


def test_ray_down_leaves_no_process(cluster: RayCluster) -> None:
    assert any(cluster.leftovers().values()), "nothing runs that could be left over"
    cluster.down()
    end = time.monotonic() + GONE_S
    while any((left := cluster.leftovers()).values()):
        assert time.monotonic() < end, left
        time.sleep(2)


def wait_until(is_so: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, f"not so after {seconds} s"
        time.sleep(0.2)
