"""What ``build`` binds, and what it refuses; in a process of its own, for Ray Serve warns."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import pytest

from inference_pio.deployments.config import ServiceConfig, load_config
from inference_pio.deployments.kv_transport import (
    decode_replica_id,
    encode_replica_id,
    require_transports,
    transports_from,
)

DECODE = {"name": "answer", "role": "decode", "prefill": {"pool": "prefill"}}
PREFILL = {"name": "prefill", "role": "prefill", "replicas": 2, "resources": {"big": 1.0}}
RANKS = {
    "name": "ranks",
    "num_cpus": 2.0,
    "placement": "SPREAD",
    "engine": {"parallel": {"tensor": 2, "pipeline": 2}},
}
HEAD = {"node:__internal_head__": 0.001}
SCRIPT = """
import json, sys
from ray.exceptions import (
    ActorDiedError, ObjectLostError, ObjectStoreFullError, OutOfDiskError, OwnerDiedError,
    RayTaskError,
)
from ray.serve._private.build_app import build_app
from ray.serve.exceptions import DeploymentUnavailableError
from inference_pio.deployments.app import build
from inference_pio.deployments.kv_transport import TransferError
from inference_pio.deployments.object_store_transport import ObjectStoreTransport
from inference_pio.workers.types import RequestError

bound = {}
for deployment in build_app(build(json.loads(sys.argv[1])), name="test").deployments:
    replica = deployment._replica_config
    bound[deployment.name] = {
        "replicas": deployment.num_replicas,
        "actor": {k: v for k, v in replica.ray_actor_options.items() if k != "runtime_env"},
        "bundles": replica.placement_group_bundles,
        "strategy": replica.placement_group_strategy,
        "drain": deployment._deployment_config.graceful_shutdown_timeout_s,
    }
reason = ObjectStoreTransport(None).failure_reason
reasons = [
    reason(error)
    for error in (
        ActorDiedError(),
        OwnerDiedError("00", "", ""),
        ObjectLostError("00", "", ""),
        ObjectStoreFullError(),
        OutOfDiskError(),
        RayTaskError("prefill", "", RequestError("full", code="queue_full")),
        TransferError("the peer is gone"),
        RayTaskError("prefill", "", KeyError("x")),
        OSError(),
    )
]
print(json.dumps({"bound": bound, "reasons": reasons}))
"""


@cache
def found() -> dict[str, Any]:
    arguments = json.dumps(
        {
            "pools": [DECODE, PREFILL, RANKS],
            "api": {"request_timeout_s": 50},
            "replicas": {"ingress_resources": HEAD},
        }
    )
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, arguments], check=True, capture_output=True, timeout=120
    )
    return dict(json.loads(run.stdout.splitlines()[-1]))


def test_every_pool_is_a_deployment_with_its_options() -> None:
    bound = found()["bound"]
    assert set(bound) == {"ingress", "answer", "prefill", "ranks"}
    assert bound["prefill"]["replicas"] == 2
    assert bound["prefill"]["actor"] == {"num_cpus": 1.0, "num_gpus": 0.0, "resources": {"big": 1}}
    assert bound["prefill"]["bundles"] is None


def test_the_ingress_lies_where_the_file_says() -> None:
    assert found()["bound"]["ingress"]["actor"] == {"num_cpus": 0, "resources": HEAD}


def test_a_parallel_pool_reserves_a_bundle_for_each_rank() -> None:
    ranks = found()["bound"]["ranks"]
    assert ranks["bundles"] == [{"CPU": 2.0}] * 4
    assert ranks["strategy"] == "SPREAD"
    assert ranks["actor"]["num_cpus"] == 2.0


def test_a_draining_replica_outlives_its_last_request() -> None:
    assert all(options["drain"] > 50 for options in found()["bound"].values())


def test_every_failure_of_ray_has_its_word() -> None:
    assert found()["reasons"] == [
        "peer_died",
        "owner_died",
        "object_lost",
        "store_full",
        "store_full",
        "queue_full",
        "transfer_failed",
        "peer_failed",
        "peer_failed",
    ]


def by(transport: str) -> ServiceConfig:
    pool = {**DECODE, "prefill": {"pool": "prefill", "transport": transport}}
    return load_config({"pools": [pool, PREFILL]})


@pytest.mark.parametrize(
    ("transport", "reason"), [("nccl", "kill both replicas"), ("cuda_ipc", "host memory")]
)
def test_a_transport_that_is_not_there_is_refused_with_the_reason(
    transport: str, reason: str
) -> None:
    with pytest.raises(
        ValueError, match=f"'answer'.*'{transport}' is refused.*{reason}.*object_store"
    ):
        require_transports(by(transport))


@pytest.mark.parametrize("installed", [True, False])
def test_nixl_needs_its_package(installed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    if installed:
        monkeypatch.setitem(sys.modules, "nixl", ModuleType("nixl"))
        sys.modules["nixl"].__spec__ = ModuleSpec("nixl", None)
        require_transports(by("nixl"))
    else:
        monkeypatch.setitem(sys.modules, "nixl", None)
        with pytest.raises(ValueError, match=r"'answer'.*pip install 'inference-pio\[nixl\]'"):
            require_transports(by("nixl"))


def test_a_prefill_pool_knows_who_takes_from_it_and_how() -> None:
    pools = [
        {**DECODE, "name": name, "prefill": {"pool": source, "transport": transport}}
        for name, source, transport in [
            ("a", "prefill", "object_store"),
            ("b", "prefill", "nixl"),
            ("c", "other", "nixl"),
        ]
    ]
    config = load_config({"pools": [*pools, PREFILL, {**PREFILL, "name": "other"}]})
    found = {pool.name: transports_from(config, pool) for pool in config.pools[3:]}
    assert found == {"prefill": ["nixl", "object_store"], "other": ["nixl"]}


def test_a_replica_is_named_by_its_stream() -> None:
    assert decode_replica_id(encode_replica_id("x1y2")) == "x1y2"
    with pytest.raises(ValueError, match="300 bytes"):
        decode_replica_id(encode_replica_id("x" * 300))
