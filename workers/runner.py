"""Runs scheduled batches on an executor: block copies, forward, sampling.

A forward that raises is run again sequence by sequence, so that only the sequence which cannot be
computed fails. Running a chunk twice is safe: the same keys and values go to the same slots.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .batch import BatchBuilder, BatchInputs, ScheduledBatch, ScheduledSequence
from .executor import Executor, GroupLostError
from .sampling.logprobs import token_logprobs
from .sampling.row import SampledToken, SamplingError, SamplingRow
from .sampling.sampler import Sampler
from .sequence import Sequence as EngineSequence
from .types import TokenLogprob

_LOGIT_ROWS = 64
"""Prompt positions whose logits are held at a time: a row of Qwen3's takes 600 KB."""

RowsBySequence = Mapping[EngineSequence, Sequence[SamplingRow]]
"""For each sequence that samples: one row a choice (several where it is about to be forked)."""


@dataclass(slots=True)
class StepResult:
    """What one step gave, by sequence; a sequence that failed is in ``errors`` alone."""

    sampled: dict[EngineSequence, list[SampledToken | SamplingError]] = field(default_factory=dict)
    prompt_logprobs: dict[EngineSequence, tuple[int, list[TokenLogprob]]] = field(
        default_factory=dict
    )
    """The position of the first of these prompt tokens, and their log-probabilities."""
    errors: dict[EngineSequence, Exception] = field(default_factory=dict)


class ModelRunner:
    """An executor and the sampler behind it."""

    def __init__(self, executor: Executor, *, num_tokens: int) -> None:
        self.executor = executor
        self.num_tokens = num_tokens
        self.sampler = Sampler(executor.sampling, executor.vocab_size, num_tokens)

    @torch.inference_mode()
    def run(self, batch: ScheduledBatch, rows: RowsBySequence) -> StepResult:
        """Run one step; never raises for what a single sequence did.

        Raises ``GroupLostError`` when there are no ranks left to compute on.
        """
        if batch.block_copies:
            self.executor.copy_blocks(batch.block_copies)
        try:
            return self._run_together(batch.sequences, rows)
        except GroupLostError:
            raise
        except Exception as error:
            if len(batch.sequences) == 1:
                return StepResult(errors={batch.sequences[0].sequence: error})
        result = StepResult()
        for scheduled in batch.sequences:
            try:
                alone = self._run_together((scheduled,), rows)
            except GroupLostError:
                raise
            except Exception as error:
                result.errors[scheduled.sequence] = error
            else:
                result.sampled |= alone.sampled
                result.prompt_logprobs |= alone.prompt_logprobs
        return result

    def _run_together(
        self, scheduled: tuple[ScheduledSequence, ...], rows: RowsBySequence
    ) -> StepResult:
        result = StepResult()
        inputs = BatchBuilder.from_batch(ScheduledBatch(scheduled))
        logits_RV = self.executor.forward(inputs)
        start = 0
        for item in scheduled:
            if item.sequence.params.prompt_logprobs is not None:
                found = self._prompt_logprobs(item, start)
                result.prompt_logprobs[item.sequence] = (item.start + 1, found)
            start += item.num_new_tokens
        if inputs.sampled:
            result.sampled = self._sample(logits_RV, inputs, rows)
        return result

    def _sample(
        self, logits_RV: Tensor, inputs: BatchInputs, rows: RowsBySequence
    ) -> dict[EngineSequence, list[SampledToken | SamplingError]]:
        counts = [len(rows[sequence]) for sequence in inputs.sampled]
        if any(count != 1 for count in counts):
            logits_RV = logits_RV.repeat_interleave(
                torch.tensor(counts, device=logits_RV.device), dim=0
            )
        flat = [row for sequence in inputs.sampled for row in rows[sequence]]
        tokens = iter(self.sampler.sample(logits_RV, flat))
        return {
            sequence: [next(tokens) for _ in range(count)]
            for sequence, count in zip(inputs.sampled, counts, strict=True)
        }

    def _prompt_logprobs(self, item: ScheduledSequence, row: int) -> list[TokenLogprob]:
        """Of the prompt tokens that follow this chunk's positions; ``row`` is its first."""
        sequence, top = item.sequence, item.sequence.params.prompt_logprobs
        assert top is not None
        stop = min(item.start + item.num_new_tokens + 1, sequence.num_prompt_tokens)
        next_ids = sequence.token_ids[item.start + 1 : stop]
        found: list[TokenLogprob] = []
        for first in range(0, len(next_ids), _LOGIT_ROWS):
            ids = next_ids[first : first + _LOGIT_ROWS]
            logits_TV = self.executor.logits(range(row + first, row + first + len(ids)))
            found += token_logprobs(self.executor.sampling, logits_TV, ids, top, self.num_tokens)
        return found
