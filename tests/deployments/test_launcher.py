from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from inference_pio.deployments.config import ServiceConfig, load_config
from inference_pio.deployments.kv_transport import MAX_PULLS, WINDOW_BYTES
from inference_pio.deployments.launcher import (
    OBJECT_STORE_BYTES,
    failure_reason,
    kv_bytes_per_token,
    logical_resources,
    object_store_bytes,
    private_places,
)
from inference_pio.deployments.ray_settings import serve_settings
from inference_pio.workers.config import EngineConfig
from inference_pio.workers.model.cache import KVCache
from inference_pio.workers.model.config import ModelConfig

LONGEST_SOCKET = 107  # sun_path of unix(7), less its final NUL
NODE_ID = "f" * 56  # Serve puts a folder with the node's id in between
HAPROXY_SUFFIX = ".4194304.tmp"  # HAProxy binds under a name with its process id first


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (2, "1"), (8, "2"), (64, "4")])
def test_haproxy_leaves_most_cores_to_the_engine(cores: int, threads: str) -> None:
    assert serve_settings(cores)["RAY_SERVE_HAPROXY_NBTHREAD"] == threads


def test_the_fast_path_is_on() -> None:
    settings = serve_settings(2)
    assert settings["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert settings["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_two_servers_share_no_file_and_no_port() -> None:
    first = private_places(Path("/tmp/pio-a"), (1, 2, 3))
    second = private_places(Path("/tmp/pio-b"), (4, 5, 6))
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())
    ports = {name for name in first if name.endswith("_PORT")}
    assert ports == {
        "RAY_SERVE_HAPROXY_METRICS_PORT",
        "RAY_SERVE_HAPROXY_STATS_PORT",
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT",
    }


def test_sockets_fit_into_a_unix_address() -> None:
    places = private_places(Path("/tmp/pio-abcdefgh"), (1, 2, 3))
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        path = Path(places[name])
        assert len(str(path.parent / NODE_ID / path.name) + HAPROXY_SUFFIX) <= LONGEST_SOCKET


def test_the_reason_is_the_last_exception_of_a_remote_traceback() -> None:
    messages = [
        "Failed to update the deployments ['engine'].",
        "The deployment failed to start 3 times in a row.\nTraceback (most recent call last):\n"
        '  File "x.py", line 1, in y\nRuntimeError: Traceback (most recent call last):\n'
        "inference_pio.workers.model.config.CheckpointError: config.json is missing",
    ]
    reason = "inference_pio.workers.model.config.CheckpointError: config.json is missing"
    assert failure_reason(messages) == reason


@pytest.mark.parametrize(
    ("messages", "reason"), [(["", "  no room \nmore"], "no room"), ([""], "no reason was given")]
)
def test_without_an_exception_the_first_line_is_the_reason(
    messages: list[str], reason: str
) -> None:
    assert failure_reason(messages) == reason


def pools(*pools: dict[str, object], **engine: object) -> ServiceConfig:
    return load_config({"engine": engine, "pools": list(pools)})


PREFILL: dict[str, object] = {"name": "prefill", "role": "prefill"}
DECODE: dict[str, object] = {"name": "d", "role": "decode", "prefill": {"pool": "prefill"}}
LARGE = 2**50


def test_the_machine_has_the_logical_resources_that_the_pools_ask_for() -> None:
    config = pools(
        {"name": "a", "replicas": 3, "num_cpus": 2.5, "resources": {"decode": 0.5}},
        {"name": "b", "engine": {"parallel": {"tensor": 2}}, "resources": {"node:x": 1}},
    )
    assert logical_resources(config, cores=2) == (10, {"decode": 2})


def test_a_small_service_still_sees_the_whole_machine() -> None:
    assert logical_resources(pools({}), cores=16) == (16, {})


def test_without_handoffs_the_object_store_stays_small() -> None:
    assert object_store_bytes(pools({}, PREFILL), LARGE, LARGE) == OBJECT_STORE_BYTES


def test_the_object_store_holds_the_handoffs_of_every_decode_replica() -> None:
    config = pools(PREFILL, {**DECODE, "replicas": 2})
    want = OBJECT_STORE_BYTES + 2 * MAX_PULLS * WINDOW_BYTES
    assert object_store_bytes(config, LARGE, LARGE) == want


def test_handoffs_by_another_way_need_no_object_store() -> None:
    by_nixl = {**DECODE, "prefill": {"pool": "prefill", "transport": "nixl"}}
    assert object_store_bytes(pools(PREFILL, by_nixl), LARGE, LARGE) == OBJECT_STORE_BYTES


def test_a_step_that_is_larger_than_the_window_counts() -> None:
    config = pools(PREFILL, DECODE, max_batched_tokens=2**20)
    step = 2**20 * kv_bytes_per_token(config.engine)
    assert step > WINDOW_BYTES
    assert object_store_bytes(config, LARGE, LARGE) == OBJECT_STORE_BYTES + MAX_PULLS * step


def test_the_object_store_leaves_memory_for_the_rest() -> None:
    config = pools(PREFILL, DECODE)
    assert object_store_bytes(config, 2**31, LARGE) == int(0.3 * 2**31)
    assert object_store_bytes(config, LARGE, 2**29) == int(0.8 * 2**29)
    assert object_store_bytes(config, LARGE, 2**20) == OBJECT_STORE_BYTES


@pytest.mark.parametrize("codes", ["auto", "int8", "fp8"])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_kv_of_a_token_is_what_the_cache_allocates(
    dtype: str, codes: Any, embedded_dir: Path
) -> None:
    shapes = ModelConfig.from_folder(embedded_dir)
    real = shapes.dtype if dtype == "auto" else getattr(torch, dtype)
    engine = EngineConfig(model="embedded", dtype=dtype, kv_cache_dtype=codes)
    assert kv_bytes_per_token(engine) == KVCache.bytes_per_block(shapes, 1, real, codes)
