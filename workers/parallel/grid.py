"""Rank 0: starts the other ranks, tells them each step, and answers as one executor.

1. ``start_grid`` checks that the model can be split so, opens the store and the signs of life, and
   has the ranks started; then rank 0 loads its own part and joins like any other.
2. Every method of ``GridExecutor`` sends one command and then does rank 0's own share of it.
3. When a rank is lost, the watch ends all others; whatever rank 0 computes ends in
   ``GroupLostError``, now and for every later call.
4. ``close`` tells the ranks to end, and kills those that do not.
"""

from __future__ import annotations

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

import torch
from torch import Tensor

from ...kernels.context import build_context
from ...kernels.sampling.api import SamplingKernels
from ..batch import BatchInputs
from ..config import EngineConfig
from ..executor import GroupLostError, LocalExecutor
from ..loading import LoadedModel, load_model, load_text_for, with_pool
from ..model.config import ModelConfig
from ..model.shard import ShardSpec, check_grid
from ..model.streaming.layer_stream import StreamStats
from ..types import BlockId
from .command import Kind, StepInputs, command, encode_step
from .control import ControlCost, send_command
from .joining import JoinedRank, join
from .launcher import RankHandle, RankLauncher, RankSpec
from .local_ranks import LocalRanks
from .signs_of_life import LifeHub
from .store import open_store

logger = logging.getLogger(__name__)

T = TypeVar("T")

_CLOSE_S = 5.0
"""Time that ranks have to leave by themselves."""
_POLL_S = 0.02
_TOKEN_BYTES = 16


def build_executor(
    config: EngineConfig, launcher: RankLauncher | None = None
) -> tuple[LoadedModel, LocalExecutor | GridExecutor]:
    """The model of a configuration and where it is computed: in this process, or on a grid.

    ``launcher`` starts the other ranks; by default they are subprocesses. Raises what
    ``load_model`` raises, and ``GroupLostError`` where a rank does not come up.
    """
    if config.parallel.num_ranks > 1:
        return start_grid(config, launcher or LocalRanks())
    loaded = load_model(config)
    executor = LocalExecutor(
        loaded.model,
        num_blocks=loaded.num_blocks,
        block_size=config.block_size,
        kv_cache_dtype=config.kv_cache_dtype,
    )
    return loaded, executor


def start_grid(config: EngineConfig, launcher: RankLauncher) -> tuple[LoadedModel, GridExecutor]:
    """Start the ranks of a configuration and join them as rank 0; raises as ``build_executor``."""
    text = load_text_for(config)
    parallel = config.parallel
    shapes = ModelConfig.from_folder(text.folder)
    check_grid(shapes, tp_size=parallel.tensor, pp_size=parallel.pipeline)
    members = _Members(config, launcher)
    try:
        joined = members.join()
        loaded = with_pool(config, text, joined.part, joined.num_blocks)
    except BaseException:
        members.end()
        raise
    return loaded, GridExecutor(joined, members)


