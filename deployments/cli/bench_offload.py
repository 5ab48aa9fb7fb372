"""``inference-pio bench offload``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ...benchmarks import offload
from ...workers.config import EngineConfig
from ...workers.model.config import ModelConfig
from ...workers.model_source import resolve_model
from .bench_runs import check_picture, publish, typed_command
from .console import CommandError, progress

SHARES = (0.5, 0.0)


def run_offload(
    model: str,
    engine: Mapping[str, Any],
    shares: Sequence[float],
    threads: int | None,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure engines with some layers on the disk; see ``benchmarks.offload``."""
    check_picture(picture)
    if "weight_memory_bytes" in engine:
        raise CommandError("--keep says what stays in memory; leave weight_memory_bytes out")
    config = EngineConfig.model_validate(
        {
            "model": model,
            "num_threads": threads,
            "kv_cache_bytes": offload.KV_BYTES,
            "max_num_seqs": max(case.size for case in offload.CASES if case.kind == "decode"),
            "prefix_caching": False,
            **engine,
        }
    )
    shapes = ModelConfig.from_folder(resolve_model(model))
    with progress() as say:
        say("asking for the size of a layer")
        engines = offload.limited_engines(config, offload.sizes_of(config), shares or SHARES)
        outcomes = offload.measure(engines, offload.CASES, rounds, say)
    precision = config.dtype if config.dtype != "auto" else str(shapes.dtype)
    if config.quantization != "none":
        precision = config.quantization
    found = offload.rows(engines, outcomes, precision.removeprefix("torch."), typed_command())
    publish(found, json_file, picture, notes=offload.notes(engines, outcomes))
