"""What an engine takes of memory, measured in a fresh process for each configuration.

The process is asked for its resident memory after each stage of building the engine
(``staged_engine``); the difference between two stages is what the later one took. On a CUDA device
the allocator of torch is asked as well.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from ..workers.config import EngineConfig, QuantizationName
from ..workers.model.loader import weight_files
from ..workers.model.quantization.detect import layout_of_folder
from ..workers.model.quantization.quantize import MADE_FORMATS
from ..workers.model_source import resolve_model
from .engine_process import EngineProcess
from .report import Row, of_rounds
from .staged_engine import Filled, Stages

BENCHMARK = "memory"
MIB = 2**20
KV_BYTES = 256 * MIB
"""Of the pool: filled in seconds, and large against what else changes."""
SEQUENCES = 8

Figures = Mapping[tuple[str, str], float]
"""By case and unit."""


def formats_of(model: str) -> tuple[QuantizationName, ...]:
    """What a checkpoint can be loaded as: one that is quantized already is as it is."""
    if layout_of_folder(resolve_model(model)) is not None:
        return ("none",)
    return ("none", *MADE_FORMATS)


def configuration(
    model: str,
    dtype: str,
    quantization: str,
    threads: int | None,
    *,
    kv_bytes: int = KV_BYTES,
    sequences: int = SEQUENCES,
) -> EngineConfig:
    """The engine that is measured. Raises ``ValueError`` for settings that cannot be."""
    return EngineConfig.model_validate(
        {
            "model": model,
            "dtype": dtype,
            "quantization": quantization,
            "num_threads": threads,
            "kv_cache_bytes": kv_bytes,
            "max_num_seqs": sequences,
            "prefix_caching": False,
        }
    )


def measure(
    configs: Mapping[str, EngineConfig], rounds: int, progress: Callable[[str], None]
) -> dict[str, list[Figures]]:
    """Load and fill each engine, ``rounds`` times; the figures by its name.

    Raises ``ValueError`` for a configuration that cannot be loaded.
    """
    found: dict[str, list[Figures]] = {name: [] for name in configs}
    for number in range(rounds):
        for name, config in configs.items():
            progress(f"{name}, round {number + 1} of {rounds}")
            with EngineProcess(name, config) as process:
                found[name].append(figures(process.stages, process.fill(), config))
    return found


def figures(stages: Stages, filled: Filled, config: EngineConfig) -> Figures:
    """What each part took, in MiB, and the KV of a token in bytes."""
    on_device = stages.weights.device > 0
    host = {
        "weights": stages.weights.total - stages.text.total,
        "KV cache": stages.kv.total - stages.weights.total,
        "steady": filled.full.total,
        "steady, shared pages divided": filled.full.proportional,
        "left free by loading": stages.loaded.total - stages.weights.total,
        "peak while loading": stages.loaded.peak,
        "peak": filled.full.peak,
    }
    device = {
        "weights": stages.weights.device,
        "KV cache": stages.kv.device - stages.weights.device,
        "steady": filled.full.device,
        "peak": filled.full.device_peak,
    }
    for part in (host, device):
        part["rest"] = part["steady"] - part["weights"] - part["KV cache"]
    kv = device["KV cache"] if on_device else host["KV cache"]
    found = {(name, "MiB"): size / MIB for name, size in host.items()}
    if on_device:
        found |= {(f"{name}, on the device", "MiB"): size / MIB for name, size in device.items()}
    found["weight files", "MiB"] = file_bytes(resolve_model(config.model)) / MIB
    found["KV cache", "bytes/token"] = kv / filled.capacity
    found["tokens held at once", "tokens"] = float(filled.tokens)
    return found


def file_bytes(folder: Path) -> int:
    """What the checkpoint's weight files take. Raises ``CheckpointError``."""
    return sum(path.stat().st_size for path in weight_files(folder))


def rows(measured: Mapping[str, Sequence[Figures]], command: str) -> list[Row]:
    """A row for each figure of each configuration, which is the system, over its rounds."""
    row = partial(Row.of, benchmark=BENCHMARK, command=command)
    return [
        row(
            of_rounds([one[case, unit] for one in all_rounds]),
            system=name,
            precision=name,
            case=case,
            unit=unit,
        )
        for name, all_rounds in measured.items()
        for case, unit in all_rounds[0]
    ]
