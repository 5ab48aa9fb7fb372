"""``build``: the one place that binds the deployments of the service."""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from .config import load_config
from .edge import CALLBACK_IMPORT_PATH
from .engine_replica import EngineReplica
from .ingress_replica import IngressReplica

# Concurrency is bounded by our own gate and the engine's queue, which answer with a reason;
# Serve's limits only have to lie above both.
UNBOUNDED = 1_000_000
EDGE_SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ROUTER = "inference_pio.deployments.replica_router:AimedRequestRouter"


def build(args: dict[str, Any]) -> Application:
    """The application that a Serve config file names; ``args`` is a ``ServiceConfig``.

    Raises ``ValueError`` naming every wrong key.
    """
    config = load_config(args)
    replicas = config.replicas
    pool = config.serving_pools[0]
    engine = serve.deployment(
        name=pool.name,
        num_replicas=pool.replicas,
        max_ongoing_requests=UNBOUNDED,
        health_check_timeout_s=replicas.health_timeout_s + 5,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=10,
        ray_actor_options={"num_cpus": pool.num_cpus},
        request_router_config=RequestRouterConfig.model_validate({"request_router_class": ROUTER}),
    )(EngineReplica).bind(config.engine_of(pool), replicas.health_timeout_s)
    return serve.deployment(
        name="ingress",
        num_replicas=replicas.ingress_replicas,
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=10,
        # Serve's own handling of a request must see the headers that our outermost layer leaves.
        ray_actor_options={
            "num_cpus": 0,
            "runtime_env": {"env_vars": {EDGE_SETTING: CALLBACK_IMPORT_PATH}},
        },
    )(IngressReplica).bind(config, engine)
