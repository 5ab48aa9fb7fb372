"""Ranks as subprocesses of this one.

They end with it: when their connection to rank 0 breaks, however it ended.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence

import torch

from .launcher import RankSpec

_MODULE = f"{__package__}.rank_process"


class LocalRank:
    """A started subprocess."""

    def __init__(self, spec: RankSpec, environment: dict[str, str]) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", _MODULE],
            stdin=subprocess.PIPE,
            env=environment,
            text=True,
            start_new_session=True,  # Ctrl-C is for rank 0, which then ends its ranks in order
        )
        assert self._process.stdin is not None
        with self._process.stdin as stdin:
            stdin.write(spec.to_json())

    @property
    def pid(self) -> int:
        return self._process.pid

    def is_alive(self) -> bool:
        """See ``RankHandle.is_alive``."""
        return self._process.poll() is None

    def kill(self) -> None:
        """See ``RankHandle.kill``; the process is gone when this returns."""
        self._process.kill()
        self._process.wait()


class LocalRanks:
    """Starts ranks on this machine; on GPUs, rank ``r`` has the ``r``-th that is visible here."""

    host = "127.0.0.1"

    def start(self, specs: Sequence[RankSpec]) -> list[LocalRank]:
        """See ``RankLauncher.start``. Raises ``ValueError`` where GPUs are too few."""
        ranks: list[LocalRank] = []
        try:
            for spec in specs:
                ranks.append(LocalRank(spec, _environment(spec)))
        except BaseException:
            for rank in ranks:
                rank.kill()
            raise
        return ranks


def _environment(spec: RankSpec) -> dict[str, str]:
    environment = dict(os.environ)
    if spec.config.device == "cpu" or not torch.cuda.is_available():
        return environment
    count, wanted = torch.cuda.device_count(), spec.shard.num_ranks
    if count < wanted:
        raise ValueError(f"{wanted} ranks need a GPU each, {count} are visible here")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(count)))
    environment["CUDA_VISIBLE_DEVICES"] = visible.split(",")[spec.shard.rank]
    return environment
