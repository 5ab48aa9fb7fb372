"""The sampling pass: logits of a batch in, one token a row out.

One pass takes these steps:
1. Rows that want log-probabilities keep a copy of their logits.
2. The kernels make the rows' edits and draw their tokens, which is all of ``launch``.
3. ``LaunchedSample.read`` waits for the tokens; a row that cannot be sampled gets its own error,
   and the others do not notice.
4. Rows that want log-probabilities get them, of the logits before the edits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...kernels.sampling.api import MAX_TOKENS, Draw, Fault, PendingTokens, SamplingKernels
from ..types import TokenLogprob
from .edits import edits_of
from .logprobs import token_logprobs
from .noise import uniform
from .row import SampledToken, SamplingError, SamplingRow

_REASONS = {
    Fault.NAN: "its logits hold NaN",
    Fault.INFINITY: "its logits hold infinity",
    Fault.NO_TOKEN: "no token is left to sample",
}
_GREEDY = Draw()


class Sampler:
    """Samples rows of logits over ``vocab_rows`` entries, of which ``num_tokens`` are tokens.

    Raises ``ValueError`` for counts that make no vocabulary, or one too large.
    """

    def __init__(self, kernels: SamplingKernels, vocab_rows: int, num_tokens: int):
        if not 0 < num_tokens <= vocab_rows:
            raise ValueError(
                f"num_tokens is {num_tokens}; it lies in [1, {vocab_rows}], the vocabulary's rows"
            )
        if num_tokens > MAX_TOKENS:
            raise ValueError(f"a vocabulary has at most {MAX_TOKENS} tokens, not {num_tokens}")
        self.kernels = kernels
        self.vocab_rows = vocab_rows
        self.num_tokens = num_tokens

    def sample(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow]
    ) -> list[SampledToken | SamplingError]:
        """``launch`` and ``LaunchedSample.read`` in one."""
        return self.launch(logits_RV, rows).read()

    @torch.inference_mode()
    def launch(self, logits_RV: Tensor, rows: Sequence[SamplingRow]) -> LaunchedSample:
        """Have one token drawn for each row, to be read later.

        ``logits_RV`` is float32 [len(rows), vocab_rows]; it is overwritten here, and may be again.
        """
        if logits_RV.shape != (len(rows), self.vocab_rows) or logits_RV.dtype != torch.float32:
            raise ValueError(
                f"logits are {logits_RV.dtype} {list(logits_RV.shape)}; "
                f"float32 [{len(rows)}, {self.vocab_rows}] is needed"
            )
        raw = {
            number: logits_RV[number].clone()
            for number, row in enumerate(rows)
            if row.num_logprobs is not None
        }
        draws = [_draw(row) for row in rows]
        tokens = self.kernels.launch(logits_RV, self.num_tokens, draws, edits_of(rows))
        return LaunchedSample(self, tokens, rows, raw)


class LaunchedSample:
    """Tokens of one pass; ``raw`` are the logits that log-probabilities are taken from, by row."""

    def __init__(
        self,
        sampler: Sampler,
        tokens: PendingTokens,
        rows: Sequence[SamplingRow],
        raw: Mapping[int, Tensor],
    ) -> None:
        self._sampler = sampler
        self._tokens = tokens
        self._rows = rows
        self._raw = raw

    @property
    def on_device_R(self) -> Tensor | None:
        """See ``PendingTokens.on_device_R``."""
        return self._tokens.on_device_R

    @property
    def redrawn(self) -> frozenset[int]:
        """See ``PendingTokens.redrawn``."""
        return self._tokens.redrawn

    def read(self) -> list[SampledToken | SamplingError]:
        """One token for each row, or the error of that row alone."""
        return [
            SampledToken(token, self._logprob(number, row, token))
            if token >= 0
            else SamplingError(number, _REASONS[Fault(token)])
            for number, (row, token) in enumerate(zip(self._rows, self._tokens.read(), strict=True))
        ]

    def _logprob(self, number: int, row: SamplingRow, token_id: int) -> TokenLogprob | None:
        if row.num_logprobs is None:
            return None
        kernels, num_tokens = self._sampler.kernels, self._sampler.num_tokens
        (logprob,) = token_logprobs(
            kernels, self._raw[number].unsqueeze(0), [token_id], row.num_logprobs, num_tokens
        )
        return logprob


def _draw(row: SamplingRow) -> Draw:
    sampling = row.sampling
    if sampling.greedy:
        return _GREEDY
    number = uniform(row.seed, row.step)
    return Draw.of(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, number)
