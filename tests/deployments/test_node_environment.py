from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from inference_pio.deployments.haproxy import BINARY_SETTING
from inference_pio.deployments.node_environment import export_lines, node_environment
from inference_pio.deployments.ray_settings import (
    cluster_settings,
    common_settings,
    private_files,
    serve_settings,
)

CONFIGS = Path(__file__).resolve().parents[2] / "cluster_configs"
LONGEST_SOCKET = 107  # sun_path of unix(7), less its final NUL
NODE_ID = "f" * 56  # Serve puts a folder with the node's id in between
HAPROXY_SUFFIX = ".4194304.tmp"  # HAProxy binds under a name with its process id first


def test_a_cluster_has_the_settings_of_one_machine_but_for_its_addresses() -> None:
    one, many = serve_settings(8), cluster_settings(8)
    assert common_settings(8).items() <= one.items() & many.items()
    # Loopback is no place for a node, and load balancers need their time.
    assert set(one) - set(many) == {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S",
    }
    assert many["RAY_AUTH_MODE"] == "token"


def test_what_is_set_already_is_left_alone(tmp_path: Path) -> None:
    present = {"RAY_DEDUP_LOGS": "1", BINARY_SETTING: "/mine"}
    found = node_environment(tmp_path, present)
    assert not found.keys() & present.keys()
    assert found["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert not (tmp_path / "haproxy-wrapper").exists()


def test_the_wrapper_is_named_and_there(tmp_path: Path) -> None:
    wrapper = Path(node_environment(tmp_path, {})[BINARY_SETTING])
    assert wrapper.parent == tmp_path
    assert os.access(wrapper, os.X_OK)


def test_a_shell_reads_the_lines_as_they_are_meant(tmp_path: Path) -> None:
    environment = {"ONE": "a b", "TWO": "it's $HOME"}
    script = f'{export_lines(environment)}printf "%s|%s" "$ONE" "$TWO"'
    shown = subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True)
    assert shown.stdout == "a b|it's $HOME"


def test_sockets_fit_for_the_longest_user_id() -> None:
    places = private_files(Path("/tmp/pio-4294967294"))
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        path = Path(places[name])
        assert len(str(path.parent / NODE_ID / path.name) + HAPROXY_SUFFIX) <= LONGEST_SOCKET


CLUSTER_FILES = [*sorted(CONFIGS.glob("ray-up-*.yaml")), CONFIGS / "kuberay.yaml"]


@pytest.mark.parametrize("file", CLUSTER_FILES, ids=lambda file: file.name)
def test_cluster_files_take_their_settings_from_here_alone(file: Path) -> None:
    lines = [line for line in file.read_text().splitlines() if not line.lstrip().startswith("#")]
    text = "\n".join(lines)
    assert "inference_pio.deployments.node_environment" in text
    for name in cluster_settings(8):
        assert name not in text
