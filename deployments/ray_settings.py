"""Ray's and Serve's settings, which their processes read once from the environment at start."""

from __future__ import annotations

import os
from pathlib import Path


def common_settings(cores: int) -> dict[str, str]:
    """What holds on one machine and on every node of a cluster."""
    return {
        # The data path: 54k instead of 5k tokens/s at 64 streams.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, cores // 4))),
        # A dead proxy is back after 4 s instead of 24.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
        # Ray starts its workers at niceness 15, so that anything else on the machine would slow
        # down an engine to a fraction.
        "RAY_worker_niceness": "0",
        # Log lines arrive as they are written, not merged with similar ones.
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def serve_settings(cores: int) -> dict[str, str]:
    """All settings of a server on one machine."""
    return common_settings(cores) | {
        # Replicas finish their requests before they go; the 30 s that Serve adds are for load
        # balancers on other machines.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # Ray listens on loopback, as it does by default on desktop systems; on Linux it would
        # take the address that other machines see.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    }


def cluster_settings(cores: int) -> dict[str, str]:
    """All settings of a node in a cluster."""
    return common_settings(cores) | {
        # Every node and client shows the token in ~/.ray/auth_token; without it nobody gets in.
        "RAY_AUTH_MODE": "token",
    }


def private_files(folder: Path) -> dict[str, str]:
    """Where HAProxy keeps its files: by default in a folder that everybody can write to.

    ``folder`` is short: with a node's id put in, a socket's path has 107 characters at most.
    """
    files = folder / "ha"
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
    }


def usable_cores() -> int:
    """CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
