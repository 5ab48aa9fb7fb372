"""Finds the best tokens of a row without sorting the vocabulary.

The maxima of a row's blocks tell which block its best token is in, and which k blocks hold its k
best tokens: none of those is below the k-th best maximum.

Shapes: R rows, V vocabulary rows with padding, N tokens that exist, M blocks of B tokens, G rows of
one group, K candidates, C places in their blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .blocks import BLOCK


def best_tokens(logits_RV: Tensor, maxima_RM: Tensor, row_G: Tensor, num_tokens: int) -> Tensor:
    """The best token of each row in ``row_G``, [G]; of equals the lowest id."""
    block_G1 = maxima_RM[row_G].argmax(1, keepdim=True)
    values_GB, ids_GB = _members(logits_RV, row_G, block_G1, num_tokens)
    return ids_GB.gather(1, values_GB.argmax(1, keepdim=True)).squeeze(1)


def top_candidates(
    logits_RV: Tensor, maxima_RM: Tensor, row_G: Tensor, count: int, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """The ``count`` best of each row in ``row_G``: values [G, K] and ids [G, K], best first.

    Equals are ordered by id. Which of several equals of the last value are in is not defined.
    """
    count = min(count, num_tokens)
    # With most blocks in, gathering them costs more than one selection over the row.
    if count * 4 < maxima_RM.shape[1]:
        block_GK = maxima_RM[row_G].topk(count, dim=1, sorted=False).indices
        values_GC, ids_GC = _members(logits_RV, row_G, block_GK, num_tokens)
        values_GK, place_GK = values_GC.topk(count, dim=1, sorted=False)
        ids_GK = ids_GC.gather(1, place_GK)
    else:
        rows_GN = logits_RV[:, :num_tokens]
        if len(row_G) != len(logits_RV):
            rows_GN = rows_GN[row_G]
        values_GK, ids_GK = rows_GN.topk(count, dim=1, sorted=False)
    return _in_order(values_GK, ids_GK)


def top_with_equals(
    logits_N: Tensor, count: int, lowest: float = -torch.inf
) -> tuple[Tensor, Tensor]:
    """The ``count`` best of one row and all equals of the last, but none below ``lowest``.

    Values and ids, [1, K] each, best first; equals by id.
    """
    kth = logits_N.topk(min(count, len(logits_N)), sorted=False).values.min()
    return best_first(logits_N, (logits_N >= kth.clamp(min=lowest)).nonzero().squeeze(1))


def best_first(logits_N: Tensor, ids_K: Tensor) -> tuple[Tensor, Tensor]:
    """Values and ids of ascending ``ids_K``, [1, K] each, best first; equals by id."""
    values_K, order_K = logits_N[ids_K].sort(descending=True, stable=True)
    return values_K.unsqueeze(0), ids_K[order_K].unsqueeze(0)


def _in_order(values_GK: Tensor, ids_GK: Tensor) -> tuple[Tensor, Tensor]:
    """Both sorted by value, best first; equals by id, lowest first."""
    ids_GK, order_GK = ids_GK.sort(dim=1)
    values_GK, by_value_GK = values_GK.gather(1, order_GK).sort(dim=1, descending=True, stable=True)
    return values_GK, ids_GK.gather(1, by_value_GK)


def _members(
    logits_RV: Tensor, row_G: Tensor, block_GK: Tensor, num_tokens: int
) -> tuple[Tensor, Tensor]:
    """Values and ids of every token in the given blocks, [G, K * 128] each.

    Places past the last token hold minus infinity.
    """
    offset_B = torch.arange(BLOCK, device=logits_RV.device)
    ids_GC = (block_GK.unsqueeze(2) * BLOCK + offset_B).flatten(1)
    inside_GC = ids_GC < num_tokens
    ids_GC = ids_GC.clamp(max=num_tokens - 1)
    values_GC = logits_RV[row_G.unsqueeze(1), ids_GC]
    return values_GC.masked_fill(~inside_GC, -torch.inf), ids_GC
