"""A row of logits as blocks of 128 neighbours, each with its maximum.

One fast pass over the logits gives the maxima of all rows; every later step looks into few blocks.

Shapes: R rows, V vocabulary rows with padding, N tokens that exist, M blocks of B tokens.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128


def block_maxima(logits_RV: Tensor, num_tokens: int) -> Tensor:
    """The maximum of each block of the first ``num_tokens`` columns, [R, M]; NaN where one is."""
    whole = num_tokens // BLOCK
    blocks_RMB = logits_RV[:, : whole * BLOCK].view(len(logits_RV), whole, BLOCK)
    maxima_RM = blocks_RMB.amax(2)
    if num_tokens % BLOCK == 0:
        return maxima_RM
    last_R1 = logits_RV[:, whole * BLOCK : num_tokens].amax(1, keepdim=True)
    return torch.cat((maxima_RM, last_R1), dim=1)
