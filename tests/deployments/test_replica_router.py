"""The request router in a real Ray Serve session: two replicas that say who they are."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("router_session.py")


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(
        prefix="pio", dir="/tmp", ignore_cleanup_errors=True
    ) as folder:
        run = subprocess.run(
            [sys.executable, str(SCRIPT), folder], capture_output=True, text=True, timeout=240
        )
    lines = [line for line in run.stdout.splitlines() if line.startswith("FOUND")]
    assert lines, f"the session failed:\n{run.stdout[-2000:]}\n{run.stderr[-4000:]}"
    return dict(json.loads(lines[0].removeprefix("FOUND")))


def test_a_prefix_and_a_session_stay_with_their_replica(found: dict[str, Any]) -> None:
    assert len(found["replicas"]) == 2
    assert found["prefixes_again"] == found["prefixes"]
    assert found["sessions"] == found["homes"]


def test_a_burst_is_spread(found: dict[str, Any]) -> None:
    counts = Counter(found["burst"])
    assert set(counts) == set(found["replicas"])
    assert min(counts.values()) >= 10


def test_calls_reach_the_replica_they_are_aimed_at(found: dict[str, Any]) -> None:
    assert found["aimed"] == found["replicas"] * 2


def test_a_replica_to_avoid_is_avoided(found: dict[str, Any]) -> None:
    assert set(found["avoiding"]) == {found["replicas"][1]}


def test_reported_load_outweighs_a_prefix(found: dict[str, Any]) -> None:
    assert found["left_a_hot_replica"]
    assert found["came_back"]


def test_a_dead_replica_drops_out_and_is_replaced(found: dict[str, Any]) -> None:
    assert "died" in found["death"].lower() or "unavailable" in found["death"].lower()
    assert set(found["after_death"]) == {found["replicas"][1]}
    assert found["aimed_at_the_dead"] == found["replicas"][1]
    assert found["replaced"]


def test_it_is_known_when_no_replica_is_left(found: dict[str, Any]) -> None:
    assert found["has_replica"] == [True, False, True]
