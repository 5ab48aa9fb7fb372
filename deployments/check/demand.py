"""What a configuration asks Ray for: groups of ranks, each with its logical resources."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from ..config import PoolConfig, ServiceConfig


@dataclass(frozen=True, slots=True)
class ReplicaGroup:
    """One replica of a pool: ``num_ranks`` ranks that reserve the same each."""

    pool: PoolConfig
    index: int
    num_ranks: int

    @property
    def per_rank(self) -> dict[str, float]:
        """Logical resources of one rank."""
        wanted = {"CPU": self.pool.num_cpus, "GPU": self.pool.num_gpus, **self.pool.resources}
        return {name: amount for name, amount in wanted.items() if amount > 0}

    @property
    def name(self) -> str:
        return f"{self.pool.name}[{self.index}]"


def replica_groups(config: ServiceConfig) -> tuple[ReplicaGroup, ...]:
    """Every replica of every pool."""
    return tuple(
        ReplicaGroup(pool, index, config.engine_of(pool).parallel.num_ranks)
        for pool in config.pools
        for index in range(pool.replicas)
    )


def total_demand(config: ServiceConfig) -> dict[str, float]:
    """Logical resources of all replicas together, the ingress's custom ones included."""
    total: Counter[str] = Counter(config.replicas.ingress_resources)
    for group in replica_groups(config):
        for name, amount in group.per_rank.items():
            total[name] += amount * group.num_ranks  # type: ignore[assignment]
    return dict(total)


def whole(amounts: Mapping[str, float]) -> dict[str, int]:
    """Amounts rounded up, as a machine that offers them would say."""
    return {name: math.ceil(amount) for name, amount in amounts.items()}
