"""``inference-pio bench kernels``."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import torch

from ...benchmarks import kernels, kernels_attention, kernels_linear, kernels_rows
from ...benchmarks.floor import FloorProbe
from ...workers.config import EngineConfig, QuantizationName
from ...workers.model.config import DTYPES, ModelConfig
from ...workers.model_source import resolve_model
from ..ray_settings import usable_cores
from .bench_runs import check_picture, publish, typed_command
from .console import CommandError, progress

OPERATIONS = (
    *kernels_linear.OPERATIONS,
    *kernels_attention.OPERATIONS,
    *kernels_rows.OPERATIONS,
)
FORMATS: tuple[QuantizationName, ...] = get_args(QuantizationName)


def run_kernels(
    model: str,
    dtype: str,
    operations: Sequence[str],
    formats: Sequence[str],
    threads: int | None,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Measure operations one by one on this machine; see ``benchmarks.kernels``."""
    check_picture(picture)
    wanted = _chosen("--operation", operations, OPERATIONS)
    weights = [name for name in FORMATS if name in _chosen("--format", formats, FORMATS)]
    config = EngineConfig.model_validate({"model": model, "dtype": dtype})
    shapes = ModelConfig.from_folder(resolve_model(model))
    torch.set_num_threads(threads or usable_cores())
    computed = shapes.dtype if config.dtype == "auto" else DTYPES[config.dtype]
    setup = kernels.Setup.here(shapes, computed)
    notes: list[str] = []
    linears = [name for name in kernels_linear.OPERATIONS if name in wanted]
    cases = itertools.chain(
        kernels_linear.linear_cases(setup, linears, weights, notes),
        kernels_attention.attention_cases(setup, wanted),
        kernels_rows.row_cases(setup, wanted),
    )
    with progress() as say:
        probe = FloorProbe(setup.device, computed)
        measured = kernels.measure(cases, probe, setup.device, rounds, say)
    if not measured:
        raise CommandError(f"nothing of that can be measured here: {'; '.join(notes)}")
    found = kernels.rows(measured, setup.kernels.name, typed_command())
    publish(found, json_file, picture, notes=notes)


def _chosen(option: str, words: Sequence[str], known: Sequence[str]) -> Sequence[str]:
    """What was asked for; all without a word. Raises ``CommandError`` for an unknown one."""
    for word in words:
        if word not in known:
            raise CommandError(f"{option} {word!r} is none of {', '.join(known)}")
    return words or known
