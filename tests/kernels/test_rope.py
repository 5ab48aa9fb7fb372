"""RoPE angles against extended precision."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from inference_pio.kernels.rope import inverse_frequencies, rope_cos_sin


@pytest.mark.parametrize(("theta", "head_dim"), [(1e6, 128), (5e6, 128), (1e6, 24)])
def test_exact_at_every_position(theta: float, head_dim: int) -> None:
    positions = [0, 1, 63, 8191, 8192, 40_959, 131_071, 262_143]
    frequencies = inverse_frequencies(theta, head_dim, torch.device("cpu"))
    cos, sin = rope_cos_sin(torch.tensor(positions), frequencies)
    exponents = np.arange(0, head_dim, 2, dtype=np.longdouble) / head_dim
    angles = np.outer(np.array(positions, dtype=np.longdouble), np.longdouble(theta) ** -exponents)
    assert cos.dtype == sin.dtype == torch.float32
    half_ulp = 2.0**-24
    np.testing.assert_allclose(cos.numpy(), np.cos(angles), rtol=0, atol=half_ulp * 1.01)
    np.testing.assert_allclose(sin.numpy(), np.sin(angles), rtol=0, atol=half_ulp * 1.01)
