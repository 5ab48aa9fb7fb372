"""The ranks of a parallel replica as Ray actors.

1. Serve makes a placement group for each replica of a pool that has several ranks: one bundle a
   rank. The replica is rank 0 in bundle 0; ``ActorRanks`` puts rank ``r`` into bundle ``r``, with
   all that the bundle reserves.
2. Each actor runs ``run_rank``, which ends with its group; then its process ends too.
3. Rank 0 kills ranks that must go: where it shares their machine directly, which also ends a
   stopped process, and else through Ray.
4. The replica's process ends when its engine has died of a lost group (``engine_watch``). Ray kills
   actors whose owner is gone, and Serve starts another replica, which starts new ones.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import ray
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

if TYPE_CHECKING:
    from ..workers.parallel.launcher import RankSpec

START_S = 60.0
"""For an actor's process to come up in a group that has its resources already."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a process runs."""

    node_id: str
    pid: int


class RankActor:
    """One rank; its process is the actor's."""

    def place(self) -> Place:
        """Told before ``run``, which takes the actor's only thread."""
        return Place(ray.get_runtime_context().get_node_id(), os.getpid())

    def run(self, spec: str) -> None:
        """Be a rank until the group ends; ``spec`` is a ``RankSpec`` as JSON."""
        from ..workers.parallel.launcher import RankSpec
        from ..workers.parallel.rank import run_rank

        run_rank(RankSpec.from_json(spec))


class ActorRank:
    """A started rank; see ``RankHandle``."""

    def __init__(self, actor: Any, place: Place, spec: RankSpec) -> None:
        self._actor = actor
        self._place = place
        self._run = actor.run.remote(spec.to_json())

    @property
    def pid(self) -> int:
        """Of the rank's process, on its own node."""
        return self._place.pid

    def is_alive(self) -> bool:
        """See ``RankHandle.is_alive``."""
        ended, _ = ray.wait([self._run], timeout=0)
        return not ended

    def kill(self) -> None:
        """See ``RankHandle.kill``."""
        if self._place.node_id == ray.get_runtime_context().get_node_id() and self.is_alive():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._place.pid, signal.SIGKILL)
        ray.kill(self._actor)


class ActorRanks:
    """Starts ranks in the placement group of the replica that calls it; see ``RankLauncher``."""

    @property
    def host(self) -> str:
        """The node's address among the cluster's."""
        return str(ray.util.get_node_ip_address())  # type: ignore[no-untyped-call]

    def start(self, specs: Sequence[RankSpec]) -> list[ActorRank]:
        """See ``RankLauncher.start``.

        Raises ``RuntimeError`` where this process is in no group with a bundle for each rank, and
        Ray's own error where an actor does not come up.
        """
        group = ray.util.get_current_placement_group()
        if group is None or group.bundle_count <= max(spec.shard.rank for spec in specs):
            have = 0 if group is None else group.bundle_count
            raise RuntimeError(
                f"{len(specs) + 1} ranks need a placement group with a bundle each; this replica "
                f"has {have}"
            )
        actors = [_actor(group, spec.shard.rank) for spec in specs]
        try:
            places = ray.get([actor.place.remote() for actor in actors], timeout=START_S)
        except BaseException:
            for actor in actors:
                ray.kill(actor)
            raise
        return [
            ActorRank(actor, place, spec)
            for actor, place, spec in zip(actors, places, specs, strict=True)
        ]


def _actor(group: PlacementGroup, bundle: int) -> Any:
    reserved = dict(group.bundle_specs[bundle])
    return (
        ray.remote(RankActor)
        .options(
            num_cpus=reserved.pop("CPU", 0),
            num_gpus=reserved.pop("GPU", 0),
            resources=reserved,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=bundle
            ),
        )
        .remote()
    )
