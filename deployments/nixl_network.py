"""Which devices NIXL gets: none that the cluster does not use, and no plain TCP between nodes.

Its library UCX listens on every interface it finds, without authentication, and whoever speaks its
protocol to that port can read and write the process's memory. And where no hardware reads the other
side's memory, UCX 1.23 has the other side's process send it, which it aborts when a reader dies in
the middle (measured by TCP on loopback: one such death in four). So a node gets its RDMA ports
alone; a lone machine, whose processes read each other's memory through the kernel, loopback.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

SETTING = "UCX_NET_DEVICES"
LOOPBACK = "lo"
RDMA_FOLDER = Path("/sys/class/infiniband")


def listen_on_cluster_network(address: str) -> None:
    """Call it in a process before its first agent is made; a setting of the user's stays.

    Raises ``ValueError`` on a node that has nothing for NIXL.
    """
    if SETTING not in os.environ:
        os.environ[SETTING] = network_devices(address, rdma_ports(RDMA_FOLDER))


def network_devices(address: str, rdma: Sequence[str]) -> str:
    """UCX's list for the node with this address. Raises ``ValueError`` where it has no device."""
    if address == "::1" or address.startswith("127."):
        return LOOPBACK
    if rdma:
        return ",".join(rdma)
    raise ValueError(
        f"NIXL needs an RDMA device, and this node ({address}) has none; by plain TCP a decode "
        "replica that dies can take the prefill replica with it. Use prefill.transport "
        f"object_store, or set {SETTING} to have it all the same"
    )


def rdma_ports(folder: Path) -> list[str]:
    """The RDMA ports of this machine as UCX names them, such as ``mlx5_0:1``."""
    return sorted(f"{port.parent.parent.name}:{port.name}" for port in folder.glob("*/ports/*"))
