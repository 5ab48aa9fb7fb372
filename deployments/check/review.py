"""One file from reading to plan: everything that ``inference-pio check`` knows about it."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import psutil

from ...workers.model.config import CheckpointError
from ..config import PoolConfig, ServiceConfig
from ..kv_transport import missing_package, refusal
from .demand import replica_groups, total_demand, whole
from .files import Described, read_file
from .memory import RankMemory, UnknownModelError, engine_memory
from .nodes import NodeType
from .plan import Plan, Problem, place


@dataclass(frozen=True, slots=True)
class PoolReview:
    """A pool with the memory of the ranks of one of its replicas, where it is known."""

    pool: PoolConfig
    model: str
    """Where its weights come from."""
    name: str
    """What clients call it."""
    memory: tuple[RankMemory, ...] | None


@dataclass(frozen=True, slots=True)
class Review:
    """What a file says and whether it can work."""

    path: Path
    kind: str
    config: ServiceConfig | None
    pools: tuple[PoolReview, ...]
    plan: Plan | None
    """``None`` where there are no pools or no nodes to put them on."""
    problems: tuple[Problem, ...]

    @property
    def is_sound(self) -> bool:
        return not any(problem.is_error for problem in self.problems)


def review_file(path: Path) -> Review:
    """Read and check a deployment file. Raises ``OSError`` or ``ValueError`` for no such file."""
    described = read_file(path)
    config, problems = described.config, list(described.problems)
    if config is None:
        return Review(path, described.kind, None, (), None, tuple(problems))
    pools = []
    for pool in config.pools:
        reviewed, problem = _review_pool(config, pool, described.pools_key)
        pools.append(reviewed)
        problems += [problem] if problem is not None else []
        problems += _transport_problems(pool, described)
    for name, attention in config.approximations.items():
        said = f"attention is {attention}: answers are approximations of the model"
        problems.append(Problem(f"{described.pools_key}.{name}", said, is_error=False))
    nodes = (this_machine(config),) if described.nodes is None else described.nodes
    plan = None
    if nodes:
        memory = {review.pool.name: review.memory for review in pools}
        groups = [(group, memory[group.pool.name]) for group in replica_groups(config)]
        plan = place(groups, nodes, described.pools_key)
        problems += plan.problems
    elif described.problems == ():
        problems.append(_no_nodes(described))
    return Review(path, described.kind, config, tuple(pools), plan, tuple(problems))


def this_machine(config: ServiceConfig) -> NodeType:
    """The machine that this runs on, as ``inference-pio serve`` presents it to Ray.

    CPUs and custom resources are logical there, so it has what is asked for; memory and GPUs are
    what they are.
    """
    import torch  # slow to import, and only asked for its GPUs

    resources: dict[str, float] = dict(whole(total_demand(config)))
    resources["CPU"] = max(resources.get("CPU", 0), len(os.sched_getaffinity(0)))
    gpus = torch.cuda.device_count()
    resources.pop("GPU", None)
    gpu_memory = None
    if gpus:
        resources["GPU"] = gpus
        gpu_memory = torch.cuda.get_device_properties(0).total_memory
    return NodeType("this machine", 1, resources, psutil.virtual_memory().total, gpu_memory)


def _review_pool(
    config: ServiceConfig, pool: PoolConfig, key: str
) -> tuple[PoolReview, Problem | None]:
    engine = config.engine_of(pool)
    memory: tuple[RankMemory, ...] | None = None
    problem = None
    try:
        memory = engine_memory(engine)
    except UnknownModelError as error:
        problem = Problem(f"{key}.{pool.name}", f"memory unchecked: {error}", is_error=False)
    except (CheckpointError, ValueError) as error:
        problem = Problem(f"{key}.{pool.name}", str(error))
    return PoolReview(pool, engine.model, config.model_name_of(pool), memory), problem


def _transport_problems(pool: PoolConfig, described: Described) -> list[Problem]:
    """A transport that is refused, or whose package is missing; on other nodes it may be there."""
    key = f"{described.pools_key}.{pool.name}"
    if (reason := refusal(pool)) is not None:
        return [Problem(key, reason)]
    if (reason := missing_package(pool)) is not None:
        if described.nodes is None:
            return [Problem(key, reason)]
        return [Problem(key, f"{reason} (not on this machine; each node needs it)", is_error=False)]
    return []


def _no_nodes(described: Described) -> Problem:
    return Problem(
        "metadata.host",
        "is missing: say what each host has, such as {CPU: 8, memory: 32GiB}, to see what goes "
        "where",
        is_error=False,
    )
