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

import httpx
import psutil

from ..workers.config import EngineConfig
from ..workers.kv.ticket import KVLayout
from . import haproxy
from .application_file import Application, read_shapes
from .check.demand import total_demand, whole
from .config import ServiceConfig, load_api_keys
from .kv_transport import MAX_PULLS, WINDOW_BYTES
from .local_ports import free_ports, is_answering, require_free_port
from .own_processes import adopt_orphans, descendants, end_descendants, is_alive
from .ray_settings import private_files, serve_settings, usable_cores

START_TIMEOUT_S = 600.0
"""Loading 4B parameters from a slow disk takes minutes; a start longer than this is a hang."""

STOP_TIMEOUT_S = 20.0
"""For Serve to drain and Ray to stop before what is left is killed."""

OBJECT_STORE_BYTES = 128 * 2**20
"""Where no KV travels nothing large passes through it; Ray's own default is 30 % of the memory."""

Progress = Callable[[str], None]


_EXCEPTION_LINE = re.compile(r"[\w.]+(Error|Exception): ")


class LaunchError(RuntimeError):
    """The service could not be started; the message says why."""


def private_places(folder: Path, ports: tuple[int, int, int]) -> dict[str, str]:
    """Where this server's HAProxy keeps its files, shows its statistics and finds Serve's proxy.

    By default all are fixed, so that two servers would meet: of two proxies on one port each gets
    some of the other server's requests.
    """
    return private_files(folder) | {
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(ports[0]),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(ports[1]),
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(ports[2]),
    }


def logical_resources(config: ServiceConfig, cores: int) -> tuple[int, dict[str, float]]:
    """CPUs and custom resources that Ray is told this machine has: what the pools ask for.

    They only choose between nodes, and there is one; threads are set by the engine. GPUs are real,
    Ray finds them itself, as it does a node's own name (``node:…``).
    """
    wanted = whole(total_demand(config))
    cpus = max(4, cores, wanted.pop("CPU", 0))
    custom = {k: float(v) for k, v in wanted.items() if k != "GPU" and not k.startswith("node:")}
    return cpus, custom


def object_store_bytes(config: ServiceConfig, memory: int, shared_memory: int) -> int:
    """The object store's size on a machine with so much memory and free shared memory.

    Every decode replica that takes KV by it has room for the handoffs that it pulls at once, each
    with one window of KV, or one step's where that is more. Bounded by 30 % of the memory, as Ray's
    own default, and 80 % of the shared memory, in which the store lies.
    """
    size = OBJECT_STORE_BYTES
    sources = {pool.name: config.engine_of(pool) for pool in config.pools}
    for pool in config.serving_pools:
        if pool.prefill is not None and pool.prefill.transport == "object_store":
            source = sources[pool.prefill.pool]
            step = source.max_batched_tokens * kv_bytes_per_token(source)
            size += pool.replicas * MAX_PULLS * max(WINDOW_BYTES, step)
    bound = int(min(0.3 * memory, 0.8 * shared_memory))
    return max(OBJECT_STORE_BYTES, min(size, bound))


def kv_bytes_per_token(engine: EngineConfig) -> int:
    """KV of one token over all layers, from the checkpoint's shapes."""
    shapes = read_shapes(engine.model)
    dtype = engine.dtype
    if dtype == "auto":
        dtype = shapes.get("dtype", shapes.get("torch_dtype", "float32"))
    heads = shapes["num_attention_heads"]
    head_dim = shapes.get("head_dim") or shapes["hidden_size"] // heads
    kv_heads = shapes.get("num_key_value_heads") or heads
    kept_as = dtype if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype
    layout = KVLayout(bytes(32), kept_as, shapes["num_hidden_layers"], kv_heads, head_dim, 1)
    return layout.bytes_per_block


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

    def kernels(self) -> tuple[str, ...]:
        """What the pools compute with, each name once, as ``/version`` tells."""
        keys = load_api_keys(self._application.config.api)
        headers = {"Authorization": f"Bearer {keys[0]}"} if keys else {}
        answer = httpx.get(f"{self.address}/version", headers=headers, trust_env=False)
        return tuple(sorted(set(answer.raise_for_status().json()["kernels"].values())))

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
        metrics, statistics, proxy = free_ports(3)
        os.environ.update(private_places(self._folder, (metrics, statistics, proxy)))
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
        config = self._application.config
        cpus, resources = logical_resources(config, usable_cores())
        ray.init(
            address="local",
            num_cpus=cpus,
            resources=resources,
            include_dashboard=False,
            object_store_memory=object_store_bytes(
                config, psutil.virtual_memory().total, shutil.disk_usage("/dev/shm").free
            ),
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
