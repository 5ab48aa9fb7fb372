"""The request routers of this process, for whoever wants to know which replicas they know.

A module of its own: Serve sends the router's class by value, with a copy of its module's globals,
while other modules are imported where the class arrives.
"""

from __future__ import annotations

from collections.abc import Sized
from typing import Protocol
from weakref import WeakValueDictionary


class Router(Protocol):
    """What is asked of a router: Serve's own property."""

    @property
    def curr_replicas(self) -> Sized: ...


_routers: WeakValueDictionary[tuple[str, str], Router] = WeakValueDictionary()
"""By application and deployment."""


def register(application: str, deployment: str, router: Router) -> None:
    """A deployment has a router here; Serve makes it with the first call."""
    _routers[application, deployment] = router


def has_replica(application: str, deployment: str) -> bool:
    """Whether a deployment's router knows a replica; yes, as long as there is no router.

    Serve tells it of every replica that starts or fails its health check, and a call that finds one
    dead strikes it off at once.
    """
    router = _routers.get((application, deployment))
    return router is None or len(router.curr_replicas) > 0
