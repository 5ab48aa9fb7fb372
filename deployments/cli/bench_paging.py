"""``inference-pio bench paging``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ...benchmarks import paging
from ...workers.config import EngineConfig
from ...workers.model.cache import KVCache
from ...workers.model.config import DTYPES, ModelConfig
from ...workers.model_source import resolve_model
from .bench_runs import check_picture, publish, typed_command
from .console import CommandError, progress


def run_paging(
    model: str,
    dtype: str,
    lengths: Sequence[int],
    threads: int | None,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure what KV paging saves and costs on this machine; see ``benchmarks.paging``."""
    check_picture(picture)
    base: dict[str, Any] = {"model": model, "dtype": dtype, "num_threads": threads}
    config = EngineConfig.model_validate(base)
    shapes = ModelConfig.from_folder(resolve_model(model))
    if dtype != "auto":
        shapes = replace(shapes, dtype=DTYPES[config.dtype])
    if not 2 * config.block_size <= min(lengths) <= max(lengths) < shapes.max_position_embeddings:
        raise CommandError(
            f"--lengths are from {2 * config.block_size} to {shapes.max_position_embeddings - 1} "
            "for this model"
        )
    block_bytes = KVCache.bytes_per_block(shapes, config.block_size, shapes.dtype)
    with progress() as say:
        measured = paging.measure(base, lengths, rounds, block_bytes, say)
    precision = str(shapes.dtype).removeprefix("torch.")
    publish(paging.rows(measured, precision, typed_command()), json_file, picture)