class GridExecutor:
    """A model on a grid of ranks, of which this process is rank 0. See ``Executor``."""

    def __init__(self, joined: JoinedRank, members: _Members) -> None:
        self._stage = joined.stage
        self._groups = joined.groups
        self._members = members
        self._cost = ControlCost()
        self._closed = False

    @property
    def vocab_size(self) -> int:
        """See ``Executor.vocab_size``."""
        return self._stage.model.config.vocab_size

    @property
    def is_asynchronous(self) -> bool:
        """See ``Executor.is_asynchronous``: the ranks are in step with the host."""
        return False

    @property
    def sampling(self) -> SamplingKernels:
        """See ``Executor.sampling``; rank 0 has the logits of the whole vocabulary."""
        return self._stage.model.kernels.sampling

    @property
    def ranks(self) -> Sequence[RankHandle]:
        """The other ranks, from rank 1."""
        return self._members.handles

    def copy_blocks(self, pairs: Sequence[tuple[BlockId, BlockId]]) -> None:
        """See ``Executor.copy_blocks``."""
        if pairs:
            self._tell(Kind.COPY_BLOCKS, [block for pair in pairs for block in pair])
            self._stage.copy_blocks(pairs)

    def forward(self, inputs: BatchInputs) -> Tensor:
        """See ``Executor.forward``."""
        begin = time.perf_counter()
        step, stage = StepInputs.of(inputs), self._stage
        # What cannot be computed is refused here, before the other ranks hear of it.
        context = build_context(
            step.items, stage.cache.block_size, torch.device("cpu"), stage.model.pattern
        )
        stage.model.check(context, stage.cache)
        self._tell(Kind.STEP, encode_step(step))
        told = time.perf_counter()
        self._share(lambda: stage.forward(step))
        logits = self._logits(step.sample_rows)
        self._cost = replace(
            self._cost,
            steps=self._cost.steps + 1,
            send_s=self._cost.send_s + told - begin,
            step_s=self._cost.step_s + time.perf_counter() - begin,
        )
        return logits

    def logits(self, rows: Sequence[int]) -> Tensor:
        """See ``Executor.logits``."""
        if rows:
            self._tell(Kind.LOGITS, rows)
        return self._logits(rows)

    def read_blocks(self, block_ids: Sequence[BlockId], out_Ln2KSD: Tensor) -> None:
        """See ``Executor.read_blocks``."""
        self._check_blocks(block_ids, out_Ln2KSD)
        self._tell(Kind.READ_BLOCKS, block_ids)
        self._share(lambda: self._stage.read_blocks(block_ids, out_Ln2KSD))

    def write_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor) -> None:
        """See ``Executor.write_blocks``."""
        self._check_blocks(block_ids, blocks_Ln2KSD)
        self._tell(Kind.WRITE_BLOCKS, block_ids)
        self._share(lambda: self._stage.write_blocks(block_ids, blocks_Ln2KSD))

    def _check_blocks(self, block_ids: Sequence[BlockId], blocks_Ln2KSD: Tensor) -> None:
        """Refuse a tensor of another shape before the other ranks hear of it."""
        config, pool = self._stage.model.config, self._stage.cache.blocks_LN2KSD
        shape = (config.num_layers, len(block_ids), 2, config.num_kv_heads, *pool.shape[4:])
        if tuple(blocks_Ln2KSD.shape) != shape:
            raise ValueError(
                f"blocks of shape {list(blocks_Ln2KSD.shape)}; {list(shape)} are meant"
            )

    def control_cost(self) -> ControlCost:
        """What telling the ranks has cost so far."""
        self._tell(Kind.CONTROL_COST, ())
        found = self._share(lambda: self._groups.grid.gather(torch.tensor([0])))
        return replace(self._cost, receive_s=max(int(waited) for waited in found) / 1e6)

    def check(self) -> None:
        """See ``Executor.check``."""
        reason = self._members.hub.lost
        if reason is not None:
            raise GroupLostError(reason)

    def stream_stats(self) -> StreamStats:
        """See ``Executor.stream_stats``: of rank 0."""
        return self._stage.model.stream_stats()

    def close(self) -> None:
        """See ``Executor.close``; the ranks are gone when it returns."""
        if self._closed:
            return
        self._closed = True
        self._members.hub.expect_ends()
        if self._members.hub.lost is None:
            try:
                send_command(self._groups.grid, command(Kind.CLOSE))
            except GroupLostError as error:
                logger.warning("a rank was gone before it was closed: %s", error)
        self._members.end(_CLOSE_S)
        self._groups.close()
        self._stage.model.close()

    def _logits(self, rows: Sequence[int]) -> Tensor:
        if not rows:
            return torch.empty(0, self.vocab_size, device=self._stage.model.device)
        logits = self._share(lambda: self._stage.logits(rows))
        assert logits is not None, "rank 0 gathers the logits"
        return logits

    def _tell(self, kind: Kind, payload: Sequence[int]) -> None:
        self.check()
        if self._closed:
            raise GroupLostError("the group is closed")
        send_command(self._groups.grid, command(kind, payload))

    def _share(self, compute: Callable[[], T]) -> T:
        """Rank 0's part of a command. After any failure the ranks no longer march in step."""
        try:
            return compute()
        except GroupLostError:
            raise
        except Exception as error:
            reason = f"rank 0 failed: {type(error).__name__}: {error}"
            self._members.hub.lose(reason)
            raise GroupLostError(reason) from error


class _Members:
    """The other ranks, and what they find rank 0 by."""

    def __init__(self, config: EngineConfig, launcher: RankLauncher) -> None:
        parallel, host = config.parallel, launcher.host
        token = secrets.token_bytes(_TOKEN_BYTES)
        self._config = config
        self._host = host
        self._joined: JoinedRank | None = None
        self.handles: list[RankHandle] = []
        self.hub = LifeHub(
            host, parallel.num_ranks, token, parallel.rank_timeout_s, on_lost=self._on_lost
        )
        self._store = open_store(host)
        self._shards = [
            ShardSpec.of_rank(rank, tp_size=parallel.tensor, pp_size=parallel.pipeline)
            for rank in range(parallel.num_ranks)
        ]
        port = self._store.port
        specs = [RankSpec(config, s, host, port, self.hub.port, token) for s in self._shards[1:]]
        try:
            self.handles += launcher.start(specs)
        except BaseException:
            self.end()
            raise
        self.hub.watch_processes({n: h.is_alive for n, h in enumerate(self.handles, start=1)})

    def join(self) -> JoinedRank:
        """Load rank 0's part and join it to the others. Raises what ``joining.join`` raises."""
        joined = join(self._config, self._shards[0], self._store, self._host, self.hub)
        self._joined = joined
        self.hub.watch_silence()
        return joined

    def end(self, patience_s: float = 0.0) -> None:
        """Wait for the ranks to leave, then kill those that have not."""
        deadline = time.monotonic() + patience_s
        while self.hub.num_connected and self.hub.lost is None and time.monotonic() < deadline:
            time.sleep(_POLL_S)
        self.hub.close()
        self._kill()

    def _on_lost(self, reason: str) -> None:
        self._kill()
        if self._joined is not None and self._joined.part.model.device.type == "cuda":
            self._joined.groups.close()  # nothing else ends what waits on the device

    def _kill(self) -> None:
        for rank, handle in enumerate(self.handles, start=1):
            try:
                handle.kill()
            except Exception:  # the others are to go all the same
                logger.exception("rank %d could not be killed", rank)
