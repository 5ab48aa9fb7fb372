"""Decode steps as CUDA graphs: one launch instead of hundreds.

The life of a graph:
1. A step of decode rows alone is filled up to its batch bucket: rows without a sequence have
   length 0 and slot -1, so that they attend over nothing and write nothing.
2. Its inputs are copied into static buffers, on whose addresses graphs are made.
3. The first step of a bucket (and of a number of splits) runs, is captured, and is then replayed
   as every later one is. Nothing in it depends on lengths: those are read on the device.
4. All graphs of a stack share one pool of memory, since only one runs at a time.
5. Another cache, or block tables that no longer fit, drop all graphs.

Buckets, filling and buffers know nothing of CUDA: ``GraphRunner`` is the only part that does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ..api import Attention, DecoderLayer
from ..context import ForwardContext
from ..host_copy import host_tensor
from ..kv_layer import KVLayer
from .attention import DecodeBatch, attend_decode, split_bucket

BATCH_BUCKETS = (1, 2, 4, *range(8, 257, 8))
"""Rows of a graph: at most 7 are filled up, and at small sizes no more than half."""
TABLE_ENTRIES = 2**16
"""Block table entries that the first buffers hold: 4 million tokens in blocks of 64."""


@dataclass(frozen=True, slots=True)
class Step:
    """The operands of a stack's pass; see ``LayerStack``."""

    layers: Sequence[DecoderLayer]
    """Those that run."""
    hidden_TC: Tensor
    cos_TE: Tensor
    sin_TE: Tensor
    slots_T: Tensor
    kv_layers: Sequence[KVLayer]
    bounds_layers: Sequence[Tensor] = ()
    filled_blocks: Sequence[int] = ()
    """Those whose bounds are due."""


Run = Callable[[Step, Attention], Tensor]
"""A pass over the layers; may be repeated without another outcome."""


class GraphRunner(Protocol):
    """How a step is kept for later."""

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """What runs ``step`` again on the same memory, into the same result."""
        ...


