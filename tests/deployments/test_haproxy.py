from __future__ import annotations

import subprocess
from pathlib import Path

from inference_pio.deployments.haproxy import write_wrapper


def test_the_wrapper_is_the_same_haproxy(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    folder.mkdir()
    wrapper = write_wrapper(folder)
    answer = subprocess.run([wrapper, "-v"], capture_output=True, text=True, check=True)
    assert answer.stdout.startswith("HAProxy version")


def test_pages_without_an_address_stay_on_this_machine(tmp_path: Path) -> None:
    config = tmp_path / "haproxy.cfg"
    lines = ["defaults", "  mode http", "  timeout client 1s", "  timeout connect 1s"]
    lines += ["  timeout server 1s", "frontend a", "    bind :4001", "frontend b", "  bind *:4002"]
    lines += ["frontend c", "    bind 0.0.0.0:4003", ""]
    config.write_text("\n".join(lines))
    wrapper = write_wrapper(tmp_path)
    subprocess.run([wrapper, "-c", "-f", config], capture_output=True, check=True)
    changed = config.read_text()
    assert "bind 127.0.0.1:4001" in changed
    assert "bind 127.0.0.1:4002" in changed
    assert "bind 0.0.0.0:4003" in changed  # an address that somebody chose
