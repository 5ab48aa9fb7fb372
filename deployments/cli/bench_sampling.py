"""``inference-pio bench sampling``."""

from __future__ import annotations

from pathlib import Path

import torch

from ...benchmarks import sampling
from .bench_runs import check_picture, publish, typed_command
from .console import progress


def run_sampling(
    threads: int | None, rounds: int, json_file: Path | None, picture: Path | None
) -> None:
    """Measure what sampling costs a step on this machine; see ``benchmarks.sampling``."""
    check_picture(picture)
    if threads is not None:
        torch.set_num_threads(threads)
    with progress() as say:
        cost = sampling.measure(rounds, say)
    publish(sampling.rows(cost, typed_command()), json_file, picture)
