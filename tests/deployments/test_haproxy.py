from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import psutil

from inference_pio.deployments.haproxy import write_wrapper
from inference_pio.deployments.own_processes import is_alive


def test_the_wrapper_is_the_same_haproxy(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    wrapper = write_wrapper(folder)
    answer = subprocess.run([wrapper, "-v"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("HAProxy version")


def test_statistics_stay_on_this_machine_and_the_service_where_it_was_put(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    lines = ["defaults", "  mode http", "  timeout client 1s", "  timeout connect 1s"]
    lines += ["  timeout server 1s", "frontend prometheus", "    bind :4001"]
    lines += ["frontend http_frontend", "    bind *:4002"]
    lines += [
        "frontend grpc_frontend",
        "    bind 0.0.0.0:4003",
        "listen stats",
        "  bind *:4004",
        "",
    ]
    config.write_text("\n".join(lines))
    wrapper = write_wrapper(tmp_path)
    subprocess.run([wrapper, "-c", "-f", config], capture_output=True, check=True)
    changed = config.read_text()
    assert "bind 127.0.0.1:4001" in changed
    assert "bind 127.0.0.1:4004" in changed
    assert "bind *:4002" in changed  # every interface, as --host 0.0.0.0 asks
    assert "bind 0.0.0.0:4003" in changed


def test_serve_still_names_those_sections_so() -> None:
    # Read, not imported: Serve's modules warn, and warnings are errors here.
    ray = find_spec("ray")
    assert ray is not None
    assert ray.origin is not None
    template = (Path(ray.origin).parent / "serve/_private/haproxy_templates.py").read_text()
    assert re.search(r"^frontend prometheus\n +bind :", template, re.MULTILINE)
    assert re.search(r"^listen stats\n +bind \*:", template, re.MULTILINE)


def test_haproxy_ends_with_whoever_started_it(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    lines = ["defaults", "  mode http", "  timeout client 1s", "  timeout connect 1s"]
    lines += ["  timeout server 1s", "frontend a", f"  bind unix@{tmp_path}/socket", ""]
    config.write_text("\n".join(lines))
    command = [str(write_wrapper(tmp_path)), "-db", "-f", str(config)]
    starter = (
        f"import subprocess, time; started = subprocess.Popen({command!r}); "
        "print(started.pid, flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", starter], stdout=subprocess.PIPE, text=True
    ) as parent:
        assert parent.stdout is not None
        haproxy = psutil.Process(int(parent.stdout.readline()))
        wait_until(lambda: (tmp_path / "socket").exists())
        assert haproxy.is_running()
        parent.kill()
    wait_until(lambda: not is_alive(haproxy))


def wait_until(is_so: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not is_so():
        assert time.monotonic() < end
        time.sleep(0.02)
