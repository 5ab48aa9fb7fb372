"""Runs the whole service on this machine, and leaves nothing behind.

1. The application file is read, the command line put in, and everything that can be wrong before
   Ray starts is checked: configuration, checkpoint folder, port.
2. Serve's flags go into the environment; Ray reads them once, when its processes start.
3. A local Ray starts on loopback in a private folder, so that servers do not meet each other.
4. The application is deployed as ``serve deploy`` would do it, and ``/health`` asked until it
   answers 200.
5. A signal ends it: Serve and Ray are shut down, within bounds; whatever process of ours is still
   there is ended, and the folder removed.
"""

from __future__ import annotations

import io
import logging
import os
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

from . import haproxy
from .application_file import Application
from .local_ports import free_ports, is_answering, require_free_port
from .own_processes import adopt_orphans, descendants, end_descendants, is_alive

START_TIMEOUT_S = 600.0
"""Loading 4B parameters from a slow disk takes minutes; a start longer than this is a hang."""

STOP_TIMEOUT_S = 20.0
"""For Serve to drain and Ray to stop before what is left is killed."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Nothing large passes through it on one machine; Ray's own default is 30 % of the memory."""

Progress = Callable[[str], None]


_EXCEPTION_LINE = re.compile(r"[\w.]+(Error|Exception): ")


class LaunchError(RuntimeError):
    """The service could not be started; the message says why."""


def serve_settings(cores: int) -> dict[str, str]:
    """Ray's and Serve's settings for one machine; a value already in the environment wins."""
    return {
        # The data path: 54k instead of 5k tokens/s at 64 streams.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_HAPROXY_NBTHREAD": str(max(1, min(4, cores // 4))),
        # A dead proxy is back after 4 s instead of 24.
        "RAY_SERVE_PROXY_HEALTH_CHECK_PERIOD_S": "1",
        "RAY_SERVE_PROXY_HEALTH_CHECK_TIMEOUT_S": "2",
        # Replicas finish their requests before they go; the 30 s that Serve adds are for load
        # balancers on other machines.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        # Ray listens on loopback, as it does by default on desktop systems; on Linux it would
        # take the address that other machines see.
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        # Log lines arrive as they are written, not merged with similar ones.
        "RAY_DEDUP_LOGS": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    }


def private_places(folder: Path, ports: tuple[int, int]) -> dict[str, str]:
    """Where this server's HAProxy keeps its files and shows its statistics.

    By default both are fixed, so that two servers would meet, and the sockets lie in a folder
    that everybody can write to.
    """
    files = folder / "haproxy"
    return {
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": str(files / "haproxy.cfg"),
        "RAY_SERVE_HAPROXY_SOCKET_PATH": str(files / "admin.sock"),
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": str(files / "metrics.sock"),
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(files),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": str(files / "server-state"),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
    }


