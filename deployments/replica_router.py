"""Aims a call at one engine replica: a subscription or an abort belongs where the work is."""

from __future__ import annotations

import random

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class AimedRequestRouter(RequestRouter):
    """A call with the keyword ``replica_id`` goes to that replica, any other to one of two by load.

    A call for a replica that is gone goes to another one, which refuses it: waiting would hold the
    caller for ever. There is no ``FIFOMixin`` here, for it gives a chosen replica to whichever call
    has waited longest.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """One rank: the replica that is named, else two at random."""
        aim = pending_request.kwargs.get("replica_id") if pending_request is not None else None
        for replica in candidate_replicas:
            if replica.replica_id.unique_id == aim:
                return [[replica]]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
