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
    ids_T = torch.tensor(token_ids, device=logits_TV.device)
    found = kernels.launch_logprobs(logits_TV, num_tokens, ids_T, [top] * len(token_ids)).read()
    return [
        TokenLogprob(token_id, *logprobs)
        for token_id, logprobs in zip(token_ids, found, strict=True)
    ]
