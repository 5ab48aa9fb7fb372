"""Runs scheduled batches on an executor: block copies, forward, sampling.

A step's life here:
1. ``launch`` has the device compute it, and may return before the device is done;
2. another step may be launched behind it, whose unread input tokens the device takes from this one;
3. ``collect`` waits for its tokens.

A step that raises is run again sequence by sequence when it is collected, so that only the sequence
which cannot be computed fails. Running a chunk twice is safe: the same keys and values go to the
same slots.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..kernels.host_copy import HostArrival, copied_to
from .batch import BatchBuilder, BatchInputs, ScheduledBatch, ScheduledSequence, UnreadTokens
from .executor import Executor, GroupLostError
from .model.streaming.errors import WeightReadError
from .sampling.edits import UnreadRows
from .sampling.logprobs import token_logprobs
from .sampling.row import SampledToken, SamplingError, SamplingRow
from .sampling.sampler import LaunchedSample, Sampler
from .sequence import Sequence as EngineSequence
from .types import TokenLogprob

_LOGIT_ROWS = 64
"""Prompt positions whose logits are held at a time: a row of Qwen3's takes 600 KB."""

RowsBySequence = Mapping[EngineSequence, Sequence[SamplingRow]]
"""For each sequence that samples: one row a choice (several where it is about to be forked)."""

_PromptLogprobs = dict[EngineSequence, tuple[int, list[TokenLogprob]]]


@dataclass(slots=True)
class StepResult:
    """What one step gave, by sequence; a sequence that failed is in ``errors`` alone."""

    sampled: dict[EngineSequence, list[SampledToken | SamplingError]] = field(default_factory=dict)
    prompt_logprobs: _PromptLogprobs = field(default_factory=dict)
    """The position of the first of these prompt tokens, and their log-probabilities."""
    errors: dict[EngineSequence, Exception] = field(default_factory=dict)
    late: set[EngineSequence] = field(default_factory=set)
    """Whose keys and values were made when the step was collected: a step that was launched before
    has computed on something else."""


@dataclass(slots=True)
class LaunchedStep:
    """A step that the device may still compute."""

    batch: ScheduledBatch
    """What is left of it after ``keep``."""
    rows: RowsBySequence
    was_alone: bool
    """Whether one sequence was all it had."""
    sampled: tuple[EngineSequence, ...] = ()
    sample: LaunchedSample | None = None
    """Of ``sampled``, one row after the other; ``None`` where nothing samples."""
    done: HostArrival | None = None
    """Nothing, which arrives once the step is computed, where nothing samples: the host waits for
    that too, else it would queue a whole prompt's steps ahead of the next arrival."""
    prompt_logprobs: _PromptLogprobs = field(default_factory=dict)
    error: Exception | None = None
    """What it raised, at the launch or when it was read."""

    @property
    def unread(self) -> UnreadTokens | None:
        """What it samples, for the step behind it; ``None`` where the device does not have it."""
        tokens_R = None if self.sample is None else self.sample.on_device_R
        if tokens_R is None:
            return None
        each_row = (sequence for sequence in self.sampled for _ in self.rows[sequence])
        return UnreadTokens(tuple(each_row), tokens_R)

    @property
    def can_be_followed(self) -> bool:
        """Whether all that a step behind it needs is, or will be, on the device."""
        return self.error is None and (self.sample is None or self.unread is not None)

    def keep(self, wanted: Callable[[ScheduledSequence], bool]) -> None:
        """Forget what other sequences compute: nobody reads it, counts it or runs it again."""
        kept = tuple(item for item in self.batch.sequences if wanted(item))
        if len(kept) < len(self.batch.sequences):
            self.batch = replace(self.batch, sequences=kept)


