from __future__ import annotations

from pathlib import Path

import pytest

from inference_pio.deployments.launcher import failure_reason, private_places, serve_settings

LONGEST_SOCKET = 107  # sun_path of unix(7), less its final NUL
NODE_ID = "f" * 56  # Serve puts a folder with the node's id in between
HAPROXY_SUFFIX = ".4194304.tmp"  # HAProxy binds under a name with its process id first


@pytest.mark.parametrize(("cores", "threads"), [(1, "1"), (2, "1"), (8, "2"), (64, "4")])
def test_haproxy_leaves_most_cores_to_the_engine(cores: int, threads: str) -> None:
    assert serve_settings(cores)["RAY_SERVE_HAPROXY_NBTHREAD"] == threads


def test_the_fast_path_is_on() -> None:
    settings = serve_settings(2)
    assert settings["RAY_SERVE_ENABLE_HA_PROXY"] == "1"
    assert settings["RAY_SERVE_THROUGHPUT_OPTIMIZED"] == "1"


def test_two_servers_share_no_file_and_no_port() -> None:
    first = private_places(Path("/tmp/pio-a"), (1, 2))
    second = private_places(Path("/tmp/pio-b"), (3, 4))
    assert first.keys() == second.keys()
    assert not set(first.values()) & set(second.values())


def test_sockets_fit_into_a_unix_address() -> None:
    places = private_places(Path("/tmp/pio-abcdefgh"), (1, 2))
    for name in ("RAY_SERVE_HAPROXY_SOCKET_PATH", "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH"):
        path = Path(places[name])
        assert len(str(path.parent / NODE_ID / path.name) + HAPROXY_SUFFIX) <= LONGEST_SOCKET


def test_the_reason_is_the_last_exception_of_a_remote_traceback() -> None:
    messages = [
        "Failed to update the deployments ['engine'].",
        "The deployment failed to start 3 times in a row.\nTraceback (most recent call last):\n"
        '  File "x.py", line 1, in y\nRuntimeError: Traceback (most recent call last):\n'
        "inference_pio.workers.model.config.CheckpointError: config.json is missing",
    ]
    reason = "inference_pio.workers.model.config.CheckpointError: config.json is missing"
    assert failure_reason(messages) == reason


@pytest.mark.parametrize(
    ("messages", "reason"), [(["", "  no room \nmore"], "no room"), ([""], "no reason was given")]
)
def test_without_an_exception_the_first_line_is_the_reason(
    messages: list[str], reason: str
) -> None:
    assert failure_reason(messages) == reason
