"""``inference-pio bench gpu``."""

from __future__ import annotations

from pathlib import Path

from ...benchmarks import gpu, sampling, speed
from ...benchmarks.floor import FloorProbe
from ...benchmarks.gpu_parity import Sizes, check_all, parity_rows, require_parity
from ...benchmarks.systems import OwnEngine
from ...workers.config import EngineConfig
from .bench_runs import check_picture, publish, typed_command
from .console import progress


def run_gpu(
    model: str,
    dtype: str,
    against: bool,
    rounds: int,
    json_file: Path | None,
    picture: Path | None,
) -> None:
    """Check and measure this machine's device; see ``benchmarks.gpu``."""
    check_picture(picture)
    device = gpu.require_cuda()
    config = EngineConfig.model_validate(
        {
            "model": model,
            "dtype": dtype,
            "device": "cuda",
            "kv_memory_share": 0.7,
            "max_num_seqs": gpu.DECODE[-1].size,
            "max_batched_tokens": gpu.PREFILL[-1].size,
            "prefix_caching": False,
        }
    )
    command = typed_command()
    with progress() as say:
        say(f"loading {model}")
        own = OwnEngine(config)
        loaded = own.engine.loaded
        kernels, precision = loaded.model.kernels, own.precision
        say("parity")
        checked = check_all(kernels, Sizes.of(loaded.model.config), loaded.model.dtype, device)
        rows = parity_rows(checked, precision, kernels.name, command)
        require_parity(checked)
        cases = [*gpu.DECODE, *(c for c in gpu.PREFILL if c.size < loaded.max_model_len)]
        systems: list[speed.System] = [own]
        if against:
            say("loading transformers")
            systems.append(gpu.StaticTransformers(str(loaded.text.folder), precision))
        shapes = speed.shapes_of(loaded.text.folder, precision)
        probe = FloorProbe(device, loaded.model.dtype)
        found = speed.measure(systems, shapes, probe, cases, rounds, say)
        rows += speed.rows(found, systems, command, benchmark=gpu.BENCHMARK)
        rates = gpu.measure_workload(own.engine, rounds, say)
        rows.append(gpu.workload_row(rates, precision, gpu.REQUESTS, command))
        cost = sampling.measure(rounds, say, device=device)
        rows += sampling.rows(cost, command, benchmark=gpu.BENCHMARK)
    publish(rows, json_file, picture)