def usable_cores() -> int:
    """CPU cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LocalServer:
    """One service on this machine; a context manager that ends everything it started."""

    def __init__(self, application: Application, *, show_logs: bool = False) -> None:
        """``show_logs`` passes the replicas' log lines on to this terminal."""
        self._application = application
        self._show_logs = show_logs
        self._folder: Path | None = None
        self._vital: list[psutil.Process] = []
        self.stopped_orderly = True
        """``False`` after Ray had to be killed: its exit handlers would wait for what is gone."""

    @property
    def is_alive(self) -> bool:
        """Whether Ray's own processes are all there."""
        return bool(self._vital) and all(is_alive(process) for process in self._vital)

    @property
    def address(self) -> str:
        """Where clients reach the service."""
        host, port = self._application.host, self._application.port
        reachable = "127.0.0.1" if host in ("0.0.0.0", "::", "") else host
        return f"http://{reachable}:{port}"

    def __enter__(self) -> Self:
        require_free_port(self._application.host, self._application.port)
        adopt_orphans()
        # Ray's socket paths have 107 characters at most, which longer temporary folders exceed.
        self._folder = Path(tempfile.mkdtemp(prefix="pio-", dir="/tmp"))
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        error: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        # In a thread, and only while Ray lives: its shutdown waits for ever on a dead one, and a
        # signal to the whole process group (timeout(1), systemd) reaches Ray as well.
        orderly = threading.Thread(target=_shut_down_ray, daemon=True)
        orderly.start()
        deadline = time.monotonic() + STOP_TIMEOUT_S
        # Serve kills its controller while a call to it is open; Ray would print that as a failure.
        with redirect_stderr(io.StringIO()), redirect_stdout(io.StringIO()):
            while orderly.is_alive() and self.is_alive and time.monotonic() < deadline:
                orderly.join(0.1)
        self.stopped_orderly = not orderly.is_alive()
        end_descendants(grace_s=3.0)
        if self._folder is not None and not isinstance(error, LaunchError):
            shutil.rmtree(self._folder, ignore_errors=True)

    def start(self, progress: Progress) -> None:
        """Start everything and return once ``/health`` answers 200.

        Raises ``LaunchError`` with the reason and the place of the logs.
        """
        assert self._folder is not None, "used as a context manager"
        metrics, statistics = free_ports(2)
        os.environ.update(private_places(self._folder, (metrics, statistics)))
        for name, value in serve_settings(usable_cores()).items():
            os.environ.setdefault(name, value)
        os.environ.setdefault(haproxy.BINARY_SETTING, str(haproxy.write_wrapper(self._folder)))
        progress("starting Ray")
        self._start_ray()
        progress("starting the service")
        self._deploy()
        self._wait_until_healthy()

    def _start_ray(self) -> None:
        # Imported here: Serve reads its flags at import, and a command that starts no server
        # should not wait for Ray.
        import ray

        on_term = signal.getsignal(signal.SIGTERM)
        ray.init(
            address="local",
            # Logical CPUs: replicas count theirs, threads are set by the engine.
            num_cpus=max(4, usable_cores()),
            include_dashboard=False,
            object_store_memory=OBJECT_STORE_BYTES,
            namespace="serve",
            logging_level=logging.ERROR,
            log_to_driver=self._show_logs,
            _temp_dir=str(self._folder),
        )
        # Ray puts its own handler there, which would end this process without cleaning up.
        signal.signal(signal.SIGTERM, on_term)
        self._vital = [p for p in descendants() if p.name() in ("raylet", "gcs_server")]

    def _deploy(self) -> None:
        from ray.serve._private.api import serve_start
        from ray.serve.schema import LoggingConfig, ServeDeploySchema

        logging.getLogger("ray.serve").setLevel(logging.WARNING)
        # The call behind ``serve run FILE``: the same file serves here and on a cluster.
        schema = ServeDeploySchema.model_validate(self._application.document)
        client = serve_start(
            http_options=schema.http_options.model_dump(),
            proxy_location=schema.proxy_location,
            # Serve's own lines say nothing at "info" that the progress does not.
            global_logging_config=schema.logging_config or LoggingConfig(log_level="WARNING"),
        )
        client.deploy_apps(schema)

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_TIMEOUT_S
        while not is_answering(f"{self.address}/health"):
            self._raise_if_failed()
            if time.monotonic() > deadline:
                raise LaunchError(f"not healthy after {START_TIMEOUT_S:.0f} s; {self._log_hint}")
            time.sleep(0.1)

    def _raise_if_failed(self) -> None:
        from ray import serve

        for name, state in serve.status().applications.items():
            if state.status == "DEPLOY_FAILED":
                messages = [state.message, *(d.message for d in state.deployments.values())]
                raise LaunchError(
                    f"application {name!r} did not start: {failure_reason(messages)}; "
                    f"{self._log_hint}"
                )

    @property
    def _log_hint(self) -> str:
        return f"logs are under {self._folder}/session_latest/logs"


def _shut_down_ray() -> None:
    if "ray" not in sys.modules:
        return  # stopped before it was started
    import ray
    from ray import serve

    if ray.is_initialized():
        serve.shutdown()  # type: ignore[no-untyped-call]
        ray.shutdown()


def failure_reason(messages: Sequence[str]) -> str:
    """The error itself out of Serve's status messages, which hold remote tracebacks.

    The last line that names an exception says what happened in our code; without one the first
    line says what Serve has to say.
    """
    lines = [line.strip() for message in messages for line in message.splitlines()]
    errors = [line for line in lines if _EXCEPTION_LINE.match(line)]
    return (errors or [line for line in lines if line] or ["no reason was given"])[
        -1 if errors else 0
    ]
