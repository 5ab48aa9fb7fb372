"""The definition of every sampling operation: each row alone, by sorting its whole vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import Draw, Edit, SamplingKernels
from .edits import apply_edit, find_faults
from .weights import LOG2_E, drawn_mass, exponents, top_p_limit, weights_of


class ReferenceSampling(SamplingKernels):
    """See ``SamplingKernels``."""

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        """See ``SamplingKernels.sample``."""
        tokens_RN = logits_RV[:, :num_tokens]
        early = find_faults(tokens_RN.amax(1))
        for edit in edits:
            apply_edit(logits_RV, edit)
        late = find_faults(tokens_RN.amax(1))
        tokens = [
            before or after or _draw(logits_N, draw)
            for before, after, logits_N, draw in zip(early, late, tokens_RN, draws, strict=True)
        ]
        return torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)

    def weight_sums(self, logits_RV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.weight_sums``."""
        tokens_RN = logits_RV[:, :num_tokens]
        best_R = tokens_RN.amax(1)
        return best_R, weights_of(exponents(tokens_RN, best_R.unsqueeze(1), LOG2_E)).sum(1)

    def top_tokens(self, logits_RV: Tensor, num_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.top_tokens``."""
        values_RN, ids_RN = logits_RV[:, :num_tokens].sort(dim=1, descending=True, stable=True)
        return values_RN[:, :count], ids_RN[:, :count]


def kept_weights(values_N: Tensor, draw: Draw) -> Tensor:
    """Weights of logits in canonical order, 0 where a filter drops one; int64 [N]."""
    exponents_N = exponents(values_N, values_N[0], draw.scale)
    kth = values_N[min(draw.top_k or len(values_N), len(values_N)) - 1]
    weights_N = weights_of(exponents_N) * (values_N >= kth)
    if draw.top_p < 1:
        before_N = weights_N.cumsum(0) - weights_N
        weights_N = weights_N * (before_N < top_p_limit(weights_N.sum(), draw.top_p))
    return weights_N * (exponents_N >= draw.floor)


def _draw(logits_N: Tensor, draw: Draw) -> int:
    if draw.greedy:
        return int(logits_N.sort(descending=True, stable=True).indices[0])
    if draw.unfiltered:
        weights_N = weights_of(exponents(logits_N, logits_N.amax(), draw.scale))
        return pick(weights_N, draw.uniform)
    values_N, ids_N = logits_N.sort(descending=True, stable=True)
    return int(ids_N[pick(kept_weights(values_N, draw), draw.uniform)])


def pick(weights_N: Tensor, uniform: float) -> int:
    """The first place where the running sum passes its share ``uniform`` of the whole."""
    sums_N = weights_N.cumsum(0)
    mass_1 = drawn_mass(sums_N[-1:], uniform)
    return int(torch.searchsorted(sums_N, mass_1, right=True))
