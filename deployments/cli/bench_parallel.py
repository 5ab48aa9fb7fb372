"""``inference-pio bench parallel``."""

from __future__ import annotations

from pathlib import Path

from ...benchmarks import parallel
from ...workers.config import EngineConfig
from .bench_runs import check_picture, publish, typed_command
from .console import progress

KV_BYTES = 2**29
"""Of each rank: the few short sequences that are decoded."""


def run_parallel(
    model: str,
    dtype: str,
    tensor: int,
    pipeline: int,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure the control cost of a grid on this machine; see ``benchmarks.parallel``."""
    check_picture(picture)
    config = EngineConfig.model_validate(
        {
            "model": model,
            "dtype": dtype,
            "kv_cache_bytes": KV_BYTES,
            "parallel": {"tensor": tensor, "pipeline": pipeline},
        }
    )
    with progress() as say:
        cost = parallel.measure(config, rounds, say)
    publish(parallel.rows(cost, typed_command()), json_file, picture)
