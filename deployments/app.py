"""``build``: the one place that binds the deployments of the service.

```
            ┌──────────► pool (unified) ── rank 1, 2, …   in the replica's placement group
ingress ────┤
            └──────────► pool (decode) ───► pool (prefill)
```

A deployment's constructor gets only what it works with. Serve itself restarts every deployment of
an application whose ``args`` have changed, replica counts too; old replicas finish their streams
while new ones take new requests. A change of ``deployments[].num_replicas`` in the application file
restarts nothing.
"""

from __future__ import annotations

from typing import Any

from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from .config import INGRESS, PoolConfig, ServiceConfig, load_config
from .edge import CALLBACK_IMPORT_PATH
from .engine_replica import EngineReplica
from .ingress_replica import IngressReplica
from .kv_transport import require_transports, transports_from
from .prefill_replica import PrefillReplica

# Concurrency is bounded by our own gate and the engine's queue, which answer with a reason;
# Serve's limits only have to lie above both.
UNBOUNDED = 1_000_000
EDGE_SETTING = "RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH"
ROUTER = "inference_pio.deployments.replica_router:AimedRequestRouter"
ROUTING_STATS_PERIOD_S = 1.0
HEALTH_PERIOD_S = 1.0
"""A replica whose process is gone is replaced after at most this long."""
DRAINING_EXTRA_S = 5.0
"""A draining replica outlives its last request's deadline by this much."""


def build(args: dict[str, Any]) -> Application:
    """The application that a Serve config file names; ``args`` is a ``ServiceConfig``.

    Raises ``ValueError`` naming every wrong key.
    """
    config = load_config(args)
    require_transports(config)
    prefill = {
        pool.name: _deployment(config, pool, PrefillReplica).bind(
            config.engine_of(pool), config.replicas.health_timeout_s, transports_from(config, pool)
        )
        for pool in config.pools
        if pool.role == "prefill"
    }
    pools = {pool.name: _serving_pool(config, pool, prefill) for pool in config.serving_pools}
    return serve.deployment(
        name=INGRESS,
        num_replicas=config.replicas.ingress_replicas,
        max_ongoing_requests=UNBOUNDED,
        graceful_shutdown_timeout_s=_draining_s(config),
        # Serve's own handling of a request must see the headers that our outermost layer leaves.
        ray_actor_options={
            "num_cpus": 0,
            "resources": config.replicas.ingress_resources,
            "runtime_env": {"env_vars": {EDGE_SETTING: CALLBACK_IMPORT_PATH}},
        },
    )(IngressReplica).bind(config, pools)


def _serving_pool(
    config: ServiceConfig, pool: PoolConfig, prefill: dict[str, Application]
) -> Application:
    arguments: list[Any] = [config.engine_of(pool), config.replicas.health_timeout_s]
    if pool.prefill is not None:
        arguments += [pool.prefill, prefill[pool.prefill.pool]]
    return _deployment(config, pool, EngineReplica).bind(*arguments)


def _deployment(config: ServiceConfig, pool: PoolConfig, replica: type) -> serve.Deployment:
    """One pool: each replica is rank 0 of its engine; the others live in its placement group."""
    num_ranks = config.engine_of(pool).parallel.num_ranks
    group: dict[str, Any] = {}
    if num_ranks > 1:
        group["placement_group_bundles"] = [_bundle(pool)] * num_ranks
        group["placement_group_strategy"] = pool.placement
    return serve.deployment(
        name=pool.name,
        num_replicas=pool.replicas,
        max_ongoing_requests=UNBOUNDED,
        health_check_timeout_s=config.replicas.health_timeout_s + 5,
        health_check_period_s=HEALTH_PERIOD_S,
        graceful_shutdown_timeout_s=_draining_s(config),
        ray_actor_options={
            "num_cpus": pool.num_cpus,
            "num_gpus": pool.num_gpus,
            "resources": pool.resources,
        },
        **group,
        request_router_config=RequestRouterConfig.model_validate(
            {
                "request_router_class": ROUTER,
                "request_routing_stats_period_s": ROUTING_STATS_PERIOD_S,
            }
        ),
    )(replica)


def _bundle(pool: PoolConfig) -> dict[str, float]:
    """What each rank reserves. Raises ``ValueError`` where that is nothing."""
    bundle = {"CPU": pool.num_cpus, "GPU": pool.num_gpus, **pool.resources}
    bundle = {name: amount for name, amount in bundle.items() if amount > 0}
    if not bundle:
        raise ValueError(
            f"pool {pool.name!r} spreads an engine over ranks that reserve nothing; "
            "Ray places them by what they reserve: give num_cpus, num_gpus or resources"
        )
    return bundle


def _draining_s(config: ServiceConfig) -> float:
    return config.api.request_timeout_s + DRAINING_EXTRA_S
