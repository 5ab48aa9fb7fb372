"""The instruction sets that the native kernels are built for.

Read by the build as well as by the running package: the standard library only.
"""

from __future__ import annotations

from typing import NamedTuple


class InstructionSet(NamedTuple):
    """One build of the kernels."""

    name: str
    compiler_flags: tuple[str, ...]
    cpu_flags: frozenset[str]
    """What ``/proc/cpuinfo`` must list."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_AVX2 = InstructionSet("avx2", ("-mavx2", "-mfma", "-mf16c"), _names("avx2 fma f16c"))
_AVX512 = InstructionSet(
    "avx512",
    (*_AVX2.compiler_flags, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl"),
    _AVX2.cpu_flags | _names("avx512f avx512bw avx512dq avx512vl"),
)
_AVX512_BF16 = InstructionSet(
    "avx512_bf16",
    (*_AVX512.compiler_flags, "-mavx512bf16", "-mavx512vnni"),
    _AVX512.cpu_flags | _names("avx512_bf16 avx512_vnni"),
)
_AMX = InstructionSet(
    "amx",
    (*_AVX512_BF16.compiler_flags, "-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mprfchw"),
    _AVX512_BF16.cpu_flags | _names("amx_tile amx_bf16 amx_int8 3dnowprefetch"),
)

INSTRUCTION_SETS = (_AMX, _AVX512_BF16, _AVX512, _AVX2)
"""The best first."""
