"""Rotary position embeddings, exact at any position.

A float32 angle is off by up to 2e-3 rad at position 40,960 and 1e-2 at 262,144; so angles are
computed in float64 and only their cosine and sine are rounded to float32. They are computed for
the positions of the step, once for all layers: no table to build, to size or to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor


def inverse_frequencies(theta: float, head_dim: int, device: torch.device) -> Tensor:
    """``theta ** (-2i / head_dim)`` for each pair of channels: float64 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float64, device=device) / head_dim
    return torch.pow(torch.tensor(theta, dtype=torch.float64, device=device), -exponents)


def rope_cos_sin(positions_T: Tensor, inverse_frequencies_E: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of each position's angles: two float32 [T, E]."""
    angles_TE = torch.outer(positions_T.to(torch.float64), inverse_frequencies_E)
    return angles_TE.cos().to(torch.float32), angles_TE.sin().to(torch.float32)
