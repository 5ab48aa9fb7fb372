"""Log-probabilities of the model's own distribution: before penalties, bias and temperature.

Shapes: T positions, V vocabulary rows, N tokens that exist: padding rows have no probability.
Rows are worked on one by one: a row of a large vocabulary just fits the cache, and its figures do
not depend on how many rows there are.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import TokenLogprob
from .blocks import block_maxima, block_weights
from .candidates import top_candidates


def token_logprob(logits_N: Tensor, token_id: int, top: int) -> TokenLogprob:
    """The log-probability of one token, and of the ``top`` best."""
    best = logits_N.max()
    log_total = float(best) + float(block_weights(logits_N, 1.0)[1].sum().log())
    logprob = float(logits_N[token_id]) - log_total
    if top == 0:
        return TokenLogprob(token_id, logprob)
    logits_1N = logits_N.unsqueeze(0)
    row = torch.zeros(1, dtype=torch.int64, device=logits_N.device)
    maxima_1M = block_maxima(logits_1N, len(logits_N))
    values_1K, ids_1K = top_candidates(logits_1N, maxima_1M, row, top, len(logits_N))
    values, ids = values_1K[0].tolist(), ids_1K[0].tolist()
    return TokenLogprob(
        token_id,
        logprob,
        tuple((other, value - log_total) for other, value in zip(ids, values, strict=True)),
    )


@torch.inference_mode()
def prompt_logprobs(
    logits_TV: Tensor, next_ids: Sequence[int], top: int, num_tokens: int
) -> list[TokenLogprob]:
    """The log-probability of each prompt token, from the logits at the position before it.

    ``next_ids[t]`` is the token that follows position t; ``top`` alternatives each. Not-a-number
    logits give not-a-number.
    """
    return [
        token_logprob(logits_V[:num_tokens], token_id, top)
        for logits_V, token_id in zip(logits_TV, next_ids, strict=True)
    ]
