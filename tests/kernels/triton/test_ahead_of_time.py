"""Everything that is launched compiles for devices that need not be here, and fits them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).with_name("compile_launches.py")
SHARED_BYTES = 99 * 2**10
"""Shared memory of a program on the smallest devices: compute capabilities 8.6, 8.9 and 12.0."""
HALVES = ("bfloat16", "float16")
KERNELS = {
    "dense": {
        *("rms_norm_kernel", "qk_norm_rope_write_kernel", "silu_mul_kernel"),
        *("decode_kernel", "join_kernel", "prefill_kernel"),
    },
    "sampling": {
        *("chunk_best_kernel", "find_kernel", "field_kernel", "gather_kernel"),
        *("draw_kernel", "draw_by_id_kernel"),
        *("threshold_kernel", "list_kernel", "top_kernel"),
    },
    "quantized": {
        *("vector_kernel", "matmul_kernel", "round_rows_kernel", "int8_matmul_kernel"),
    },
}


def compiled(capability: int, dtype: str, part: str, cache: Path) -> list[dict[str, Any]]:
    """In a process of its own: this one interprets."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), dtype, part],
        env=environment | {"TRITON_CACHE_DIR": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize(
    ("capability", "dtype", "part"),
    [
        (90, "bfloat16", "dense"),
        *(
            pytest.param(capability, "float32", "sampling", marks=pytest.mark.slow)
            for capability in (80, 90)
        ),
        *(
            pytest.param(capability, dtype, part, marks=pytest.mark.slow)
            for capability in (80, 90)
            for dtype in ("bfloat16", "float16", "float32")
            for part in ("dense", "quantized")
            if (capability, dtype, part) != (90, "bfloat16", "dense")
        ),
    ],
)
def test_every_launch_compiles(capability: int, dtype: str, part: str, tmp_path: Path) -> None:
    kernels = compiled(capability, dtype, part, tmp_path)
    assert {kernel["kernel"] for kernel in kernels} == KERNELS[part]
    for kernel in kernels:
        assert kernel["capability"] == capability
        assert kernel["shared_bytes"] <= SHARED_BYTES, kernel
        assert not kernel["contracts_float64"], kernel  # weights of tokens are defined bit by bit
        if dtype in HALVES or part == "sampling":  # float32 is for parity: it has no matrix units
            assert kernel["stack_bytes"] == 0, kernel
            attends = kernel["kernel"] in ("decode_kernel", "prefill_kernel", "matmul_kernel")
            assert kernel["has_matrix_units"] or not attends, kernel
