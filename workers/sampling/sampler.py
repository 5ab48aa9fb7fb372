"""The sampling pass: logits of a batch in, one token a row out.

One pass takes these steps:
1. Rows that want log-probabilities and will be edited keep a copy of their logits.
2. The maxima of all rows' blocks show rows that cannot be sampled, each with its own error.
3. Penalties, bias and bans change the logits in place; then step 2 again.
4. Greedy rows take their best token.
5. Rows with a top-k are drawn together, among the best tokens, without a sort of the vocabulary.
6. The other rows are drawn one by one.
Which way a row goes depends on its own settings and logits, so its token does not depend on the
batch around it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .blocks import block_maxima
from .candidates import best_tokens, top_candidates
from .draw import DrawValues, draw_alone, has_hidden_ties, kept_weights, pick
from .edits import changes_logits, edit_logits
from .logprobs import token_logprob
from .row import SampledToken, SamplingError, SamplingRow

_CANDIDATE_COUNTS = (32, 128, 1088)
"""How many candidates rows with a top-k are drawn among; the least that is ``_MARGIN`` over k."""
_MARGIN = 8
"""Candidates past the k-th best, to see its equals: bfloat16 logits have many."""


class Sampler:
    """Samples rows of logits over ``vocab_rows`` entries, of which ``num_tokens`` are tokens.

    Raises ``ValueError`` for counts that make no vocabulary.
    """

    def __init__(self, vocab_rows: int, num_tokens: int):
        if not 0 < num_tokens <= vocab_rows:
            raise ValueError(
                f"num_tokens is {num_tokens}; it lies in [1, {vocab_rows}], the vocabulary's rows"
            )
        self.vocab_rows = vocab_rows
        self.num_tokens = num_tokens

    @torch.inference_mode()
    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow]
    ) -> list[SampledToken | SamplingError]:
        """One token for each row, or the error of that row alone.

        ``logits_RV`` is float32 [len(rows), vocab_rows] and is overwritten.
        """
        if logits_RV.shape != (len(rows), self.vocab_rows) or logits_RV.dtype != torch.float32:
            raise ValueError(
                f"logits are {logits_RV.dtype} {list(logits_RV.shape)}; "
                f"float32 [{len(rows)}, {self.vocab_rows}] is needed"
            )
        if not rows:
            return []
        raw = {
            number: logits_RV[number].clone()
            for number, row in enumerate(rows)
            if row.num_logprobs is not None and changes_logits(row)
        }
        maxima_RM = block_maxima(logits_RV, self.num_tokens)
        errors = _unsound_rows(maxima_RM)
        if any(changes_logits(row) for row in rows):
            edit_logits(logits_RV, rows)
            maxima_RM = block_maxima(logits_RV, self.num_tokens)
            errors = _unsound_rows(maxima_RM) | errors
        sound = [number for number in range(len(rows)) if number not in errors]
        tokens = self._choose(logits_RV, maxima_RM, rows, sound)
        logprobs = {
            number: token_logprob(
                raw.get(number, logits_RV[number])[: self.num_tokens], token_id, top
            )
            for number, token_id in tokens.items()
            if (top := rows[number].num_logprobs) is not None
        }
        return [
            errors[number]
            if number in errors
            else SampledToken(tokens[number], logprobs.get(number))
            for number in range(len(rows))
        ]

    def _choose(
        self, logits_RV: Tensor, maxima_RM: Tensor, rows: Sequence[SamplingRow], sound: list[int]
    ) -> dict[int, int]:
        tokens: dict[int, int] = {}
        groups: dict[int, list[int]] = {}
        greedy: list[int] = []
        for number in sound:
            if rows[number].sampling.greedy:
                greedy.append(number)
            else:
                groups.setdefault(_num_candidates(rows[number]), []).append(number)
        if greedy:
            row_G = torch.tensor(greedy, device=logits_RV.device)
            best_G = best_tokens(logits_RV, maxima_RM, row_G, self.num_tokens)
            tokens.update(zip(greedy, best_G.tolist(), strict=True))
        alone = groups.pop(0, [])
        for count, group in groups.items():
            drawn = self._draw_together(logits_RV, maxima_RM, rows, group, count)
            alone += [number for number in group if number not in drawn]
            tokens.update(drawn)
        for number in alone:
            tokens[number] = draw_alone(logits_RV[number, : self.num_tokens], rows[number])
        return tokens

    def _draw_together(
        self,
        logits_RV: Tensor,
        maxima_RM: Tensor,
        rows: Sequence[SamplingRow],
        group: list[int],
        count: int,
    ) -> dict[int, int]:
        """Tokens of the group's rows, but for rows whose equals reach past the candidates."""
        row_G = torch.tensor(group, device=logits_RV.device)
        values_GK, ids_GK = top_candidates(logits_RV, maxima_RM, row_G, count, self.num_tokens)
        settings = DrawValues.of(
            [rows[number] for number in group], values_GK.shape[1], logits_RV.device
        )
        place_G = pick(kept_weights(values_GK, settings), settings.uniform)
        chosen = ids_GK.gather(1, place_G.unsqueeze(1)).squeeze(1).tolist()
        if values_GK.shape[1] == self.num_tokens:
            return dict(zip(group, chosen, strict=True))
        hidden = has_hidden_ties(values_GK, settings).tolist()
        return {
            number: token
            for number, token, tied in zip(group, chosen, hidden, strict=True)
            if not tied
        }


def _num_candidates(row: SamplingRow) -> int:
    """How many candidates the row is drawn among; 0 for a row that is drawn alone."""
    top_k = row.sampling.top_k
    if top_k == 0:
        return 0
    return next((count for count in _CANDIDATE_COUNTS if count >= top_k + _MARGIN), 0)


def _unsound_rows(maxima_RM: Tensor) -> dict[int, SamplingError]:
    errors: dict[int, SamplingError] = {}
    for number, best in enumerate(maxima_RM.amax(1).tolist()):
        if math.isnan(best):
            errors[number] = SamplingError(number, "its logits hold NaN")
        elif best == math.inf:
            errors[number] = SamplingError(number, "its logits hold infinity")
        elif best == -math.inf:
            errors[number] = SamplingError(number, "no token is left to sample")
    return errors
