"""Where ranks find each other: a store that rank 0 serves and every rank connects to."""

from __future__ import annotations

import socket

# torch.distributed has these names too, but its stubs do not.
from torch._C._distributed_c10d import PrefixStore, Store, TCPStore

__all__ = ["PrefixStore", "Store", "connect_store", "open_store"]


def open_store(host: str) -> TCPStore:
    """Rank 0's: listens on ``host`` alone; left to itself it would on every interface."""
    listener = socket.create_server((host, 0))
    port = int(listener.getsockname()[1])
    return TCPStore(
        host, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )


def connect_store(host: str, port: int) -> TCPStore:
    """Another rank's."""
    return TCPStore(host, port, is_master=False)
