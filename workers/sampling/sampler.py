"""The sampling pass: logits of a batch in, one token a row out.

One pass takes these steps:
1. ``launch`` has the kernels make the rows' edits, draw their tokens, and find what they want of
   log-probabilities, which are of the logits before the edits.
2. ``LaunchedSample.read`` waits for all of that; a row that cannot be sampled gets its own error,
   and the others do not notice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...kernels.sampling.api import MAX_TOKENS, Draw, Fault, PendingTokens, SamplingKernels
from ..types import TokenLogprob
from .edits import UnreadRows, edits_of
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
    def launch(
        self, logits_RV: Tensor, rows: Sequence[SamplingRow], unread: UnreadRows | None = None
    ) -> LaunchedSample:
        """Have one token drawn for each row, to be read later.

        ``logits_RV`` is float32 [len(rows), vocab_rows]; it is overwritten here. ``unread`` has
        the tokens before those of the rows, where their penalties do not count them yet.
        """
        if logits_RV.shape != (len(rows), self.vocab_rows) or logits_RV.dtype != torch.float32:
            raise ValueError(
                f"logits are {logits_RV.dtype} {list(logits_RV.shape)}; "
                f"float32 [{len(rows)}, {self.vocab_rows}] is needed"
            )
        draws = [_draw(row) for row in rows]
        tops = [row.num_logprobs for row in rows]
        edits = edits_of(rows, unread)
        return LaunchedSample(self.kernels.launch(logits_RV, self.num_tokens, draws, edits, tops))


class LaunchedSample:
    """Tokens of one pass."""

    def __init__(self, tokens: PendingTokens) -> None:
        self._tokens = tokens

    @property
    def on_device_R(self) -> Tensor | None:
        """See ``PendingTokens.on_device_R``."""
        return self._tokens.on_device_R

    def read(self) -> list[SampledToken | SamplingError]:
        """One token for each row, or the error of that row alone."""
        tokens = self._tokens.read()
        found = zip(tokens, self._tokens.read_logprobs(), strict=True)
        return [
            SampledToken(token, None if logprobs is None else TokenLogprob(token, *logprobs))
            if token >= 0
            else SamplingError(number, _REASONS[Fault(token)])
            for number, (token, logprobs) in enumerate(found)
        ]


def _draw(row: SamplingRow) -> Draw:
    sampling = row.sampling
    if sampling.greedy:
        return _GREEDY
    number = uniform(row.seed, row.step)
    return Draw.of(sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p, number)
