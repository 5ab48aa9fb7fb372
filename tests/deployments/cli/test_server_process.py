"""``inference-pio serve`` as an operator meets it: a real process, real signals, nothing left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from inference_pio.deployments.cli.talk import Manner
from inference_pio.deployments.cli.talk_http import HttpTalker
from inference_pio.deployments.local_ports import free_ports, is_answering

COMMAND = str(Path(sys.executable).with_name("inference-pio"))
START_S = 120
STOP_S = 60


@dataclass
class Served:
    """A server process, and every process that was seen below it."""

    process: subprocess.Popen[str]
    port: int
    family: list[psutil.Process]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def note_family(self) -> None:
        self.family = psutil.Process(self.process.pid).children(recursive=True)

    def alive(self) -> list[str]:
        """Names of those that still run."""
        return [p.name() for p in self.family if p.is_running() and p.status() != "zombie"]

    def private_folders(self) -> list[Path]:
        """The temporary folders that these processes were started with."""
        words = {word for process in self.family for word in command_line(process)}
        found = {Path(*Path(word).parts[:3]) for word in words if word.startswith("/tmp/pio-")}
        return sorted(found)


@contextmanager
def starting(log_file: Path) -> Iterator[Served]:
    """A server that was just started; nothing of it is left at the end."""
    port = free_ports(1)[0]
    with log_file.open("w") as log:
        process = subprocess.Popen(
            [COMMAND, "serve", "--port", str(port)],
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        server = Served(process, port, [])
        try:
            yield server
        finally:
            if process.poll() is None:
                server.note_family()
                process.kill()
            process.wait()
            for left in server.family:
                if left.is_running():
                    left.kill()


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with starting(tmp_path / "log") as server:
        yield server


@pytest.fixture(scope="module")
def last_served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """One that is ready, and that only the last test which uses it ends."""
    with starting(tmp_path_factory.mktemp("served") / "log") as server:
        wait_until_ready(server)
        yield server


def command_line(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.NoSuchProcess:
        return []


def wait_until_ready(server: Served) -> None:
    deadline = time.monotonic() + START_S
    while not is_answering(f"{server.url}/health"):
        assert server.process.poll() is None, "the server ended while it started"
        assert time.monotonic() < deadline, "the server did not become healthy"
        time.sleep(0.2)
    server.note_family()


def listening_addresses(server: Served) -> dict[str, set[str]]:
    """Process name to the addresses it listens on."""
    found: dict[str, set[str]] = {}
    server.note_family()
    for process in server.family:
        for connection in connections(process):
            if connection.status == psutil.CONN_LISTEN:
                found.setdefault(process.name(), set()).add(connection.laddr.ip)
    return found


def connections(process: psutil.Process) -> list[Any]:
    try:
        return list(process.net_connections("tcp"))
    except psutil.NoSuchProcess:
        return []  # a worker that only built the application


def test_no_port_but_the_service_is_open_to_other_machines(last_served: Served) -> None:
    addresses = listening_addresses(last_served)
    outside = {
        name: ips
        for name, found in addresses.items()
        if (ips := {ip for ip in found if ip.removeprefix("::ffff:") not in ("127.0.0.1", "::1")})
    }
    assert not outside, f"listening for other machines: {outside}"


def test_a_server_serves_and_sigterm_leaves_nothing(last_served: Served, tmp_path: Path) -> None:
    served = last_served
    served.note_family()
    folders = served.private_folders()
    assert len(folders) == 1

    question = {"role": "user", "content": "What is 12 + 34 - 5?"}
    with HttpTalker(served.url) as talker:
        assert talker.name == "embedded"
        for thinking in (True, False):
            pieces = list(talker.reply([question], Manner(thinking=thinking, temperature=0.0)))
            assert bool("".join(piece.reasoning for piece in pieces)) == thinking
            answer = "".join(piece.content for piece in pieces)
            assert answer == "41" if thinking else answer

    report = tmp_path / "serve.json"
    words = ["bench", "serve", "--url", served.url, "--streams", "2", "--requests", "4"]
    words += ["--max-tokens", "8", "--rounds", "1", "--json", str(report)]
    subprocess.run([COMMAND, *words], check=True, timeout=120, capture_output=True)
    rows = json.loads(report.read_text())["rows"]
    assert {row["benchmark"] for row in rows} == {"serve"}
    assert str(tmp_path) not in report.read_text()

    refused = subprocess.run(
        [COMMAND, "serve", "--port", str(served.port)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert refused.returncode == 1
    assert f"cannot listen on 127.0.0.1:{served.port}" in refused.stderr

    served.process.send_signal(signal.SIGTERM)
    assert served.process.wait(STOP_S) == 0
    assert served.alive() == []
    assert not folders[0].exists()
    assert not is_answering(f"{served.url}/health")


def test_ctrl_c_while_ray_starts_leaves_nothing(served: Served) -> None:
    names: set[str] = set()
    deadline = time.monotonic() + START_S
    while "raylet" not in names:
        assert time.monotonic() < deadline
        time.sleep(0.05)
        served.note_family()
        names = {process.name() for process in served.family if process.is_running()}
    folders = served.private_folders()
    served.process.send_signal(signal.SIGINT)
    assert served.process.wait(STOP_S) == 0
    assert served.alive() == []
    assert not any(folder.exists() for folder in folders)


@pytest.mark.slow
def test_sigterm_to_the_whole_group_leaves_nothing(served: Served) -> None:
    wait_until_ready(served)
    os.killpg(served.process.pid, signal.SIGTERM)  # as timeout(1) and systemd do
    assert served.process.wait(STOP_S) == 0
    assert served.alive() == []
