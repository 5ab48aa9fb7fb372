"""One cluster of three hosts for all tests of this folder."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from .hosts import HOME, Hosts, missing
from .ray_cluster import RayCluster

RESOURCES = {"host1": {"decode": 1.0}, "host2": {"prefill": 1.0}, "host3": {"decode": 1.0}}


@pytest.fixture(scope="session")
def hosts() -> Iterator[Hosts]:
    """Three hosts, or a skip that names what this machine lacks for them."""
    if (reason := missing()) is not None:
        pytest.skip(reason)
    # The interpreter that the virtual environments point to may lie in root's home.
    keep = [p for p in {Path(sys.base_prefix), Path(sys.prefix)} if p.is_relative_to(HOME)]
    with Hosts(3, keep) as built:
        yield built


@pytest.fixture(scope="session")
def cluster(hosts: Hosts) -> RayCluster:
    """Ray on all three; the test of ``ray down`` ends it."""
    launched = RayCluster(hosts, RESOURCES)
    launched.up()
    return launched