class ModelRunner:
    """An executor and the sampler behind it."""

    def __init__(self, executor: Executor, *, num_tokens: int) -> None:
        self.executor = executor
        self.num_tokens = num_tokens
        self.sampler = Sampler(executor.sampling, executor.vocab_size, num_tokens)

    @torch.inference_mode()
    def launch(
        self, batch: ScheduledBatch, rows: RowsBySequence, before: LaunchedStep | None = None
    ) -> LaunchedStep:
        """Start one step, behind one that is not collected yet where there is one.

        Never raises for what a single sequence did. Raises ``GroupLostError`` when there are no
        ranks left to compute on, ``WeightReadError`` when the weights cannot be read any more.
        """
        if batch.block_copies:
            self.executor.copy_blocks(batch.block_copies)
        try:
            return self._launch_together(batch, rows, None if before is None else before.unread)
        except (GroupLostError, WeightReadError):
            raise
        except Exception as error:
            return LaunchedStep(batch, rows, len(batch.sequences) == 1, error=error)

    def collect(self, step: LaunchedStep) -> StepResult:
        """Wait for what a step gave the sequences that it kept; raises as ``launch`` does."""
        if step.error is None:
            try:
                return _read(step)
            except (GroupLostError, WeightReadError):
                raise
            except Exception as error:
                step.error = error
        if step.was_alone:
            return StepResult(errors={item.sequence: step.error for item in step.batch.sequences})
        return self._run_again(step)

    @torch.inference_mode()
    def _run_again(self, step: LaunchedStep) -> StepResult:
        """Each sequence of a step that raised, alone."""
        result = StepResult()
        for scheduled in step.batch.sequences:
            result.late.add(scheduled.sequence)
            try:
                alone = _read(self._launch_together(ScheduledBatch((scheduled,)), step.rows, None))
            except (GroupLostError, WeightReadError):
                raise
            except Exception as error:
                result.errors[scheduled.sequence] = error
            else:
                result.sampled |= alone.sampled
                result.prompt_logprobs |= alone.prompt_logprobs
        return result

    def _launch_together(
        self, batch: ScheduledBatch, rows: RowsBySequence, unread: UnreadTokens | None
    ) -> LaunchedStep:
        inputs = BatchBuilder.from_batch(batch, unread)
        step = LaunchedStep(batch, rows, len(batch.sequences) == 1, tuple(inputs.sampled))
        logits_RV = self.executor.forward(inputs)
        if inputs.sampled:
            step.sample = self._sample(logits_RV, inputs, rows)
        else:
            step.done = HostArrival(logits_RV)
        start = 0
        for item in batch.sequences:
            if item.sequence.params.prompt_logprobs is not None:
                found = self._prompt_logprobs(item, start)
                step.prompt_logprobs[item.sequence] = (item.start + 1, found)
            start += item.num_new_tokens
        return step

    def _sample(
        self, logits_RV: Tensor, inputs: BatchInputs, rows: RowsBySequence
    ) -> LaunchedSample:
        counts = [len(rows[sequence]) for sequence in inputs.sampled]
        if any(count != 1 for count in counts):
            repeated = [number for number, count in enumerate(counts) for _ in range(count)]
            logits_RV = logits_RV.index_select(
                0, copied_to(repeated, torch.int64, logits_RV.device)
            )
        flat = [row for sequence in inputs.sampled for row in rows[sequence]]
        unread = None
        if inputs.unread is not None:
            places = [
                place
                for place, count in zip(inputs.sampled_places, counts, strict=True)
                for _ in range(count)
            ]
            unread = UnreadRows(inputs.unread.tokens_R, places)
        return self.sampler.launch(logits_RV, flat, unread)

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


def _read(step: LaunchedStep) -> StepResult:
    """Wait for the tokens of a step, in the order of its rows."""
    kept = {item.sequence for item in step.batch.sequences}
    result = StepResult(
        prompt_logprobs={s: found for s, found in step.prompt_logprobs.items() if s in kept}
    )
    if step.sample is None:
        if step.done is not None:
            step.done.read().tolist()
        return result
    tokens = step.sample.read()
    first = 0
    for sequence in step.sampled:
        numbers = range(first, first + len(step.rows[sequence]))
        first = numbers.stop
        if sequence in kept:
            result.sampled[sequence] = tokens[numbers.start : numbers.stop]
    return result