class DirectRunner:
    """Calls the step anew each time: the CPU has no launches to save."""

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See ``GraphRunner.capture``."""
        return step


class CudaGraphRunner:
    """Graphs that share one pool of memory."""

    def __init__(self) -> None:
        self._pool: Any = None  # torch has a private type for it

    def capture(self, step: Callable[[], Tensor]) -> Callable[[], Tensor]:
        """See ``GraphRunner.capture``."""
        # Compiles kernels and makes cuBLAS choose before: neither may happen while capturing.
        side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # Other threads (KV that is handed over, say) may go on meanwhile.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            result = step()
        self._pool = graph.pool()

        def replay() -> Tensor:
            graph.replay()
            return result

        return replay


def batch_bucket(size: int) -> int | None:
    """The rows of the graph that runs ``size`` of them; ``None`` where they are too many."""
    return next((bucket for bucket in BATCH_BUCKETS if bucket >= size), None)


class DecodeGraphs:
    """The graphs of one stack of layers and the buffers that they read."""

    def __init__(self, run: Run, runner: GraphRunner) -> None:
        self._run = run
        self._runner = runner
        self._buffers: StaticBuffers | None = None
        self._kv_layers: Sequence[KVLayer] = ()
        self._replays: dict[tuple[int, int], Callable[[], Tensor]] = {}

    @property
    def captured(self) -> frozenset[tuple[int, int]]:
        """Rows and splits of every graph that there is."""
        return frozenset(self._replays)

    def __call__(self, step: Step, context: ForwardContext) -> Tensor:
        """Run a step of decode rows alone; the stream, in memory of its own."""
        size = context.num_sequences
        bucket, splits = batch_bucket(size), split_bucket(context.seq_lens)
        assert bucket is not None, "the caller asks batch_bucket"
        num_entries = sum(map(len, context.block_tables))
        buffers = self._buffers
        same_cache = self._kv_layers is step.kv_layers
        if buffers is None or not same_cache or num_entries > buffers.num_entries:
            self._replays.clear()
            self._kv_layers = step.kv_layers
            self._buffers = buffers = StaticBuffers.like(step, _room(num_entries))
        buffers.fill(step, context, bucket)
        replay = self._replays.get((bucket, splits))
        if replay is None:
            replay = self._runner.capture(self._step(buffers, step.layers, bucket, splits))
            self._replays[bucket, splits] = replay
        return replay()[:size].clone()

    def _step(
        self, buffers: StaticBuffers, layers: Sequence[DecoderLayer], bucket: int, splits: int
    ) -> Callable[[], Tensor]:
        step = buffers.step(bucket, layers, self._kv_layers)
        batch = buffers.batch(bucket, splits)

        def attend(q_THD: Tensor, kv_N2KSD: KVLayer, bounds_N2KD: Tensor | None = None) -> Tensor:
            assert isinstance(kv_N2KSD, Tensor), "a graph is made over what takes() allows"
            assert bounds_N2KD is None, "likewise"
            out_TC = q_THD.new_empty(bucket, q_THD.shape[1] * q_THD.shape[2])
            attend_decode(q_THD, kv_N2KSD, batch, out_TC)
            return out_TC

        return lambda: self._run(step, attend)


class StaticBuffers:
    """Inputs of a step of as many rows as the largest bucket has, at addresses that stay."""

    def __init__(
        self, hidden_BC: Tensor, cos_BE: Tensor, sin_BE: Tensor, slots_B: Tensor, num_entries: int
    ) -> None:
        rows = len(hidden_BC)
        self.num_entries = num_entries
        self._hidden_BC, self._cos_BE, self._sin_BE = hidden_BC, cos_BE, sin_BE
        self._slots_B = slots_B
        device = hidden_BC.device
        self._rows_B = torch.arange(rows, dtype=torch.int32, device=device)
        # Lengths, where each table starts, then the tables: one vector, one copy a step.
        self._vector = torch.zeros(2 * rows + num_entries, dtype=torch.int32, device=device)

    @classmethod
    def like(cls, step: Step, num_entries: int) -> StaticBuffers:
        """Buffers for steps of this form."""
        rows = BATCH_BUCKETS[-1]
        tensors = (step.hidden_TC, step.cos_TE, step.sin_TE, step.slots_T)
        # Zeros: what fills a batch up is computed like any row.
        hidden, cos, sin, slots = (x.new_zeros(rows, *x.shape[1:]) for x in tensors)
        return cls(hidden, cos, sin, slots, num_entries)

    def fill(self, step: Step, context: ForwardContext, bucket: int) -> None:
        """Copy a step's inputs; the rows behind them up to ``bucket`` belong to no sequence."""
        size, rows = context.num_sequences, len(self._rows_B)
        self._hidden_BC[:size].copy_(step.hidden_TC)
        self._cos_BE[:size].copy_(step.cos_TE)
        self._sin_BE[:size].copy_(step.sin_TE)
        self._slots_B[:size].copy_(step.slots_T)
        self._slots_B[size:bucket].fill_(-1)
        nothing = [0] * (rows - size)
        tables = context.block_tables
        table_ends = itertools.accumulate(map(len, tables), initial=0)
        values = [*context.seq_lens, *nothing, *table_ends][: rows + size]
        values += [*nothing, *itertools.chain.from_iterable(tables)]
        host = host_tensor(values, torch.int32, self._vector.device)
        self._vector[: len(values)].copy_(host, non_blocking=True)

    def step(
        self, bucket: int, layers: Sequence[DecoderLayer], kv_layers: Sequence[KVLayer]
    ) -> Step:
        """The first rows as a pass takes them."""
        return Step(
            layers,
            self._hidden_BC[:bucket],
            self._cos_BE[:bucket],
            self._sin_BE[:bucket],
            self._slots_B[:bucket],
            kv_layers,
        )

    def batch(self, bucket: int, splits: int) -> DecodeBatch:
        """The first rows as attention takes them."""
        rows = len(self._rows_B)
        return DecodeBatch(
            rows_B=self._rows_B[:bucket],
            seq_lens_B=self._vector[:bucket],
            table_starts_B=self._vector[rows : rows + bucket],
            tables=self._vector[2 * rows :],
            num_splits=splits,
        )


def _room(num_entries: int) -> int:
    """Entries to make room for: doubled, so that growing sequences seldom drop the graphs."""
    return max(TABLE_ENTRIES, 1 << (num_entries - 1).bit_length())
