"""Log-probabilities of the model's own distribution: before penalties, bias and temperature.

Shapes: T rows or positions, V vocabulary rows with padding.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.sampling.api import SamplingKernels
from ..types import TokenLogprob


@torch.inference_mode()
def token_logprobs(
    kernels: SamplingKernels,
    logits_TV: Tensor,
    token_ids: Sequence[int],
    top: int,
    num_tokens: int,
) -> list[TokenLogprob]:
    """The log-probability of one token of each row, and of the ``top`` best.

    ``token_ids[t]`` is the token that follows position t. Not-a-number logits give not-a-number.
    """
    if len(token_ids) != len(logits_TV):
        raise ValueError(f"{len(logits_TV)} rows of logits need as many tokens: {len(token_ids)}")
    if not token_ids:
        return []
    log_sums_T = kernels.log_sums(logits_TV, num_tokens)
    ids_T1 = torch.tensor(token_ids, device=logits_TV.device).unsqueeze(1)
    logprobs = (logits_TV.gather(1, ids_T1).squeeze(1).double() - log_sums_T).tolist()
    best: list[tuple[tuple[int, float], ...]] = [()] * len(token_ids)
    if top:
        values_TK, best_ids_TK = kernels.top_tokens(logits_TV, num_tokens, top)
        best_TK = (values_TK.double() - log_sums_T.unsqueeze(1)).tolist()
        best = [
            tuple(zip(ids, values, strict=True))
            for ids, values in zip(best_ids_TK.tolist(), best_TK, strict=True)
        ]
    return [
        TokenLogprob(token_id, logprob, alternatives)
        for token_id, logprob, alternatives in zip(token_ids, logprobs, best, strict=True)
    ]
