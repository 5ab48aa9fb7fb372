"""What one step runs: the scheduler's plain answer, and the lists a forward pass is built from."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from ..kernels.context import ContextItem
from .sequence import Sequence
from .types import BlockId


@dataclass(frozen=True, slots=True)
class ScheduledSequence:
    """The tokens ``[start, start + num_new_tokens)`` of one sequence.

    ``samples`` says that these are all the tokens it has and that there is room for another, so its
    last row's logits give the next.
    """

    sequence: Sequence
    start: int
    num_new_tokens: int
    samples: bool

    @property
    def end(self) -> int:
        """The sequence's computed tokens once this ran."""
        return self.start + self.num_new_tokens


@dataclass(frozen=True, slots=True)
class ScheduledBatch:
    """One step. Decode rows come first, each group in rank order.

    ``block_copies`` (source, destination) run before the forward, in order or all reads before all
    writes: no destination comes twice or is read later. ``preempted`` went back to the queue; room
    that was left over may have let one of them come out again at once.
    """

    sequences: tuple[ScheduledSequence, ...] = ()
    block_copies: tuple[tuple[BlockId, BlockId], ...] = ()
    preempted: tuple[Sequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """New tokens in the whole step."""
        return sum(scheduled.num_new_tokens for scheduled in self.sequences)


@dataclass(frozen=True, slots=True)
class UnreadTokens:
    """What a step samples, while the host has not read it: the token of ``sequences[i]`` is
    ``tokens_R[i]``, on the executor's device; a fault is below 0."""

    sequences: tuple[Sequence, ...]
    tokens_R: Tensor


@dataclass(frozen=True, slots=True)
class BatchInputs:
    """A step as lists, sequence after sequence in the order of the batch.

    ``token_ids`` has one entry a new token; ``items`` goes to ``build_context``; ``sample_rows``
    are the rows of ``token_ids`` whose logits are needed, and ``sampled`` whose they are. Where the
    step before is not read yet, ``unread_rows`` of ``token_ids`` hold 0 in the place of its tokens
    ``unread.tokens_R[unread_places]``.
    """

    token_ids: list[int]
    items: list[ContextItem]
    sample_rows: list[int]
    sampled: list[Sequence]
    unread: UnreadTokens | None = None
    unread_rows: list[int] = field(default_factory=list)
    unread_places: list[int] = field(default_factory=list)
    sampled_places: list[int] = field(default_factory=list)
    """For each of ``sampled`` the place of its last token in ``unread``, -1 where that is known."""


class BatchBuilder:
    """Collects one step's lists; ``build`` hands them out.

    ``unread`` are the tokens of the step before that the host may not have read.
    """

    def __init__(self, unread: UnreadTokens | None = None) -> None:
        self._inputs = BatchInputs([], [], [], [], unread)
        sequences = () if unread is None else unread.sequences
        self._places = {sequence: place for place, sequence in enumerate(sequences)}

    def add(self, scheduled: ScheduledSequence) -> None:
        """Append one sequence's tokens."""
        inputs, sequence = self._inputs, scheduled.sequence
        place = -1
        if scheduled.start == sequence.num_tokens:
            place = self._places[sequence]
            inputs.unread_rows.append(len(inputs.token_ids))
            inputs.unread_places.append(place)
            inputs.token_ids.append(0)
        inputs.token_ids.extend(sequence.token_ids[scheduled.start : scheduled.end])
        inputs.items.append(
            ContextItem(
                sequence.block_table,
                scheduled.start,
                scheduled.num_new_tokens,
                sequence.num_prompt_tokens,
            )
        )
        if scheduled.samples:
            inputs.sample_rows.append(len(inputs.token_ids) - 1)
            inputs.sampled.append(sequence)
            inputs.sampled_places.append(place)

    def build(self) -> BatchInputs:
        """The lists collected so far."""
        return self._inputs

    @classmethod
    def from_batch(cls, batch: ScheduledBatch, unread: UnreadTokens | None = None) -> BatchInputs:
        """The lists of a whole batch, between ``schedule`` and ``commit``."""
        builder = cls(unread)
        for scheduled in batch.sequences:
            builder.add(scheduled)
        return builder.build()
