"""NIXL listens where the cluster talks, and nowhere else."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from inference_pio.deployments.nixl_network import (
    SETTING,
    listen_on_cluster_network,
    network_devices,
    rdma_ports,
)

ADDRESSES = {
    "lo": ["127.0.0.1", "::1", "00:00:00:00:00:00"],
    "eth0": ["192.0.2.7", "fe80::1%eth0"],
    "eth1": ["198.51.100.7"],
}


def test_a_lone_machine_stays_on_loopback() -> None:
    assert network_devices("127.0.0.1", ADDRESSES, ["mlx5_0:1"]) == "lo"


@pytest.mark.parametrize(
    ("address", "found"),
    [
        ("192.0.2.7", "eth0,mlx5_0:1"),
        ("198.51.100.7", "eth1,mlx5_0:1"),
        ("fe80::1", "eth0,mlx5_0:1"),
    ],
)
def test_a_node_gets_its_own_interface_and_its_rdma_ports(address: str, found: str) -> None:
    assert network_devices(address, ADDRESSES, ["mlx5_0:1"]) == found


def test_an_address_that_no_interface_has_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"203\.0\.113\.9; say in UCX_NET_DEVICES"):
        network_devices("203.0.113.9", ADDRESSES, [])


def test_rdma_ports_are_named_as_ucx_names_them(tmp_path: Path) -> None:
    for port in ("mlx5_1/ports/1", "mlx5_0/ports/1", "mlx5_0/ports/2"):
        (tmp_path / port).mkdir(parents=True)
    assert rdma_ports(tmp_path) == ["mlx5_0:1", "mlx5_0:2", "mlx5_1:1"]
    assert rdma_ports(tmp_path / "none") == []


def test_a_setting_of_the_users_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    listen_on_cluster_network("127.0.0.1")
    assert os.environ[SETTING] == "lo"
    monkeypatch.setenv(SETTING, "ib0")
    listen_on_cluster_network("127.0.0.1")
    assert os.environ[SETTING] == "ib0"
