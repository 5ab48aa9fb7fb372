"""Sends each call to the replica it belongs to: Serve's request router for every pool."""

from __future__ import annotations

import random
import time
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from .replica_book import ReplicaBook
from .router_registry import register
from .wire import RouteHints


class AimedRequestRouter(RequestRouter):
    """Aims a call by its keywords; any other call goes to one of two replicas by load.

    ``replica_id`` names the replica: a subscription or an abort belongs where the work is. A call
    for a replica that is gone goes to another one, which refuses it: waiting would hold the caller
    for ever.

    ``hints`` (``RouteHints``) has the replicas ranked by expected prefix hit and load. Load is what
    they report (``record_routing_stats``) and what this router has sent since; Serve's own queue
    length means nothing here, for a submission is answered at once. Each ingress process has a
    router of its own: they share what replicas report, and a session's home.

    There is no ``FIFOMixin`` here, for it gives a chosen replica to whichever call has waited
    longest.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._book = ReplicaBook()
        register(self._deployment_id.app_name, self._deployment_id.name, self)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Ranks of one replica each for a call with hints, one rank for any other."""
        keywords = {} if pending_request is None else pending_request.kwargs
        replicas = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        aim, hints = keywords.get("replica_id"), keywords.get("hints")
        if aim in replicas:
            return [[replicas[aim]]]
        if isinstance(hints, RouteHints):
            return self._ranked(replicas, hints)
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]

    def _ranked(
        self, replicas: dict[str, RunningReplica], hints: RouteHints
    ) -> list[list[RunningReplica]]:
        now = time.time()
        reports = {name: replica.routing_stats or {} for name, replica in replicas.items()}
        names = self._book.rank(reports, hints, now)
        if names:
            # Now and not when the replica has answered: a burst is to see its own weight. A second
            # turn for the same call, as after a replica's death, counts once more until the next
            # report.
            self._book.note(names[0], reports[names[0]], hints, now)
        return [[replicas[name]] for name in names]
