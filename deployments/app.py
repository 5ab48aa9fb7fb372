"""``build``: the one place that binds the deployments of the service."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from .config import load_config
from .engine_replica import EngineReplica
from .ingress import IngressServer
from .replica_router import AimedRequestRouter

# Concurrency is bounded by our own gate and the engine's queue, which answer with a reason;
# Serve's limits only have to lie above both.
UNBOUNDED = 1_000_000


def build(args: dict[str, Any]) -> Application:
    """The application that a Serve config file names; ``args`` is a ``ServiceConfig``.

    Raises ``ValueError`` naming every wrong key.
    """
    config = load_config(args)
    replicas = config.replicas
    engine = serve.deployment(
        EngineReplica,
        name="engine",
        num_replicas=replicas.engine_replicas,
        max_ongoing_requests=UNBOUNDED,
        health_check_timeout_s=replicas.health_timeout_s + 5,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": replicas.engine_num_cpus},
        request_router_config=RequestRouterConfig(request_router_class=AimedRequestRouter),
    ).bind(config.engine, replicas.health_timeout_s)
    return serve.deployment(
        IngressServer,
        name="ingress",
        num_replicas=replicas.ingress_replicas,
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": 0},
    ).bind(config, engine)
