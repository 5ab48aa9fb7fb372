"""Which format of ours stands beside the others' int8 and int4."""

from __future__ import annotations

import pytest

from inference_pio.benchmarks.compare.peers.own_peer import quantization_of


@pytest.mark.parametrize(
    ("precision", "kernels", "expected"),
    [
        ("bfloat16", "native:avx2", "none"),
        ("int8", "native:amx", "w8a8"),
        ("int4", "native:amx", "int4"),
        ("int4", "native:avx512_bf16", "w4a8"),
        ("int4", "torch", "w4a8"),
    ],
)
def test_codes_meet_codes(precision: str, kernels: str, expected: str) -> None:
    assert quantization_of(precision, kernels) == expected
