"""A node of the cluster dies under running streams: they go on elsewhere, word for word."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_streams_survive_the_loss_of_a_node() -> None:
    script = Path(__file__).with_name("node_session.py")
    # A short path: Ray's sockets have 107 characters at most.
    with tempfile.TemporaryDirectory(prefix="pio-", dir="/tmp") as folder:
        done = subprocess.run(
            [sys.executable, str(script), folder], capture_output=True, text=True, timeout=550
        )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["nodes"] == 2, "the engines shared a node"
    assert found["lost_pids_alive"] == [], "the fault did not happen"
    assert found["moved"], "no stream was moved: the lost node served none"
    assert found["broken"] == found["unbroken"]
    assert found["again"] == found["unbroken"]
    assert all(text and not text.startswith("error") for text in found["unbroken"])
