"""Compiles what a forward pass launches, for a device that need not be here.

``python compile_launches.py CAPABILITY DTYPE PART``, without ``TRITON_INTERPRET``; parts are
``dense``, ``quantized`` and ``sampling``. The launching code runs on tensors of the CPU; in place
of each launch its kernel is compiled, with the constants, the specialisation and the options of
that launch. Prints a JSON list of what came out.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.jit import JITFunction

from inference_pio.kernels.context import ContextItem, build_context
from inference_pio.kernels.quantized import CODE_DTYPES, CodeFormat, QuantizedWeight
from inference_pio.kernels.sampling.api import Draw
from inference_pio.kernels.triton.quantized_linear import pack
from inference_pio.kernels.triton.rows import (
    add_rms_norm,
    qk_norm_rope_write,
    rms_norm,
    silu_mul,
)
from inference_pio.kernels.triton.sampling import Rows, TritonSampling, launch_top
from inference_pio.kernels.triton.step_attention import TritonAttention

CPU = torch.device("cpu")
HEADS, KV_HEADS, DIM, HIDDEN, INNER, VOCABULARY = 16, 8, 128, 1024, 3072, 151_936
"""Qwen3-0.6B."""


class AbsentDevice(DriverBase):
    """A driver of a device that only compilers ask about."""

    def __init__(self, capability: int) -> None:
        self._capability = capability

    @classmethod
    def is_active(cls) -> bool:
        return True

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self._capability, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def map_python_to_cpp_type(self, ty: str) -> str:
        raise NotImplementedError("nothing is launched")

    def get_active_torch_device(self) -> torch.device:
        return CPU

    def get_benchmarker(self) -> Any:
        raise NotImplementedError("nothing is launched")


def main() -> None:
    capability, dtype = int(sys.argv[1]), getattr(torch, sys.argv[2])
    triton.runtime.driver.set_active(AbsentDevice(capability))
    compiled: list[dict[str, Any]] = []
    plain_run: Callable[..., Any] = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        kernel = plain_run(self, *args, grid=grid, warmup=True, **kwargs)
        compiled.append(
            {
                "kernel": self.__name__,
                "capability": kernel.metadata.target.arch,
                "shared_bytes": kernel.metadata.shared,
                "stack_bytes": stack_bytes(kernel.asm["cubin"]),
                "has_matrix_units": "mma" in kernel.asm["ptx"],
                "contracts_float64": "fma.rn.f64" in kernel.asm["ptx"],
            }
        )

    JITFunction.run = compile_only  # type: ignore[method-assign]
    if sys.argv[3] == "dense":
        launch_rows(dtype)
        launch_attention(dtype)
    elif sys.argv[3] == "sampling":
        launch_sampling()
    else:
        launch_quantized(dtype)
    print(json.dumps(compiled))


def stack_bytes(cubin: bytes) -> int:
    """Memory of each thread for what found no register."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = triton.knobs.nvidia.cuobjdump.path
        command = [tool, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.findall(r"STACK:(\d+)", said)
    assert len(found) == 1, said
    return int(found[0])


def launch_rows(dtype: torch.dtype) -> None:
    stream, weight = torch.empty(2, HIDDEN), torch.empty(HIDDEN, dtype=dtype)
    normed = rms_norm(stream, weight, 1e-6)
    add_rms_norm(stream, normed, weight, 1e-6)
    qkv = torch.empty(2, (HEADS + 2 * KV_HEADS) * DIM, dtype=dtype)
    angles = torch.empty(2, DIM // 2)
    cache = torch.empty(2, 2, KV_HEADS, 64, DIM, dtype=dtype)
    slots = torch.zeros(2, dtype=torch.int64)
    norms = torch.empty(HEADS + KV_HEADS, DIM)
    qk_norm_rope_write(qkv, norms, angles, angles, cache, slots, 1e-6)
    silu_mul(torch.empty(2, 2 * INNER, dtype=dtype))


def launch_attention(dtype: torch.dtype) -> None:
    cache = torch.empty(10, 2, KV_HEADS, 64, DIM, dtype=dtype)
    for lengths in ([(600, 1)], [(30, 1), (0, 8)], [(64, 300)]):
        items = [ContextItem(range(10), computed, new) for computed, new in lengths]
        context = build_context(items, 64, CPU)
        rows = torch.empty(context.query_starts[-1], HEADS + 2 * KV_HEADS, DIM, dtype=dtype)
        TritonAttention(context, no_other)(rows[:, :HEADS], cache)


def launch_sampling() -> None:
    logits, kernels = torch.zeros(2, VOCABULARY), TritonSampling()
    few = [Draw(), Draw.of(0.6, 20, 0.95, 0.0, 0.5)]
    wide = [Draw.of(1.0, 0, 1.0, 0.0, 0.5), Draw.of(1.0, 1000, 0.95, 0.01, 0.5)]
    for draws in (few, wide):
        kernels.launch(logits, VOCABULARY - 267, draws, [], [None, None])
    kernels.weight_sums(logits, VOCABULARY - 267)
    ids = torch.zeros(2, 20, dtype=torch.int64)
    launch_top(Rows.of(logits, VOCABULARY - 267), ids)


def no_other(context: object) -> Any:
    raise AssertionError("these kernels take this batch")


def launch_quantized(dtype: torch.dtype) -> None:
    formats: list[tuple[CodeFormat, int, bool, bool]] = [
        ("int8", HIDDEN, False, False),
        ("int8", HIDDEN, False, True),
        ("int4", 32, False, False),
        ("int4", 128, True, False),
        ("nf4", 64, False, False),
        ("fp8", 128, False, False),
    ]
    for format, group, zeros, int8_activations in formats:
        stored = HIDDEN // 2 if format in ("int4", "nf4") else HIDDEN
        grid = INNER, HIDDEN // group
        weight = QuantizedWeight(
            format=format,
            shape=(INNER, HIDDEN),
            codes=torch.empty(INNER, stored, dtype=CODE_DTYPES[format]),
            scales_OG=torch.empty(grid, dtype=torch.float16),
            group_size=group,
            zeros_OG=torch.empty(grid, dtype=torch.int8) if zeros else None,
            int8_activations=int8_activations,
        )
        linear = pack(weight, None)
        assert linear is not None
        for rows in (1, 8, 512):
            linear(torch.empty(rows, HIDDEN, dtype=dtype))


if __name__ == "__main__":
    main()
