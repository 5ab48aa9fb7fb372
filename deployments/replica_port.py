"""Keeps a replica's internal gRPC port off the networks that the cluster does not use.

Serve opens it on every interface, without authentication, and unpickles what arrives there: whoever
reaches the port runs code. On one machine the node's address is loopback; on a cluster it is the
address that the other nodes use (and RAY_USE_TLS then authenticates them).
"""

from __future__ import annotations

from typing import Any

import ray
from ray.serve._private import replica as serve_replica

EVERY_INTERFACE = "[::]"


def listen_on_node_address() -> None:
    """Call it in a replica's constructor: Serve opens the port after that. Idempotent."""
    replica: Any = serve_replica
    current = replica.add_port_to_grpc_server
    if getattr(current, "on_node_address", False):
        return
    node = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]
    address = f"[{node}]" if ":" in node else node

    def add_port(server: Any, place: str) -> int:
        return int(current(server, place.replace(EVERY_INTERFACE, address)))

    add_port.on_node_address = True  # type: ignore[attr-defined]
    replica.add_port_to_grpc_server = add_port
