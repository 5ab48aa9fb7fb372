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


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.1.1", "::1"])
def test_a_lone_machine_stays_on_loopback(address: str) -> None:
    assert network_devices(address, ["mlx5_0:1"]) == "lo"


def test_a_node_gets_its_rdma_ports_and_nothing_else() -> None:
    assert network_devices("192.0.2.7", ["mlx5_0:1", "mlx5_1:1"]) == "mlx5_0:1,mlx5_1:1"


def test_plain_tcp_between_nodes_is_refused_with_the_reason() -> None:
    with pytest.raises(ValueError, match=r"192\.0\.2\.7.*has none.*object_store.*UCX_NET_DEVICES"):
        network_devices("192.0.2.7", [])


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
