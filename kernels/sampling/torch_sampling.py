"""Sampling in torch's operations, on any device, without a sort of the vocabulary.

One pass takes these steps:
1. The maxima of all rows' blocks show rows that are at fault.
2. Edits change the logits in place; then step 1 again.
3. Greedy rows take their best token.
4. Rows with a top-k are drawn together, among the best tokens.
5. The other rows are drawn one by one.
Which way a row goes depends on its own draw and logits, so its token does not depend on the batch
around it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .api import Draw, Edit, SamplingKernels
from .blocks import block_maxima
from .candidates import best_tokens, top_candidates, top_with_equals
from .draw import DrawValues, draw_alone, has_hidden_ties, kept_weights, pick
from .edits import apply_edit, find_faults
from .weights import LOG2_E, row_weights

_CANDIDATE_COUNTS = (32, 128, 1088)
"""How many candidates rows with a top-k are drawn among; the least that is ``_MARGIN`` over k."""
_MARGIN = 8
"""Candidates past the k-th best, to see its equals: bfloat16 logits have many."""


class TorchSampling(SamplingKernels):
    """See ``SamplingKernels``."""

    def sample(
        self, logits_RV: Tensor, num_tokens: int, draws: Sequence[Draw], edits: Sequence[Edit]
    ) -> Tensor:
        """See ``SamplingKernels.sample``."""
        maxima_RM = block_maxima(logits_RV, num_tokens)
        tokens = find_faults(maxima_RM.amax(1))
        if edits:
            for edit in edits:
                apply_edit(logits_RV, edit)
            maxima_RM = block_maxima(logits_RV, num_tokens)
            late = find_faults(maxima_RM.amax(1))
            tokens = [before or after for before, after in zip(tokens, late, strict=True)]
        sound = [number for number, fault in enumerate(tokens) if not fault]
        for number, token_id in _choose(logits_RV, maxima_RM, num_tokens, draws, sound).items():
            tokens[number] = token_id
        return torch.tensor(tokens, dtype=torch.int64, device=logits_RV.device)

    def weight_sums(self, logits_RV: Tensor, num_tokens: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.weight_sums``.

        Rows are worked on one by one: one of a large vocabulary just fits the cache.
        """
        best_R = block_maxima(logits_RV, num_tokens).amax(1)
        total_R = torch.empty(len(best_R), dtype=torch.int64, device=best_R.device)
        for number, logits_V in enumerate(logits_RV):
            weights_N = row_weights(logits_V[:num_tokens], best_R[number], LOG2_E)
            total_R[number] = weights_N.sum()
        return best_R, total_R

    def top_tokens(self, logits_RV: Tensor, num_tokens: int, count: int) -> tuple[Tensor, Tensor]:
        """See ``SamplingKernels.top_tokens``."""
        maxima_RM = block_maxima(logits_RV, num_tokens)
        row_R = torch.arange(len(logits_RV), device=logits_RV.device)
        # Candidates past the last show whether equals of it may have been left out.
        more = min(count + _MARGIN, num_tokens)
        values_RK, ids_RK = top_candidates(logits_RV, maxima_RM, row_R, more, num_tokens)
        count = min(count, num_tokens)
        if more < num_tokens and count:
            hidden_R = values_RK[:, count - 1] == values_RK[:, -1]
            hidden_R &= ~maxima_RM.amax(1).isnan()
            for row in hidden_R.nonzero().flatten().tolist():
                _, ids_1K = top_with_equals(logits_RV[row, :num_tokens], count)
                ids_RK[row, :count] = ids_1K[0, :count]
        return values_RK[:, :count], ids_RK[:, :count]


def _choose(
    logits_RV: Tensor,
    maxima_RM: Tensor,
    num_tokens: int,
    draws: Sequence[Draw],
    sound: list[int],
) -> dict[int, int]:
    """The token of each sound row, by its number."""
    tokens: dict[int, int] = {}
    groups: dict[int, list[int]] = {}
    greedy: list[int] = []
    for number in sound:
        if draws[number].greedy:
            greedy.append(number)
        else:
            groups.setdefault(_num_candidates(draws[number]), []).append(number)
    if greedy:
        row_G = torch.tensor(greedy, device=logits_RV.device)
        best_G = best_tokens(logits_RV, maxima_RM, row_G, num_tokens)
        tokens.update(zip(greedy, best_G.tolist(), strict=True))
    alone = groups.pop(0, [])
    for count, group in groups.items():
        row_G = torch.tensor(group, device=logits_RV.device)
        best = top_candidates(logits_RV, maxima_RM, row_G, count, num_tokens)
        drawn = _draw_together(*best, [draws[number] for number in group], num_tokens)
        alone += [number for number, token in zip(group, drawn, strict=True) if token is None]
        tokens.update(
            (n, token) for n, token in zip(group, drawn, strict=True) if token is not None
        )
    for number in alone:
        tokens[number] = draw_alone(logits_RV[number, :num_tokens], draws[number])
    return tokens


def _draw_together(
    values_GK: Tensor, ids_GK: Tensor, draws: Sequence[Draw], num_tokens: int
) -> list[int | None]:
    """Tokens of a group's rows, ``None`` where equals of the k-th best may lie outside."""
    settings = DrawValues.of(draws, values_GK.shape[1], values_GK.device)
    place_G = pick(kept_weights(values_GK, settings), settings.uniform)
    chosen: list[int | None] = ids_GK.gather(1, place_G.unsqueeze(1)).squeeze(1).tolist()
    if values_GK.shape[1] == num_tokens:
        return chosen
    hidden = has_hidden_ties(values_GK, settings).tolist()
    return [None if tied else token for token, tied in zip(chosen, hidden, strict=True)]


def _num_candidates(draw: Draw) -> int:
    """How many candidates a row is drawn among; 0 for a row that is drawn alone."""
    if draw.top_k == 0:
        return 0
    return next((count for count in _CANDIDATE_COUNTS if count >= draw.top_k + _MARGIN), 0)
