"""The HTTP side as a Ray Serve deployment."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.types import ASGIApp

from .config import ServiceConfig
from .ingress import create_app
from .process_heap import keep_for_good
from .ray_transport import RayTransport
from .replica_port import listen_on_node_address


@serve.ingress()
class IngressReplica:
    """The application inside a Serve replica; built once every pool has said what it serves.

    ``pools`` holds the handle of each serving pool by its name.
    """

    def __init__(self, config: ServiceConfig, pools: Mapping[str, DeploymentHandle[Any]]) -> None:
        listen_on_node_address()
        self._config = config
        self._transports = {name: RayTransport(handle) for name, handle in pools.items()}

    async def __serve_build_asgi_app__(self) -> ASGIApp:
        app = await create_app(self._config, self._transports)
        keep_for_good()
        return app
