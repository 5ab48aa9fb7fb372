"""Keeps NIXL's sockets off the networks that the cluster does not use.

Its library UCX listens on every interface it finds, without authentication, and whoever speaks its
protocol to that port can read and write the process's memory. So it gets the interface of the
node's own address, and the RDMA ports beside it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import psutil

SETTING = "UCX_NET_DEVICES"
RDMA_FOLDER = Path("/sys/class/infiniband")


def listen_on_cluster_network(address: str) -> None:
    """Call it before the first agent is made; a setting of the user's stays.

    Raises ``ValueError`` where no interface has the node's address.
    """
    if SETTING not in os.environ:
        addresses = {
            name: [entry.address for entry in entries]
            for name, entries in psutil.net_if_addrs().items()
        }
        os.environ[SETTING] = network_devices(address, addresses, rdma_ports(RDMA_FOLDER))


def network_devices(
    address: str, addresses: Mapping[str, Iterable[str]], rdma: Iterable[str]
) -> str:
    """UCX's list for a node: the interface with its address, then its RDMA ports.

    A node on loopback is alone, and gets no other.
    """
    for name, entries in addresses.items():
        # A link-local address carries its interface, as in fe80::1%eth0.
        if address in (entry.partition("%")[0] for entry in entries):
            return name if _is_loopback(address) else ",".join((name, *rdma))
    raise ValueError(
        f"no interface here has this node's address {address}; say in {SETTING} which ones NIXL "
        "is to use"
    )


def rdma_ports(folder: Path) -> list[str]:
    """The RDMA ports of this machine as UCX names them, such as ``mlx5_0:1``."""
    return sorted(f"{port.parent.parent.name}:{port.name}" for port in folder.glob("*/ports/*"))


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")
